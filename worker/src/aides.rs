//! What a worker does beside its tasks: it listens for cancellations and says that it is alive.
//!
//! Nothing here may hinder a task. So it publishes over a channel of its own: what the broker forbids
//! or has lost of heartbeats ends that channel, and not the one that results take; and what waits while
//! the broker takes nothing is a handful of messages, and none of them before a result.

use std::sync::Arc;

use garenne_common::broker::{Consumer, ConsumerSpec, Link, Publisher, QueueSource, Settler};
use garenne_common::config::Config;
use garenne_common::topology::Topology;
use garenne_common::wire::control::CANCEL_KEY;
use garenne_common::{ProcessHealth, TaskName};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::attempt::Pipeline;
use crate::cancels::Cancels;
use crate::control::{self, Listener};
use crate::heartbeat::Beat;
use crate::register::Register;
use crate::slots::Slots;
use crate::watchdog::Watchdog;

/// Messages that wait for the broker; more are left out.
const WINDOW: usize = 4;

/// The tasks that do it.
pub(crate) struct Aides {
    identity: Arc<str>,
    topology: Topology,
    publisher: Publisher,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Aides {
    /// Nothing happens yet but on the link.
    pub(crate) fn new(config: &Config, identity: &str, publish: Link) -> Self {
        let topology = config.broker.topology();
        let wanted = topology.named(&topology.heartbeats());
        let mut broker = config.broker.clone();
        broker.publish_window = WINDOW;
        Self {
            identity: Arc::from(identity),
            topology,
            publisher: Publisher::start(publish, wanted, &broker),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        }
    }

    /// Listens from now on, and waits until the list of what is cancelled is known, but not for long:
    /// a worker must work without a collector.
    pub(crate) async fn listen(&self, config: &Config, consume: &Link, cancels: &Arc<Cancels>) {
        let consumer = Consumer::start(consume.clone(), self.control_spec());
        // A broker that refuses says so of the queues of tasks too, and the caller hears it there.
        let consuming = consumer.ready().await.is_ok();
        let (in_step, mut is_in_step) = watch::channel(false);
        let listener = Listener {
            consumer,
            publisher: self.publisher.clone(),
            topology: self.topology.clone(),
            cancels: Arc::clone(cancels),
            in_step,
            stop: self.stop.clone(),
        };
        self.tasks.spawn(listener.run());
        let patience = config.worker.cancel_sync_timeout;
        let known = is_in_step.wait_for(|known| *known);
        if consuming && tokio::time::timeout(patience, known).await.is_err() {
            tracing::warn!(
                ?patience,
                "no collector has said which tasks are cancelled; starting without, and asking on"
            );
        }
    }

    /// Says from now on that the worker is alive.
    pub(crate) fn beat(
        &self,
        config: &Config,
        tasks: Vec<TaskName>,
        (register, slots): (Arc<Register>, Arc<Slots>),
        health: &ProcessHealth,
        draining: &CancellationToken,
    ) {
        let beat = Beat {
            publisher: self.publisher.clone(),
            topology: self.topology.clone(),
            worker: Arc::clone(&self.identity),
            queues: config.worker.queues.clone(),
            tasks,
            size: config.worker.concurrency,
            slots,
            register,
            health: health.clone(),
            every: config.worker.heartbeat,
            draining: draining.clone(),
            stop: self.stop.clone(),
        };
        self.tasks.spawn(beat.run());
    }

    /// Reports from now on what stands still.
    pub(crate) fn watch(
        &self,
        pipeline: Arc<Pipeline>,
        publisher: &Publisher,
        settlers: &[Settler],
    ) {
        let (publisher, settlers) = (publisher.clone(), settlers.to_vec());
        let stop = self.stop.clone();
        self.tasks.spawn(Watchdog { pipeline, publisher, settlers, stop }.run());
    }

    /// Ends them. The link is its owner's to close.
    pub(crate) async fn end(self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    fn control_spec(&self) -> ConsumerSpec {
        let (identity, topology) = (&self.identity, self.topology.clone());
        let bindings = vec![(topology.control(), CANCEL_KEY.to_owned())];
        // The queue of questions too: the first one is asked at once, and must not find none.
        let names = [topology.control(), topology.queries()];
        let declarations = names.iter().flat_map(|name| topology.named(name)).collect();
        // A queue's name holds at most 255 bytes.
        let owner: String = identity.chars().take(40).collect();
        ConsumerSpec {
            declarations,
            queue: QueueSource::Exclusive {
                name: Box::new(move || topology.reply_queue(&owner)),
                bindings,
            },
            prefetch: control::BUFFER,
            tag: format!("garenne-worker {identity} control"),
            no_ack: true,
        }
    }
}
