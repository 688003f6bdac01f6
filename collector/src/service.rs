//! The collector as a whole: what it starts, and in which order it stops.

use std::sync::Arc;
use std::time::Duration;

use garenne_common::broker::{
    Admin, BrokerError, Consumer, ConsumerSpec, Link, Outgoing, QueueSource, Settler,
};
use garenne_common::config::Config;
use garenne_common::topology::Topology;
use garenne_common::wire::Notice;
use garenne_common::{Problem, ProcessHealth, VERSION};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::control::deadlines::Deadlines;
use crate::control::heartbeat::HeartbeatTask;
use crate::control::peers::PeerWatch;
use crate::control::release::{HEARTBEATS_BUFFER, Releaser};
use crate::control::retention::Retention;
use crate::control::state::CollectorState;
use crate::control::topology_reconciler::TopologyReconciler;
use crate::control::watchdog::Watchdog;
use crate::ingest::unrouted_replies::{UnroutedReplies, send_replies};
use crate::ingest::{
    Committer, DEAD_PREFETCH, Ingest, IngestProgress, RESULTS_PREFETCH, Sources, UNROUTED_PREFETCH,
};
use crate::outbox::Relay;
use crate::outbox::notices::{NoticeCopies, Notices};
use crate::outbox::publishers::Publishers;
use crate::outbox::resends::Resends;
use crate::query::dead_letters::DeadLetterQueries;
use crate::query::{QUERIES_PREFETCH, QueryServer};
use crate::rules::aggregate::Rules;
use crate::store::{SqliteStore, StoreError};

/// How long a stopping collector waits for the last confirms.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// A running collector. Stop it with [`stop`](Self::stop); dropping it aborts its tasks.
pub struct Collector {
    store: SqliteStore,
    progress: Arc<IngestProgress>,
    settlers: Vec<(&'static str, Settler)>,
    publishers: Publishers,
    consuming: Link,
    health: ProcessHealth,
    /// The tasks that receive and commit results.
    pipeline: JoinSet<()>,
    /// All other tasks.
    background: JoinSet<()>,
    stop_taking: CancellationToken,
    stop_all: CancellationToken,
}

/// Why a collector could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The store cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The broker refuses permanently.
    #[error(transparent)]
    Broker(#[from] BrokerError),
}

/// What several tasks of a collector share.
struct Shared {
    topology: Topology,
    /// Name of the collector.
    name: String,
    replies: UnroutedReplies,
    signals: Signals,
}

/// Wake tasks before their next poll of the store.
#[derive(Default)]
struct Signals {
    /// Notices have been added to the outbox.
    outbox_filled: Arc<Notify>,
    /// Tasks to publish again have been added.
    resends_filled: Arc<Notify>,
    /// Tasks have been cancelled.
    cancelled: Arc<Notify>,
}

impl Collector {
    /// Opens the store, connects, and returns when all queues are being consumed.
    ///
    /// Waits while the broker cannot be reached. Each published notice is also sent to `copies`. A slow
    /// reader delays notices; one that does not read for ten seconds misses some.
    ///
    /// # Errors
    ///
    /// If the store cannot be opened, or the broker refuses permanently.
    pub async fn start(
        config: &Config,
        copies: Option<mpsc::Sender<Notice>>,
    ) -> Result<Self, StartError> {
        let name = config.collector.name.clone().unwrap_or_else(default_name);
        log_start(config, &name);
        let store = open_store(config).await?;
        let topology = config.broker.topology();
        let consuming = Link::new(&config.broker, &format!("garenne-collector {name} consume"));
        let (sources, queries) = consume(&consuming, &topology).await?;
        let mut collector = Self {
            store,
            progress: Arc::default(),
            settlers: sources.settlers(&queries),
            publishers: Publishers::start(&config.broker, &name),
            consuming,
            health: ProcessHealth::default(),
            pipeline: JoinSet::new(),
            background: JoinSet::new(),
            stop_taking: CancellationToken::new(),
            stop_all: CancellationToken::new(),
        };
        let (replies, outgoing) = UnroutedReplies::channel(config.reply_gate());
        let shared = Shared { topology, name, replies, signals: Signals::default() };
        collector.spawn_unrouted_replies(outgoing);
        collector.spawn_outboxes(&shared, copies);
        collector.spawn_deadlines(&shared, &sources);
        collector.spawn_parked(&shared);
        let standby = collector.spawn_control(config, &shared, &sources, &queries);
        collector.spawn_queries(&shared, queries);
        collector.spawn_maintenance(config);
        collector.spawn_ingest(config, &shared, sources, standby);
        tracing::info!("collecting");
        Ok(collector)
    }

    /// The path of results: gathers groups, and commits them.
    fn spawn_ingest(
        &mut self,
        config: &Config,
        shared: &Shared,
        sources: Sources,
        standby: watch::Receiver<bool>,
    ) {
        // One group may wait: the next one is gathered while another one is committed.
        let (to_committer, gathered) = mpsc::channel(1);
        let ingest = Ingest {
            sources,
            progress: Arc::clone(&self.progress),
            group_size: config.collector.group_size,
            linger: config.collector.group_linger,
            by: shared.name.clone(),
            stop: self.stop_taking.clone(),
            gathered: to_committer,
        };
        let committer = Committer {
            store: self.store.clone(),
            gathered,
            progress: Arc::clone(&self.progress),
            replies: shared.replies.clone(),
            outbox_filled: Arc::clone(&shared.signals.outbox_filled),
            health: self.health.clone(),
            standby,
            stop: self.stop_taking.clone(),
        };
        self.pipeline.spawn(ingest.run());
        self.pipeline.spawn(committer.run());
    }

    fn spawn_unrouted_replies(&mut self, outgoing: mpsc::Receiver<Outgoing>) {
        let (publisher, stop) = (self.publishers.responses.clone(), self.stop_all.clone());
        self.background.spawn(send_replies(outgoing, publisher, stop));
    }

    /// Publishes the entries of the outboxes.
    fn spawn_outboxes(&mut self, shared: &Shared, copies: Option<mpsc::Sender<Notice>>) {
        let notices = Relay {
            outbox: Notices {
                store: self.store.clone(),
                exchange: shared.topology.notices_exchange(),
                copies: copies.map(NoticeCopies::new),
            },
            publisher: self.publishers.notices.clone(),
            filled: Arc::clone(&shared.signals.outbox_filled),
            stop: self.stop_all.clone(),
        };
        let resends = Relay {
            outbox: Resends { store: self.store.clone() },
            publisher: self.publishers.tasks.clone(),
            filled: Arc::clone(&shared.signals.resends_filled),
            stop: self.stop_all.clone(),
        };
        self.background.spawn(notices.run());
        self.background.spawn(resends.run());
    }

    /// Responds to queries.
    fn spawn_queries(&mut self, shared: &Shared, queries: Consumer) {
        let Signals { outbox_filled, resends_filled, cancelled } = &shared.signals;
        let dead_letters = DeadLetterQueries {
            store: self.store.clone(),
            tasks_exchange: shared.topology.tasks_exchange(),
            outbox_filled: Arc::clone(outbox_filled),
            resends_filled: Arc::clone(resends_filled),
            replies: shared.replies.clone(),
        };
        let server = QueryServer {
            store: self.store.clone(),
            dead_letters,
            queries,
            publisher: self.publishers.responses.clone(),
            gate: shared.replies.gate.clone(),
            control: shared.topology.control(),
            cancelled: Arc::clone(cancelled),
            stop: self.stop_all.clone(),
        };
        self.background.spawn(server.run());
    }

    /// Releases parked tasks.
    fn spawn_parked(&mut self, shared: &Shared) {
        let Signals { outbox_filled, resends_filled, cancelled } = &shared.signals;
        let tag = "collector heartbeats";
        let releaser = Releaser {
            store: self.store.clone(),
            heartbeats: heartbeats(&self.consuming, &shared.topology, &shared.name, tag),
            tasks_exchange: shared.topology.tasks_exchange(),
            resends_filled: Arc::clone(resends_filled),
            outbox_filled: Arc::clone(outbox_filled),
            replies: shared.replies.clone(),
            cancelled: Arc::clone(cancelled),
            stop: self.stop_all.clone(),
        };
        self.background.spawn(releaser.run());
    }

    /// Abandons batches, and publishes tasks with lapsed leases again.
    fn spawn_deadlines(&mut self, shared: &Shared, sources: &Sources) {
        let deadlines = Deadlines {
            store: self.store.clone(),
            admin: Admin::new(self.consuming.clone()),
            publisher: self.publishers.responses.clone(),
            topology: shared.topology.clone(),
            consuming: sources.results.queue(),
            progress: Arc::clone(&self.progress),
            outbox_filled: Arc::clone(&shared.signals.outbox_filled),
            resends_filled: Arc::clone(&shared.signals.resends_filled),
            stop: self.stop_all.clone(),
        };
        self.background.spawn(deadlines.run());
    }

    /// Publishes heartbeats, receives those of other collectors, and detects stalls. Returns whether the
    /// collector is in standby.
    fn spawn_control(
        &mut self,
        config: &Config,
        shared: &Shared,
        sources: &Sources,
        queries: &Consumer,
    ) -> watch::Receiver<bool> {
        let (topology, new_peer) = (config.broker.topology(), Arc::new(Notify::new()));
        let (standby, is_standby) = watch::channel(false);
        let Sources { results, dead, unrouted } = sources;
        let peers = PeerWatch {
            own: self.store.identity(),
            heartbeats: heartbeats(&self.consuming, &topology, &shared.name, "collector peers"),
            consumers: [results, dead, unrouted, queries].map(Consumer::pauser).into(),
            standby,
            new_peer: Arc::clone(&new_peer),
            health: self.health.clone(),
            stop: self.stop_all.clone(),
        };
        let heartbeat = HeartbeatTask {
            publisher: self.publishers.heartbeats.clone(),
            exchange: topology.heartbeats(),
            collector: shared.name.clone(),
            store: self.store.identity(),
            progress: Arc::clone(&self.progress),
            health: self.health.clone(),
            standby: is_standby.clone(),
            new_peer,
            stop: self.stop_all.clone(),
        };
        let watchdog = Watchdog {
            store: self.store.clone(),
            progress: Arc::clone(&self.progress),
            health: self.health.clone(),
            stop: self.stop_all.clone(),
        };
        self.background.spawn(watchdog.run());
        self.background.spawn(peers.run());
        self.background.spawn(heartbeat.run());
        is_standby
    }

    /// Restores broker objects, and deletes old records.
    fn spawn_maintenance(&mut self, config: &Config) {
        let reconciler = TopologyReconciler {
            admin: Admin::new(self.consuming.clone()),
            wanted: config.broker.topology().core(),
            interval: 3 * config.broker.heartbeat,
            stop: self.stop_all.clone(),
        };
        let retention = Retention {
            store: self.store.clone(),
            keep: config.collector.retention,
            last_commit: self.store.last_commit(),
            stop: self.stop_all.clone(),
        };
        self.background.spawn(reconciler.run());
        self.background.spawn(retention.run());
    }

    /// What keeps this collector from doing its work; empty if it is healthy.
    pub fn problems(&self) -> Vec<Problem> {
        self.health.problems()
    }

    /// Waits until a task of the collector ends, which does not happen unless it stops or a task panics. The
    /// process should be restarted then.
    pub async fn broken(&mut self) {
        tokio::select! {
            Some(_) = self.pipeline.join_next() => {}
            Some(_) = self.background.join_next() => {}
        }
    }

    /// Logs the state of this collector on request, also while it stops.
    pub fn state(&self) -> CollectorState {
        CollectorState {
            health: self.health.clone(),
            store: self.store.downgrade(),
            publishers: self.publishers.clone(),
            progress: Arc::clone(&self.progress),
            settlers: self.settlers.clone(),
        }
    }

    /// Stops in order and loses nothing: unacknowledged messages are redelivered.
    pub async fn stop(mut self) {
        // 1. Receive no more, and commit the groups that are gathered. If the store fails, its group stays in
        //    the broker.
        self.stop_taking.cancel();
        join_all(&mut self.pipeline).await;
        // 2. Publish the entries of the outboxes within a time limit, and end everything else.
        self.stop_all.cancel();
        join_all(&mut self.background).await;
        // 3. Responses may be unconfirmed.
        self.publishers.close(CLOSE_TIMEOUT).await;
        // 4. This returns unprocessed deliveries to the broker.
        self.consuming.close().await;
        // 5. Dropping the last handle joins the threads of the store, which may write a checkpoint.
        let store = self.store;
        if tokio::task::spawn_blocking(move || drop(store)).await.is_err() {
            tracing::error!("the store did not close in order");
        }
        tracing::info!("stopped");
    }
}

async fn join_all(tasks: &mut JoinSet<()>) {
    while let Some(ended) = tasks.join_next().await {
        if let Err(error) = ended {
            tracing::error!("a task of the collector failed: {error}");
        }
    }
}

async fn open_store(config: &Config) -> Result<SqliteStore, StoreError> {
    let path = config.collector.store.clone();
    let rules = Rules {
        batch_deadline: config.producer.batch_deadline,
        task_notices: config.collector.task_notices,
    };
    let opened = tokio::task::spawn_blocking(move || SqliteStore::open(&path, rules)).await;
    opened.unwrap_or(Err(StoreError::Closed))
}

/// Starts the four consumers. The first one declares everything, the others only their queues, so that each
/// can continue by itself when a broker returns without its data.
async fn consume(link: &Link, topology: &Topology) -> Result<(Sources, Consumer), BrokerError> {
    // Reports a wrong password at once. The consumers wait for a broker that cannot be reached.
    if let Err(error) = link.open().await
        && !error.is_transient()
    {
        return Err(error);
    }
    let start = |queue: String, what: &str, prefetch, declarations| {
        let queue = QueueSource::Named(queue);
        let tag = format!("collector {what}");
        let spec = ConsumerSpec { declarations, queue, prefetch, tag, no_ack: false };
        Consumer::start(link.clone(), spec)
    };
    let results = start(topology.results(), "results", RESULTS_PREFETCH, topology.core());
    results.ready().await?;
    let other = |queue: String, what, prefetch| {
        let declarations = topology.named(&queue);
        start(queue, what, prefetch, declarations)
    };
    let dead = other(topology.dead(), "dead letters", DEAD_PREFETCH);
    let unrouted = other(topology.unrouted(), "unrouted", UNROUTED_PREFETCH);
    let queries = other(topology.queries(), "queries", QUERIES_PREFETCH);
    for consumer in [&dead, &unrouted, &queries] {
        consumer.ready().await?;
    }
    Ok((Sources { results, dead, unrouted }, queries))
}

/// Consumes heartbeats from an exclusive queue, since only current ones are of interest.
fn heartbeats(link: &Link, topology: &Topology, name: &str, tag: &str) -> Consumer {
    let bindings = vec![(topology.heartbeats(), String::new())];
    let declarations = topology.named(&topology.heartbeats());
    // The name of a queue has at most 255 bytes.
    let (owner, names): (String, _) = (name.chars().take(40).collect(), topology.clone());
    let name = Box::new(move || names.reply_queue(&owner));
    let queue = QueueSource::Exclusive { name, bindings };
    let (tag, prefetch) = (tag.to_owned(), HEARTBEATS_BUFFER);
    Consumer::start(link.clone(), ConsumerSpec { declarations, queue, prefetch, tag, no_ack: true })
}

fn log_start(config: &Config, name: &str) {
    let brokers: Vec<_> = config.broker.urls.iter().map(ToString::to_string).collect();
    tracing::info!(
        version = VERSION,
        name,
        namespace = %config.broker.namespace,
        store = %config.collector.store.display(),
        broker = brokers.join(","),
        "starting"
    );
}

fn default_name() -> String {
    let host = hostname::get().map(|host| host.to_string_lossy().into_owned());
    format!("{}:{}", host.unwrap_or_else(|_| "unknown".to_owned()), std::process::id())
}
