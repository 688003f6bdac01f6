//! Isolation: suspects run in child processes, so that a task that crashes its process harms nothing else.
//!
//! A child is this program, started again (docs/decisions/0008). It runs one task at a time, so that its
//! death has only one possible cause. Children are started on demand, reused for further suspects, and
//! ended when they have been idle for a while.

use std::sync::Arc;
use std::time::Duration;

use garenne_common::Payload;
use garenne_common::Timestamp;
use garenne_common::wire::{self, CrashRecord};
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::handlers::{Context, Handler, Registry, RunningHandler};
use crate::run::concurrency::Permit;
use crate::run::outcome::{Crash, Outcome, StartFailure, StartFailureKind, TaskError};

mod child;
mod frame;
mod process;
mod warden;

use frame::{ChildCommand, ChildMessage, ChildTask};
use process::ChildProcess;
pub(crate) use warden::{RUN_VARIABLE, Warden, WatchedRun};

/// Idle time after which a child is ended.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);
/// Number of children that are tried if they die before they start with the task.
const MAX_STARTS: u32 = 3;

/// Runs tasks for the worker that started this process, until that is gone.
pub(crate) async fn serve(registry: Registry) {
    if let Err(error) = child::serve(registry).await {
        tracing::error!(%error, "a child process has lost its worker");
    }
}

/// The child processes of a worker.
#[derive(Debug)]
pub(crate) struct Isolation {
    /// Limits the number of children.
    permits: Arc<Semaphore>,
    idle: Mutex<Vec<ChildProcess>>,
}

/// The right to use one child process, and the process, unless it could not be started.
pub(crate) struct ReservedChild {
    permit: OwnedSemaphorePermit,
    process: std::io::Result<ChildProcess>,
}

impl Isolation {
    /// For a worker with this concurrency. At most two children per core, since each is a whole process.
    pub(crate) fn new(concurrency: usize) -> Arc<Self> {
        let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        let children = concurrency.min(2 * cores.max(2));
        Arc::new(Self { permits: Arc::new(Semaphore::new(children)), idle: Mutex::default() })
    }

    /// Waits for a child that is ready: starting it must not use up the time of an attempt. The semaphore
    /// is never closed, so the result is never `None` while `self` exists.
    pub(crate) async fn reserve(&self) -> Option<ReservedChild> {
        let permit = Arc::clone(&self.permits).acquire_owned().await.ok()?;
        Some(ReservedChild { permit, process: self.process().await })
    }

    /// Ends idle children, and all of them when `stop` fires.
    pub(crate) async fn sweep(self: Arc<Self>, stop: CancellationToken) {
        let mut interval = tokio::time::interval(SWEEP_INTERVAL);
        loop {
            tokio::select! {
                _ = interval.tick() => {
                    let now = Instant::now();
                    self.idle.lock().retain(|process| now - process.idle_since < IDLE_TIMEOUT);
                }
                () = stop.cancelled() => return self.idle.lock().clear(),
            }
        }
    }

    /// A child that waits for commands: an idle one or a new one.
    async fn process(&self) -> std::io::Result<ChildProcess> {
        loop {
            let idle = self.idle.lock().pop();
            let Some(mut process) = idle else { return ChildProcess::start().await };
            if process.is_alive() {
                return Ok(process);
            }
        }
    }

    fn give_back(&self, mut process: ChildProcess) {
        process.idle_since = Instant::now();
        self.idle.lock().push(process);
    }
}

/// Runs one suspect in a child process, in place of its handler.
pub(crate) struct Isolated {
    isolation: Arc<Isolation>,
    /// Taken by the only attempt.
    child: Mutex<Option<ReservedChild>>,
    /// Earlier crashes of the task.
    crashes: CrashRecord,
    budget: u32,
}

impl Isolated {
    pub(crate) fn new(
        isolation: Arc<Isolation>,
        child: ReservedChild,
        crashes: CrashRecord,
        budget: u32,
    ) -> Self {
        Self { isolation, child: Mutex::new(Some(child)), crashes, budget }
    }
}

impl Handler for Isolated {
    fn run(&self, context: Context, permit: Permit) -> RunningHandler {
        let (isolation, crashes) = (Arc::clone(&self.isolation), self.crashes.clone());
        let (child, budget) = (self.child.lock().take(), self.budget);
        Box::pin(async move {
            let _permit = permit;
            // There is only one attempt with this handler.
            let Some(ReservedChild { process, permit: _child }) = child else {
                return Outcome::Interrupted;
            };
            let died = |how: String| {
                let record = crashes.charged(Timestamp::now(), context.worker(), &how);
                Outcome::Crashed(Crash { record, budget, how })
            };
            attempt(&isolation, process, &context).await.unwrap_or_else(|Died(how)| died(how))
        })
    }

    fn is_process(&self) -> bool {
        true
    }
}

/// The child died while it ran the task; describes how.
struct Died(String);

async fn attempt(
    isolation: &Isolation,
    process: std::io::Result<ChildProcess>,
    context: &Context,
) -> Result<Outcome, Died> {
    let mut process = match start(isolation, process, context).await {
        Ok(process) => process,
        Err(error) => return Ok(not_started(&error)),
    };
    match receive_outcome(&mut process, context).await {
        Ok((message, body)) => {
            isolation.give_back(process);
            Ok(decode_outcome(message, body))
        }
        Err(_) => Err(Died(process.wait_for_exit().await)),
    }
}

/// Starts the attempt in a child. A child that dies before it has started with the task, for instance
/// while it was idle, is replaced by another one: the task is not at fault.
async fn start(
    isolation: &Isolation,
    mut process: std::io::Result<ChildProcess>,
    context: &Context,
) -> std::io::Result<ChildProcess> {
    let command = ChildCommand::Run(Box::new(child_task(context)));
    let mut starts = 1;
    loop {
        let mut child = process?;
        match assign(&mut child, &command, &context.task().args.bytes).await {
            Ok(()) => return Ok(child),
            Err(error) if starts == MAX_STARTS => return Err(error),
            Err(error) => {
                tracing::warn!(%error, "a child process ended before it started with its task");
            }
        }
        starts += 1;
        process = isolation.process().await;
    }
}

/// Sends the task to a child and waits until the child has started with it.
async fn assign(
    child: &mut ChildProcess,
    command: &ChildCommand,
    args: &[u8],
) -> std::io::Result<()> {
    child.send(command, args).await?;
    match child.receive().await? {
        (ChildMessage::Started, _) => Ok(()),
        (other, _) => Err(std::io::Error::other(format!("{other:?} instead of a start"))),
    }
}

fn not_started(error: &std::io::Error) -> Outcome {
    let what = "cannot start a child process for an isolated attempt";
    let shortage = StartFailure::of_shortage(error, what);
    let other = || StartFailure::new(StartFailureKind::Isolation, format!("{what}: {error}"));
    Outcome::NotStarted(shortage.unwrap_or_else(other))
}

fn child_task(context: &Context) -> ChildTask {
    let task = context.task();
    let message = wire::task::encode(task, context.worker());
    let headers = message.headers.into_iter().map(|(name, value)| (name.into_owned(), value));
    ChildTask {
        queue: task.queue.clone(),
        properties: message.properties,
        headers: headers.collect(),
        worker: context.worker().to_owned(),
        redelivered: context.redelivered(),
        crashes: context.crashes(),
        fence: context.fence(),
    }
}

/// Waits for the outcome, and passes signals for the attempt on to the child meanwhile.
async fn receive_outcome(
    process: &mut ChildProcess,
    context: &Context,
) -> std::io::Result<(ChildMessage, Vec<u8>)> {
    let (mut messages, mut commands) = process.split();
    let mut outcome = std::pin::pin!(frame::read_async(&mut messages));
    tokio::select! {
        outcome = &mut outcome => return outcome,
        () = context.cancelled() => commands.send(&ChildCommand::Cancel).await,
    }
    tokio::select! {
        outcome = &mut outcome => return outcome,
        () = context.over() => commands.send(&ChildCommand::Stop).await,
    }
    outcome.await
}

fn decode_outcome(message: ChildMessage, body: Vec<u8>) -> Outcome {
    match message {
        ChildMessage::Output(codec) => Outcome::Succeeded(Payload { codec, bytes: body.into() }),
        ChildMessage::BadArguments(error) => Outcome::BadArguments(error),
        ChildMessage::Panicked(message) => Outcome::Panicked(message),
        ChildMessage::Failed { message, retryable } => {
            Outcome::of_error(TaskError::with(message, retryable))
        }
        // The attempt was over before, and its outcome is ignored.
        ChildMessage::Stopped | ChildMessage::Ready | ChildMessage::Started => Outcome::Interrupted,
    }
}
