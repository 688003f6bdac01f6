//! Isolation: suspects run in child processes, so that one that kills its process kills nothing else.
//!
//! A child is this very program, started again (docs/decisions/0008). It runs one task at a time, so
//! its death is that task's doing and nobody else's. Children are started on demand, used again for
//! further suspects, and ended when there have been none for a while.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use garenne_common::Payload;
use garenne_common::Timestamp;
use garenne_common::wire::{self, CrashRecord};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::context::Context;
use crate::handler::{Fault, Handler, Registry, Running, Slot};
use crate::outcome::{Crash, TaskError, Trouble, TroubleKind};

mod child;
mod frame;
mod process;
mod warden;

use frame::{Answer, Job, Order, Retry};
use process::Process;
pub(crate) use warden::{RUN, Warden, Watch};

/// After so long without a suspect a child is ended.
const IDLE: Duration = Duration::from_secs(10);
const SWEEP: Duration = Duration::from_secs(1);
/// How many children are tried that die before they have begun with a task.
const STARTS: u32 = 3;

/// Serves the worker that started this process, until that is gone.
pub(crate) async fn serve(registry: Registry) {
    if let Err(error) = child::serve(registry).await {
        tracing::error!(%error, "the isolated process lost its worker");
    }
}

/// The child processes of a worker.
#[derive(Debug)]
pub(crate) struct Isolation {
    /// How many suspects run at once.
    places: Arc<Semaphore>,
    idle: Mutex<Vec<Process>>,
}

/// The right to use one child process, and the process, unless it could not be started.
pub(crate) struct Place {
    turn: OwnedSemaphorePermit,
    process: std::io::Result<Process>,
}

impl Isolation {
    /// For a worker with so many slots: two children per core at most, since each is a whole process.
    pub(crate) fn new(slots: usize) -> Arc<Self> {
        let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        let places = slots.min(2 * cores.max(2));
        Arc::new(Self { places: Arc::new(Semaphore::new(places)), idle: Mutex::default() })
    }

    /// Waits for its turn and for a child that is ready: starting one must not use up an attempt's
    /// time. `None` never happens while this lives.
    pub(crate) async fn place(&self) -> Option<Place> {
        let turn = Arc::clone(&self.places).acquire_owned().await.ok()?;
        Some(Place { turn, process: self.process().await })
    }

    /// Ends children that have nothing to do, until `stop`, and then all of them.
    pub(crate) async fn sweep(self: Arc<Self>, stop: CancellationToken) {
        let mut clock = tokio::time::interval(SWEEP);
        loop {
            tokio::select! {
                _ = clock.tick() => {
                    let now = Instant::now();
                    self.idle().retain(|process| now - process.idle_since < IDLE);
                }
                () = stop.cancelled() => return self.idle().clear(),
            }
        }
    }

    /// A child that waits for orders: an idle one, or a new one.
    async fn process(&self) -> std::io::Result<Process> {
        loop {
            let idle = self.idle().pop();
            let Some(mut process) = idle else { return Process::start().await };
            if process.lives() {
                return Ok(process);
            }
        }
    }

    fn give_back(&self, mut process: Process) {
        process.idle_since = Instant::now();
        self.idle().push(process);
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Process>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A suspect about to run in a child process; stands in for its handler.
pub(crate) struct Isolated {
    pub(crate) isolation: Arc<Isolation>,
    /// The crashes charged so far.
    pub(crate) record: CrashRecord,
    pub(crate) budget: u32,
    /// Taken by the one attempt.
    pub(crate) place: Mutex<Option<Place>>,
}

impl Handler for Isolated {
    fn run(&self, context: Context, slot: Slot) -> Running {
        let (isolation, record) = (Arc::clone(&self.isolation), self.record.clone());
        let budget = self.budget;
        let place = self.place.lock().unwrap_or_else(PoisonError::into_inner).take();
        Box::pin(async move {
            let _slot = slot;
            // Taken once; there is no second attempt by this handler.
            let Some(Place { process, turn: _turn }) = place else {
                return Err(Fault::Interrupted);
            };
            attempt(&isolation, process, &context).await.map_err(|end| match end {
                End::Fault(fault) => fault,
                End::Died(how) => {
                    let record = record.charged(Timestamp::now(), context.worker(), &how);
                    Fault::Crashed(Crash { record, budget, how })
                }
            })
        })
    }

    fn is_process(&self) -> bool {
        true
    }
}

/// How an isolated attempt ended without an output.
enum End {
    Fault(Fault),
    /// Its process died.
    Died(String),
}

/// A child that does not begin is not the task's doing.
async fn attempt(
    isolation: &Isolation,
    mut process: std::io::Result<Process>,
    context: &Context,
) -> Result<Payload, End> {
    let order = Order::Run(Box::new(job(context)));
    let mut starts = 1;
    let mut process = loop {
        match begin(process, &order, &context.task().args.bytes).await {
            Ok(process) => break process,
            Err(Begin::NoProcess(error)) => return Err(End::Fault(unable(&error))),
            // One that waited for orders can have been killed meanwhile.
            Err(Begin::Died(error)) if starts == STARTS => return Err(End::Fault(unable(&error))),
            Err(Begin::Died(error)) => {
                tracing::warn!(%error, "a child process ended before it began with its task");
            }
        }
        starts += 1;
        process = isolation.process().await;
    };
    match hear_out(&mut process, context).await {
        Ok((answer, body)) => {
            isolation.give_back(process);
            result(answer, body).map_err(End::Fault)
        }
        Err(_) => Err(End::Died(process.death().await)),
    }
}

fn unable(error: &std::io::Error) -> Fault {
    let what = "cannot start a child process for an isolated attempt";
    let shortage = Trouble::of_shortage(error, what);
    let other = || Trouble::new(TroubleKind::Isolation, format!("{what}: {error}"));
    Fault::Unable(shortage.unwrap_or_else(other))
}

fn job(context: &Context) -> Job {
    let task = context.task();
    let message = wire::task::encode(task, context.worker());
    let headers = message.headers.into_iter().map(|(name, value)| (name.into_owned(), value));
    Job {
        queue: task.queue.clone(),
        properties: message.properties,
        headers: headers.collect(),
        worker: context.worker().to_owned(),
        redelivered: context.redelivered(),
        crashes: context.crashes(),
        fence: context.fence(),
    }
}

/// Why a child did not begin with a task.
enum Begin {
    /// It could not be started.
    NoProcess(std::io::Error),
    /// It was there and is not any more.
    Died(std::io::Error),
}

/// Hands the task to a child and waits until that has begun with it.
async fn begin(
    process: std::io::Result<Process>,
    order: &Order,
    args: &[u8],
) -> Result<Process, Begin> {
    let mut process = process.map_err(Begin::NoProcess)?;
    process.tell(order, args).await.map_err(Begin::Died)?;
    match process.next().await.map_err(Begin::Died)? {
        (Answer::Started, _) => Ok(process),
        (other, _) => {
            Err(Begin::Died(std::io::Error::other(format!("{other:?} instead of a start"))))
        }
    }
}

/// Waits for the answer, and passes on what the attempt is told meanwhile.
async fn hear_out(process: &mut Process, context: &Context) -> std::io::Result<(Answer, Vec<u8>)> {
    let (mut answers, mut orders) = process.halves();
    let mut answer = std::pin::pin!(frame::read_async(&mut answers));
    tokio::select! {
        answer = &mut answer => return answer,
        () = context.cancelled() => orders.tell(&Order::Cancel).await,
    }
    tokio::select! {
        answer = &mut answer => return answer,
        () = context.over() => orders.tell(&Order::Stop).await,
    }
    answer.await
}

fn result(answer: Answer, body: Vec<u8>) -> Result<Payload, Fault> {
    match answer {
        Answer::Output(codec) => Ok(Payload { codec, bytes: body.into() }),
        Answer::BadArguments(error) => Err(Fault::BadArguments(error)),
        Answer::Panicked(message) => Err(Fault::Panicked(message)),
        Answer::Failed { message, retryable } => Err(Fault::Failed(match retryable {
            Retry::ByPolicy => TaskError::retry(message),
            Retry::AfterMillis(wait) => {
                TaskError::retry_after(Duration::from_millis(wait), message)
            }
            Retry::Never => TaskError::fatal(message),
            Retry::OutOfResources => TaskError::out_of_resources(message),
        })),
        // Nobody hears it: the attempt was over before.
        Answer::Stopped | Answer::Ready | Answer::Started => Err(Fault::Interrupted),
    }
}
