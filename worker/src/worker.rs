//! Building, starting and stopping a worker.

use std::sync::Arc;
use std::time::Duration;

use garenne_common::broker::{
    BrokerError, Consumer, ConsumerSpec, Health, Link, Publisher, QueueSource, Settler,
};
use garenne_common::bundling::DurationEstimates;
use garenne_common::config::Config;
use garenne_common::failpoints::Protection;
use garenne_common::service::lifeline::is_isolated;
use garenne_common::{InvalidName, Problem, ProcessHealth, QueueName, Task, TaskName};
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::aides::Aides;
use crate::attempt::Pipeline;
use crate::builtin;
use crate::cancels::Cancels;
use crate::ceilings::Ceilings;
use crate::command::CommandHandler;
use crate::context::Context;
use crate::doors::Doors;
use crate::faults;
use crate::file_root::FileRoot;
use crate::fitness::Fitness;
use crate::handler::{AsyncHandler, BlockingHandler, Handler, Registry};
use crate::inflight::Inflight;
use crate::intake::intake;
use crate::isolate::{self, Isolation, Warden};
use crate::lease::LeaseTerms;
use crate::line::Line;
use crate::outcome::TaskError;
use crate::register::Register;
use crate::settle::{Lane, SettleCore, SettleGauge, SettleTask, Signature};
use crate::state::WorkerState;

/// How long the last confirms may take after all tasks have ended.
const FLUSH_GRACE: Duration = Duration::from_secs(10);
/// How often a stopping worker says what it waits for, and how many tasks it names.
const SAY_AGAIN: Duration = Duration::from_secs(3);
const SHOWN_TASKS: usize = 5;
/// Quorum queues take no higher prefetch.
const MAX_PREFETCH: usize = 2_000;

/// Why a worker could not be built or started.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// A handler's task name breaks the rules.
    #[error(transparent)]
    Name(#[from] InvalidName),
    /// Two handlers, or a handler and a command, share a name.
    #[error("two handlers are registered for the task {0}; remove or rename one")]
    Duplicate(TaskName),
    /// There is nothing that this worker could run.
    #[error("the worker has no handler; register one, configure a command or switch builtins on")]
    NoHandler,
    /// The broker refuses in a way that waiting cannot mend.
    #[error(transparent)]
    Broker(#[from] BrokerError),
}

/// A worker, ready to start.
pub struct Worker {
    config: Config,
    registry: Registry,
    /// Whether this program may be started again to run suspects.
    isolating: bool,
    /// Ends the commands should this process be killed.
    warden: Arc<Warden>,
}

/// Collects handlers; made by [`Worker::builder`].
pub struct Builder {
    config: Config,
    registry: Registry,
    warden: Arc<Warden>,
    problem: Option<WorkerError>,
}

impl Worker {
    /// A builder with the command tasks and, unless switched off, the built-in tasks of `config`.
    pub fn builder(config: Config) -> Builder {
        let (registry, warden) = (Registry::default(), Arc::default());
        let mut builder = Builder { registry, warden, problem: None, config };
        for (name, command) in &builder.config.worker.commands.clone() {
            let handler = CommandHandler::new(command.clone(), Arc::clone(&builder.warden));
            builder.add(name.clone(), Arc::new(handler));
        }
        builder
    }

    /// From now on suspects run in child processes; to be called by a program that is a worker.
    ///
    /// A suspect is a task that was delivered before and never settled: its worker may have died of it.
    /// A child process is this very program, started again with the same arguments and environment. It
    /// does what the program does until it gets here, too; then it serves the worker that started it,
    /// until that is gone, and the answer is `None`: the program should end. Its standard input is its
    /// line to the worker, by which it knows what it is: leave it alone until here.
    ///
    /// Without this call no program is ever started again. Suspects then run in this process, and those
    /// that have been delivered often, alone.
    pub async fn isolate(mut self) -> Option<Self> {
        if is_isolated() {
            isolate::serve(self.registry).await;
            return None;
        }
        self.isolating = true;
        if !self.config.worker.commands.is_empty() {
            self.warden.enable();
        }
        Some(self)
    }

    /// Connects, declares its queues and begins to take tasks.
    ///
    /// While the broker is merely away it waits; it fails only for what a person must mend.
    pub async fn start(self) -> Result<Running, WorkerError> {
        let Self { config, registry, isolating, warden } = self;
        warden.begin().await;
        let worker = &config.worker;
        let identity = config.identity(worker.name.as_deref());
        let queues = worker.queues.iter().map(QueueName::as_str).collect::<Vec<_>>().join(",");
        let link = |what: &str| {
            Link::new(&config.broker, &format!("garenne-worker {identity} [{queues}] {what}"))
        };
        let (consume, publish) = (link("consume"), link("publish"));
        let names = registry.names();
        say_start(&config, &identity, &queues, &names);
        let topology = config.broker.topology();
        let publisher = Publisher::start(publish.clone(), topology.core(), &config.broker);
        let register = Arc::<Register>::default();
        let cancels = Arc::new(Cancels::new(Arc::clone(&register)));
        let aides = Aides::new(&config, &identity, publish);
        aides.listen(&config, &consume, &cancels).await;
        let consumers = consume_all(&config, &consume, &identity).await?;
        // It declares what the consumers do not; a conflict there is a person's to mend as well.
        publisher.ready().await?;
        let lanes = Arc::new(worker.queues.iter().cloned().map(Lane::new).collect::<Vec<_>>());
        let (settle, inbox) = mpsc::channel(1024);
        let inflight = Arc::<Inflight>::default();
        let signature = Arc::new(signature(&config, &identity));
        let settlers: Vec<_> = consumers.iter().map(Consumer::settler).collect();
        let (stop, abort) = (CancellationToken::new(), CancellationToken::new());
        let tasks = TaskTracker::new();
        let isolation = isolating.then(|| Isolation::new(worker.concurrency));
        if let Some(isolation) = &isolation {
            tasks.spawn(Arc::clone(isolation).sweep(abort.clone()));
        }
        let gauge = Arc::<SettleGauge>::default();
        tasks.spawn(
            SettleTask {
                inbox,
                core: SettleCore::new(Arc::clone(&lanes), Arc::clone(&inflight), &signature),
                publisher: publisher.clone(),
                settlers: settlers.clone(),
                gauge: Arc::clone(&gauge),
            }
            .run(),
        );
        let doors = Doors::new(worker.concurrency, isolation, worker.crash_budget);
        let seen = (Arc::clone(&register), Arc::clone(&doors.slots));
        let health = ProcessHealth::default();
        aides.beat(&config, names, seen, &health, &stop);
        let pipeline = Arc::new(Pipeline {
            fitness: Fitness::new(health.clone(), Arc::clone(&doors.slots)),
            registry,
            signature,
            lines: (0..lanes.len()).map(Line::new).collect(),
            lanes,
            inflight,
            doors,
            settle,
            gauge,
            pace: DurationEstimates::default(),
            splits: Semaphore::new(1),
            task_timeout: worker.task_timeout,
            kill_grace: worker.kill_grace,
            lease: LeaseTerms {
                term: worker.lease_term,
                patience: config.broker.consumer_timeout,
                link: Some(consume.clone()),
            },
            ceilings: Ceilings::of(worker),
            stop: stop.clone(),
            abort: abort.clone(),
            attempts: TaskTracker::new(),
            watchers: TaskTracker::new(),
            register,
            health,
            cancels,
            cancel_grace: worker.cancel_grace,
        });
        let intakes = TaskTracker::new();
        for (queue, consumer) in consumers.into_iter().enumerate() {
            intakes.spawn(intake(Arc::clone(&pipeline), queue, consumer));
        }
        intakes.close();
        tasks.close();
        aides.watch(Arc::clone(&pipeline), &publisher, &settlers);
        tracing::info!("ready");
        let grace = worker.grace;
        Ok(Running {
            pipeline,
            settlers,
            intakes,
            tasks,
            aides,
            publisher,
            consume,
            stop,
            abort,
            grace,
        })
    }
}

/// A consumer for each queue, in their order, all of them registered at the broker.
async fn consume_all(
    config: &Config,
    link: &Link,
    identity: &str,
) -> Result<Vec<Consumer>, WorkerError> {
    let consumer = |queue| Consumer::start(link.clone(), spec(config, queue, identity));
    let consumers: Vec<Consumer> = config.worker.queues.iter().map(consumer).collect();
    for consumer in &consumers {
        consumer.ready().await?;
    }
    Ok(consumers)
}

fn signature(config: &Config, identity: &str) -> Signature {
    Signature {
        topology: config.broker.topology(),
        max_body: config.worker.max_body,
        replies: config.reply_gate(),
        worker: Arc::from(identity),
    }
}

fn say_start(config: &Config, worker: &str, queues: &str, names: &[TaskName]) {
    let tasks = names.iter().map(TaskName::as_str).collect::<Vec<_>>().join(",");
    let (slots, namespace) = (config.worker.concurrency, &config.broker.namespace);
    tracing::info!(worker, queues, slots, %namespace, tasks, "starting");
}

/// Says again and again what a stopping worker waits for; never completes.
async fn say_what_runs(register: &Register, grace: Duration) {
    let begun = tokio::time::Instant::now();
    loop {
        tokio::time::sleep(SAY_AGAIN).await;
        let (tasks, oldest) = register.oldest(SHOWN_TASKS);
        let left = Duration::from_secs(grace.saturating_sub(begun.elapsed()).as_secs());
        tracing::info!(tasks, oldest = oldest.join(", "), ?left, "still waiting for running tasks");
    }
}

impl Builder {
    /// Runs tasks of type `T` with an async function.
    pub fn register<T, F, R>(mut self, function: F) -> Self
    where
        T: Task,
        F: Fn(Context, T) -> R + Send + Sync + 'static,
        R: Future<Output = Result<T::Output, TaskError>> + Send + 'static,
    {
        self.add_typed::<T>(Arc::new(AsyncHandler::<T, F>::new(function)));
        self
    }

    /// Runs tasks of type `T` with a function that computes or blocks, on threads of its own.
    pub fn register_blocking<T, F>(mut self, function: F) -> Self
    where
        T: Task,
        F: Fn(&Context, T) -> Result<T::Output, TaskError> + Send + Sync + 'static,
    {
        self.add_typed::<T>(Arc::new(BlockingHandler::<T, F>::new(function)));
        self
    }

    /// Checks what was collected.
    pub fn build(mut self) -> Result<Worker, WorkerError> {
        if self.config.worker.builtins {
            // What the user registered under such a name stays: it was meant.
            for (name, handler) in
                builtin::handlers(FileRoot::new(self.config.worker.file_root.clone()))?
            {
                if !self.registry.contains(&name) {
                    self.add(name, handler);
                }
            }
        }
        if self.config.worker.builtins && self.config.worker.faults {
            let (name, handler) = faults::handler()?;
            self.add(name, handler);
        }
        match self.problem {
            Some(problem) => Err(problem),
            None if self.registry.names().is_empty() => Err(WorkerError::NoHandler),
            None => {
                let Self { config, registry, warden, problem: _ } = self;
                Ok(Worker { config, registry, isolating: false, warden })
            }
        }
    }

    fn add_typed<T: Task>(&mut self, handler: Arc<dyn Handler>) {
        match TaskName::new(T::NAME) {
            Ok(name) => self.add(name, handler),
            Err(error) => self.problem = Some(error.into()),
        }
    }

    fn add(&mut self, name: TaskName, handler: Arc<dyn Handler>) {
        if !self.registry.add(name.clone(), handler) {
            self.problem = Some(WorkerError::Duplicate(name));
        }
    }
}

fn spec(config: &Config, queue: &QueueName, identity: &str) -> ConsumerSpec {
    let (topology, worker) = (config.broker.topology(), &config.worker);
    // The slots are split over the queues, since prefetch counts per consumer.
    let share = worker.prefetch.div_ceil(worker.queues.len());
    ConsumerSpec {
        declarations: topology.task_intake(queue),
        queue: QueueSource::Named(topology.task_queue(queue)),
        prefetch: u16::try_from(share.clamp(1, MAX_PREFETCH)).unwrap_or(u16::MAX),
        tag: format!("garenne-worker {identity} {queue}"),
        no_ack: false,
    }
}

/// A worker that runs. [`drain`](Self::drain) is the way to stop it; dropped, it goes on unattended.
pub struct Running {
    pipeline: Arc<Pipeline>,
    settlers: Vec<Settler>,
    intakes: TaskTracker,
    tasks: TaskTracker,
    aides: Aides,
    publisher: Publisher,
    consume: Link,
    stop: CancellationToken,
    abort: CancellationToken,
    grace: Duration,
}

impl Running {
    /// What cuts the grace period short when cancelled, for a second signal.
    pub fn abort_token(&self) -> CancellationToken {
        self.abort.clone()
    }

    /// What reports the state of this worker, also while it drains.
    pub fn state(&self) -> WorkerState {
        WorkerState {
            pipeline: Arc::downgrade(&self.pipeline),
            settlers: self.settlers.clone(),
            publisher: self.publisher.clone(),
        }
    }

    /// Tasks that are running now.
    pub fn running_tasks(&self) -> usize {
        self.pipeline.inflight.len()
    }

    /// What keeps the worker from doing its work; empty if it is healthy.
    pub fn problems(&self) -> Vec<Problem> {
        self.pipeline.health.problems()
    }

    /// Whether tasks can arrive, queue by queue.
    pub fn health(&self) -> Vec<(QueueName, Health)> {
        let lanes = self.pipeline.lanes.iter().zip(&self.settlers);
        lanes.map(|(lane, settler)| (lane.queue.clone(), settler.health())).collect()
    }

    /// Replies that were not sent because their tasks name queues that take none.
    pub fn refused_replies(&self) -> u64 {
        self.pipeline.signature.replies.refused()
    }

    /// Slots that are lost to blocking handlers that go on although their attempts have ended.
    pub fn lost_slots(&self) -> usize {
        self.pipeline.doors.slots.lost()
    }

    /// Stops without losing anything. The order matters:
    ///
    /// 1. Intake ends: the broker is told to send no more, and once it has stopped, what waits here goes
    ///    back to it, as far as there is room to publish within the grace period.
    /// 2. Running tasks may finish within the grace period; every few seconds the log names them.
    /// 3. Those that did not are interrupted and go back to their queue without costing an attempt,
    ///    and so does the rest of a bundle that a slot was opening while intake ended.
    /// 4. The last successors are confirmed and the last deliveries acknowledged.
    /// 5. The connections close; only now may the broker take back what is still unsettled.
    pub async fn drain(self) {
        let Self {
            pipeline,
            settlers: _,
            intakes,
            tasks,
            aides,
            publisher,
            consume,
            stop,
            abort,
            grace,
        } = self;
        stop.cancel();
        // Handing back waits for room to publish; what finds none comes again by itself.
        tokio::select! {
            () = intakes.wait() => {}
            () = tokio::time::sleep(grace) => tracing::warn!("not all could be handed back in time"),
            () = abort.cancelled() => {}
        }
        pipeline.attempts.close();
        let running = pipeline.inflight.len();
        tracing::info!(running, ?grace, "draining");
        tokio::select! {
            () = pipeline.attempts.wait() => {}
            () = tokio::time::sleep(grace) => {
                let (tasks, oldest) = pipeline.register.oldest(SHOWN_TASKS);
                tracing::warn!(tasks, oldest = oldest.join(", "), "the grace period is over; handing back");
            }
            () = abort.cancelled() => tracing::warn!("told not to wait"),
            () = say_what_runs(&pipeline.register, grace) => {}
        }
        abort.cancel();
        if tokio::time::timeout(FLUSH_GRACE, pipeline.attempts.wait()).await.is_err() {
            tracing::warn!("some tasks found no room to be settled; they will be delivered again");
        }
        // What a slot was just opening when intake ended.
        let leftovers = async {
            for queue in 0..pipeline.lanes.len() {
                pipeline.hand_back_line(queue).await;
            }
        };
        if tokio::time::timeout(FLUSH_GRACE, leftovers).await.is_err() {
            tracing::warn!("not all could be handed back in time");
        }
        pipeline.watchers.close();
        pipeline.watchers.wait().await;
        aides.end().await;
        // The last sender goes, so the settling task ends when everything is confirmed.
        drop(pipeline);
        if !Protection::FlushBeforeExit.is_enabled() {
            return;
        }
        if tokio::time::timeout(FLUSH_GRACE, tasks.wait()).await.is_err() {
            tracing::warn!("RabbitMQ did not confirm everything; the rest will be delivered again");
        }
        publisher.close(FLUSH_GRACE).await;
        consume.close().await;
        tracing::info!("stopped");
    }
}
