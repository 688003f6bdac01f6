//! Starting a worker: connects, declares, and starts the tasks of the runtime that it consists of.

use std::sync::Arc;

use garenne_common::broker::{Consumer, ConsumerSpec, Link, Publisher, QueueSource};
use garenne_common::bundling::DurationEstimates;
use garenne_common::config::Config;
use garenne_common::{ProcessHealth, QueueName, TaskName};
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::builder::{Worker, WorkerError};
use crate::control::Control;
use crate::control::cancel_requests::CancelRequests;
use crate::drain::Running;
use crate::handlers::Registry;
use crate::intake::intake;
use crate::intake::queue::{QueueIndex, ServedQueue};
use crate::isolate::Isolation;
use crate::run::Pipeline;
use crate::run::concurrency::Concurrency;
use crate::run::gate::Gate;
use crate::run::known_attempts::KnownAttempts;
use crate::run::lease::LeaseTerms;
use crate::run::retry_limits::RetryLimits;
use crate::run::running_tasks::RunningTasks;
use crate::run::start_backoff::StartBackoff;
use crate::settle::{SettleCore, SettleProgress, SettleTask, Settlement, SettlementBuilder};

/// Maximum prefetch of a quorum queue.
const MAX_PREFETCH: usize = 2_000;
/// Number of settlements that wait for the settlement task.
const SETTLEMENTS: usize = 1024;

impl Worker {
    /// Connects, declares its queues and starts to run tasks.
    ///
    /// Waits while the broker cannot be reached.
    ///
    /// # Errors
    ///
    /// If the broker refuses permanently: wrong credentials, missing permissions, or objects that exist
    /// with other arguments.
    pub async fn start(self) -> Result<Running, WorkerError> {
        let Self { config, registry, isolating, warden } = self;
        warden.prepare().await;
        let identity = config.identity(config.worker.name.as_deref());
        log_start(&config, &identity, &registry);
        let (consume, publish) =
            (link(&config, &identity, "consume"), link(&config, &identity, "publish"));
        let publisher =
            Publisher::start(publish.clone(), config.broker.topology().core(), &config.broker);
        let running = Arc::<RunningTasks>::default();
        let cancel_requests = Arc::new(CancelRequests::new(Arc::clone(&running)));
        let control = Control::new(&config, &identity, publish);
        control.receive_cancel_requests(&config, &consume, &cancel_requests).await;
        let consumers = start_consumers(&config, &consume, &identity).await?;
        // The publisher declares the objects that consumers do not; a conflict there is permanent as well.
        publisher.ready().await?;
        let names = registry.names();
        let shared = Shared { running, cancel_requests, registry, isolating };
        let (pipeline, inbox) = pipeline(&config, &identity, &consume, &consumers, shared);
        let tasks = spawn_tasks(&pipeline, inbox, &publisher);
        let concurrency = Arc::clone(&pipeline.gate.concurrency);
        let (running, health) = (Arc::clone(&pipeline.running), &pipeline.health);
        control.publish_heartbeats(&config, names, concurrency, running, health, &pipeline.stop);
        let intakes = spawn_intakes(&pipeline, consumers);
        control.watch(Arc::clone(&pipeline), &publisher);
        tracing::info!("ready");
        let grace = config.worker.grace;
        Ok(Running { pipeline, intakes, tasks, control, publisher, consume, grace })
    }
}

/// What the pipeline shares with other parts of the worker.
struct Shared {
    running: Arc<RunningTasks>,
    cancel_requests: Arc<CancelRequests>,
    registry: Registry,
    isolating: bool,
}

/// The pipeline, and the inbox of the settlement task.
fn pipeline(
    config: &Config,
    identity: &str,
    consume: &Link,
    consumers: &[Consumer],
    shared: Shared,
) -> (Arc<Pipeline>, mpsc::Receiver<Settlement>) {
    let Shared { running, cancel_requests, registry, isolating } = shared;
    let worker = &config.worker;
    let concurrency = Arc::new(Concurrency::new(worker.concurrency));
    let isolation = isolating.then(|| Isolation::new(worker.concurrency));
    let health = ProcessHealth::default();
    let (settle, inbox) = mpsc::channel(SETTLEMENTS);
    let pipeline = Pipeline {
        queues: served_queues(config, consumers),
        registry,
        settlements: Arc::new(settlement_builder(config, identity)),
        known: Arc::<KnownAttempts>::default(),
        gate: Gate::new(Arc::clone(&concurrency), isolation, worker.crash_budget),
        settle,
        progress: Arc::<SettleProgress>::default(),
        estimates: DurationEstimates::default(),
        splits: Semaphore::new(1),
        task_timeout: worker.task_timeout,
        kill_grace: worker.kill_grace,
        cancel_grace: worker.cancel_grace,
        lease: LeaseTerms {
            term: worker.lease_term,
            consumer_timeout: config.broker.consumer_timeout,
            link: Some(consume.clone()),
        },
        retry_limits: RetryLimits::of(worker),
        stop: CancellationToken::new(),
        abort: CancellationToken::new(),
        attempts: TaskTracker::new(),
        watchers: TaskTracker::new(),
        running,
        backoff: StartBackoff::new(health.clone(), concurrency),
        health,
        cancel_requests,
    };
    (Arc::new(pipeline), inbox)
}

fn served_queues(config: &Config, consumers: &[Consumer]) -> Arc<[ServedQueue]> {
    let names = config.worker.queues.iter().cloned();
    let queues = names.zip(consumers).enumerate().map(|(index, (name, consumer))| {
        ServedQueue::new(QueueIndex(index), name, consumer.settler())
    });
    queues.collect()
}

fn settlement_builder(config: &Config, identity: &str) -> SettlementBuilder {
    SettlementBuilder {
        topology: config.broker.topology(),
        max_body: config.worker.max_body,
        replies: config.reply_gate(),
        worker: Arc::from(identity),
    }
}

/// Starts the settlement task and the maintenance of child processes.
fn spawn_tasks(
    pipeline: &Arc<Pipeline>,
    inbox: mpsc::Receiver<Settlement>,
    publisher: &Publisher,
) -> TaskTracker {
    let tasks = TaskTracker::new();
    let unacked = pipeline.queues.iter().map(|queue| Arc::clone(&queue.unacked)).collect();
    let settle = SettleTask {
        inbox,
        core: SettleCore::new(unacked, Arc::clone(&pipeline.known), &pipeline.settlements),
        publisher: publisher.clone(),
        queues: Arc::clone(&pipeline.queues),
        progress: Arc::clone(&pipeline.progress),
    };
    tasks.spawn(settle.run());
    if let Some(isolation) = pipeline.gate.isolation() {
        tasks.spawn(Arc::clone(isolation).sweep(pipeline.abort.clone()));
    }
    tasks.close();
    tasks
}

fn spawn_intakes(pipeline: &Arc<Pipeline>, consumers: Vec<Consumer>) -> TaskTracker {
    let intakes = TaskTracker::new();
    for (index, consumer) in consumers.into_iter().enumerate() {
        intakes.spawn(intake(Arc::clone(pipeline), QueueIndex(index), consumer));
    }
    intakes.close();
    intakes
}

/// Starts a consumer for each queue, in their order, and waits until the broker has accepted them.
async fn start_consumers(
    config: &Config,
    link: &Link,
    identity: &str,
) -> Result<Vec<Consumer>, WorkerError> {
    let consumer = |queue| Consumer::start(link.clone(), consumer_spec(config, queue, identity));
    let consumers: Vec<Consumer> = config.worker.queues.iter().map(consumer).collect();
    for consumer in &consumers {
        consumer.ready().await?;
    }
    Ok(consumers)
}

fn consumer_spec(config: &Config, queue: &QueueName, identity: &str) -> ConsumerSpec {
    let (topology, worker) = (config.broker.topology(), &config.worker);
    // Split over the queues, since the broker applies the prefetch to each consumer.
    let share = worker.prefetch.div_ceil(worker.queues.len());
    ConsumerSpec {
        declarations: topology.task_intake(queue),
        queue: QueueSource::Named(topology.task_queue(queue)),
        prefetch: u16::try_from(share.clamp(1, MAX_PREFETCH)).unwrap_or(u16::MAX),
        tag: format!("garenne-worker {identity} {queue}"),
        no_ack: false,
    }
}

/// A connection; the management UI shows its name.
fn link(config: &Config, identity: &str, purpose: &str) -> Link {
    let queues = queue_list(config);
    Link::new(&config.broker, &format!("garenne-worker {identity} [{queues}] {purpose}"))
}

fn queue_list(config: &Config) -> String {
    config.worker.queues.iter().map(QueueName::as_str).collect::<Vec<_>>().join(",")
}

fn log_start(config: &Config, worker: &str, registry: &Registry) {
    let names = registry.names();
    let tasks = names.iter().map(TaskName::as_str).collect::<Vec<_>>().join(",");
    let (concurrency, namespace) = (config.worker.concurrency, &config.broker.namespace);
    let queues = queue_list(config);
    tracing::info!(worker, queues, concurrency, %namespace, tasks, "starting");
}
