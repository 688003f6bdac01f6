//! A collector as a whole: what is started, in which order it stops, and what it owns.

use std::sync::Arc;
use std::time::Duration;

use garenne_common::broker::{
    Admin, BrokerError, Consumer, ConsumerSpec, Link, Pauser, QueueSource, Settler,
};
use garenne_common::config::Config;
use garenne_common::topology::Topology;
use garenne_common::wire::Notice;
use garenne_common::{Problem, ProcessHealth, VERSION};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::aggregate::Rules;
use crate::answers::{Answers, QUERIES_PREFETCH};
use crate::deadlines::Deadlines;
use crate::heartbeat::Beat;
use crate::keeper::Keeper;
use crate::letters::Letters;
use crate::notices::{Copies, Notices};
use crate::outlets::Outlets;
use crate::peers::Neighbours;
use crate::pipeline::{
    Committer, DEAD_PREFETCH, Intake, Progress, RESULTS_PREFETCH, Sources, UNROUTED_PREFETCH,
};
use crate::relay::Relay;
use crate::release::{HEARTBEATS_BUFFER, Releaser};
use crate::replies::{Replies, send_replies};
use crate::resends::Resends;
use crate::retention::Retention;
use crate::state::CollectorState;
use crate::store::{SqliteStore, StoreError};
use crate::watchdog::Watchdog;

/// How long a stopping collector waits for the broker's last confirms.
const CLOSING: Duration = Duration::from_secs(2);

/// A running collector. Dropping it ends it without order; [`stop`](Self::stop) loses no time later.
pub struct Collector {
    store: SqliteStore,
    progress: Arc<Progress>,
    settlers: Vec<(&'static str, Settler)>,
    outlets: Outlets,
    consuming: Link,
    health: ProcessHealth,
    /// Intake and committing: everything that takes deliveries.
    pipeline: JoinSet<()>,
    /// Everything else.
    background: JoinSet<()>,
    stop_taking: CancellationToken,
    stop_all: CancellationToken,
}

/// A collector that cannot start without a change by a person.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The store cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The broker refuses, and will go on refusing.
    #[error(transparent)]
    Broker(#[from] BrokerError),
}

impl Collector {
    /// Opens the store, connects, and returns when all queues are being consumed.
    ///
    /// A broker that is merely down is waited for, however long it takes. Every published notice is
    /// also sent to `copies`, if there is one; a slow reader slows the notices
    /// down, and one that takes none for ten seconds misses some.
    pub async fn start(
        config: &Config,
        copies: Option<mpsc::Sender<Notice>>,
    ) -> Result<Self, StartError> {
        let name = config.collector.name.clone().unwrap_or_else(default_name);
        log_start(config, &name);
        let store = open_store(config).await?;
        let topology = config.broker.topology();
        let consuming = Link::new(&config.broker, &format!("garenne-collector {name} consume"));
        let (sources, questions) = consume(&consuming, &topology).await?;

        let mut collector = Self {
            store,
            progress: Arc::default(),
            settlers: sources.settlers(&questions),
            outlets: Outlets::start(&config.broker, &name),
            consuming,
            health: ProcessHealth::default(),
            pipeline: JoinSet::new(),
            background: JoinSet::new(),
            stop_taking: CancellationToken::new(),
            stop_all: CancellationToken::new(),
        };
        collector.spawn(config, &name, (sources, questions), copies);
        tracing::info!("collecting");
        Ok(collector)
    }

    fn spawn(
        &mut self,
        config: &Config,
        by: &str,
        (sources, questions): (Sources, Consumer),
        copies: Option<mpsc::Sender<Notice>>,
    ) {
        let topology = config.broker.topology();
        let [outbox_filled, resends_filled, cancelled] = [(); 3].map(|()| Arc::new(Notify::new()));
        let (replies, outgoing) = Replies::channel(config.reply_gate());
        // One parcel may wait: the next group gathers while one commits.
        let (to_committer, parcels) = mpsc::channel(1);
        let reading = sources.results.queue();
        let consumers = vec![
            sources.results.pauser(),
            sources.dead.pauser(),
            sources.unrouted.pauser(),
            questions.pauser(),
        ];
        let (standby, is_standby) = watch::channel(false);

        let progress = Arc::clone(&self.progress);
        let intake = Intake {
            sources,
            progress: Arc::clone(&progress),
            group_size: config.collector.group_size,
            linger: config.collector.group_linger,
            by: by.to_owned(),
            stop: self.stop_taking.clone(),
            parcels: to_committer,
        };
        let committer = Committer {
            store: self.store.clone(),
            parcels,
            progress: Arc::clone(&progress),
            replies: replies.clone(),
            outbox_filled: Arc::clone(&outbox_filled),
            health: self.health.clone(),
            standby: is_standby.clone(),
            stop: self.stop_taking.clone(),
        };
        self.pipeline.spawn(intake.run());
        self.pipeline.spawn(committer.run());

        self.relay(config, copies, (&outbox_filled, &resends_filled));
        self.watch(config, by, &progress, (consumers, standby, is_standby));
        self.keep(config);
        let letters = Letters {
            store: self.store.clone(),
            tasks_exchange: topology.tasks_exchange(),
            outbox_filled: Arc::clone(&outbox_filled),
            resends_filled: Arc::clone(&resends_filled),
            replies: replies.clone(),
        };
        let answers = Answers {
            store: self.store.clone(),
            letters,
            questions,
            publisher: self.outlets.answers.clone(),
            gate: replies.gate.clone(),
            control: topology.control(),
            cancelled: Arc::clone(&cancelled),
            stop: self.stop_all.clone(),
        };
        let releaser = Releaser {
            store: self.store.clone(),
            heartbeats: hear(&self.consuming, &topology, by, "collector heartbeats"),
            tasks_exchange: topology.tasks_exchange(),
            resends_filled: Arc::clone(&resends_filled),
            outbox_filled: Arc::clone(&outbox_filled),
            replies: replies.clone(),
            cancelled,
            stop: self.stop_all.clone(),
        };
        let deadlines = Deadlines {
            store: self.store.clone(),
            admin: Admin::new(self.consuming.clone()),
            publisher: self.outlets.answers.clone(),
            topology,
            consuming: reading,
            progress,
            outbox_filled,
            resends_filled,
            stop: self.stop_all.clone(),
        };
        let sending = send_replies(outgoing, self.outlets.answers.clone(), self.stop_all.clone());
        self.background.spawn(answers.run());
        self.background.spawn(releaser.run());
        self.background.spawn(deadlines.run());
        self.background.spawn(sending);
    }

    /// Publishes what waits in the outboxes.
    fn relay(
        &mut self,
        config: &Config,
        copies: Option<mpsc::Sender<Notice>>,
        (outbox_filled, resends_filled): (&Arc<Notify>, &Arc<Notify>),
    ) {
        let topology = config.broker.topology();
        let notices = Relay {
            outbox: Notices {
                store: self.store.clone(),
                exchange: topology.notices_exchange(),
                copies: copies.map(Copies::new),
            },
            publisher: self.outlets.notices.clone(),
            filled: Arc::clone(outbox_filled),
            stop: self.stop_all.clone(),
        };
        let resends = Relay {
            outbox: Resends { store: self.store.clone() },
            publisher: self.outlets.tasks.clone(),
            filled: Arc::clone(resends_filled),
            stop: self.stop_all.clone(),
        };
        self.background.spawn(notices.run());
        self.background.spawn(resends.run());
    }

    /// Looks whether work moves, says how it stands, and listens to other collectors.
    fn watch(
        &mut self,
        config: &Config,
        by: &str,
        progress: &Arc<Progress>,
        (consumers, standby, is_standby): (Vec<Pauser>, watch::Sender<bool>, watch::Receiver<bool>),
    ) {
        let (topology, news) = (config.broker.topology(), Arc::new(Notify::new()));
        let neighbours = Neighbours {
            own: self.store.identity(),
            heartbeats: hear(&self.consuming, &topology, by, "collector neighbours"),
            consumers,
            standby,
            news: Arc::clone(&news),
            health: self.health.clone(),
            stop: self.stop_all.clone(),
        };
        let beat = Beat {
            publisher: self.outlets.heartbeats.clone(),
            exchange: topology.heartbeats(),
            collector: by.to_owned(),
            store: self.store.identity(),
            progress: Arc::clone(progress),
            health: self.health.clone(),
            standby: is_standby,
            news,
            stop: self.stop_all.clone(),
        };
        let watchdog = Watchdog {
            store: self.store.clone(),
            progress: Arc::clone(progress),
            health: self.health.clone(),
            stop: self.stop_all.clone(),
        };
        self.background.spawn(watchdog.run());
        self.background.spawn(neighbours.run());
        self.background.spawn(beat.run());
    }

    /// Keeps the broker objects there and the store small.
    fn keep(&mut self, config: &Config) {
        let topology = config.broker.topology();
        let keeper = Keeper {
            admin: Admin::new(self.consuming.clone()),
            wanted: topology.core(),
            every: 3 * config.broker.heartbeat,
            stop: self.stop_all.clone(),
        };
        let retention = Retention {
            store: self.store.clone(),
            keep: config.collector.retention,
            last_commit: self.store.last_commit(),
            stop: self.stop_all.clone(),
        };
        self.background.spawn(keeper.run());
        self.background.spawn(retention.run());
    }

    /// What keeps this collector from doing its work; empty if it is healthy.
    pub fn problems(&self) -> Vec<Problem> {
        self.health.problems()
    }

    /// Waits until a part of the collector ends, which none does unless it is told to: the process
    /// should be started anew then.
    pub async fn broken(&mut self) {
        tokio::select! {
            Some(_) = self.pipeline.join_next() => {}
            Some(_) = self.background.join_next() => {}
        }
    }

    /// What reports the state of this collector, also while it stops.
    pub fn state(&self) -> CollectorState {
        CollectorState {
            health: self.health.clone(),
            store: self.store.downgrade(),
            outlets: self.outlets.clone(),
            progress: Arc::clone(&self.progress),
            settlers: self.settlers.clone(),
        }
    }

    /// Stops in order and loses nothing: what is not acknowledged comes again.
    pub async fn stop(mut self) {
        // 1. Take no more; finish the groups that are gathered. A store that fails just now ends this
        //    too: its group stays with the broker.
        self.stop_taking.cancel();
        join_all(&mut self.pipeline).await;
        // 2. Publish what the outboxes hold, within a limit; end everything else.
        self.stop_all.cancel();
        join_all(&mut self.background).await;
        // 3. Answers may still be under way.
        self.outlets.close(CLOSING).await;
        // 4. Deliveries that were never looked at go back to the broker by this.
        self.consuming.close().await;
        // 5. The last handle: joins the store's threads, which may have a checkpoint to write.
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
            tracing::error!("a part of the collector failed: {error}");
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

/// Starts the four consumers. The first declares everything; the others what they read themselves,
/// so that they come back on their own when a broker returns without its data.
async fn consume(link: &Link, topology: &Topology) -> Result<(Sources, Consumer), BrokerError> {
    // A wrong password is said once and at once; a broker that is down is the consumers' business.
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
    let questions = other(topology.queries(), "questions", QUERIES_PREFETCH);
    for consumer in [&dead, &unrouted, &questions] {
        consumer.ready().await?;
    }
    Ok((Sources { results, dead, unrouted }, questions))
}

/// Heartbeats tell what there is now; old ones would tell nothing, so the queue is nobody else's.
fn hear(link: &Link, topology: &Topology, name: &str, tag: &str) -> Consumer {
    let bindings = vec![(topology.heartbeats(), String::new())];
    let declarations = topology.named(&topology.heartbeats());
    // A queue's name holds at most 255 bytes.
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
