//! Control: what a worker does besides running tasks. It receives cancel requests, publishes heartbeats and
//! detects stalls.
//!
//! None of this may hinder a task. So it publishes through a channel of its own: a heartbeat that the broker
//! refuses closes that channel and not the one of the results, and while the broker takes nothing only a
//! few messages wait, none of them ahead of a result.

use std::sync::Arc;

use garenne_common::broker::{Consumer, ConsumerSpec, Link, Publisher, QueueSource};
use garenne_common::config::Config;
use garenne_common::topology::Topology;
use garenne_common::wire::control::CANCEL_KEY;
use garenne_common::{ProcessHealth, TaskName};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

mod cancel_listener;
pub(crate) mod cancel_requests;
mod heartbeat;
pub(crate) mod state;
mod watchdog;

use cancel_listener::CancelListener;
use cancel_requests::CancelRequests;
use heartbeat::HeartbeatTask;
use watchdog::Watchdog;

use crate::run::Pipeline;
use crate::run::concurrency::Concurrency;
use crate::run::running_tasks::RunningTasks;

/// Maximum number of unconfirmed messages; further ones are dropped.
const WINDOW: usize = 4;

/// The tasks of the runtime that do it.
pub(crate) struct Control {
    identity: Arc<str>,
    topology: Topology,
    publisher: Publisher,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Control {
    /// Starts the publisher; nothing else happens yet.
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

    /// Receives cancel requests from now on. Waits for the collector's list, but only up to
    /// `worker.cancel_sync_timeout`: a worker must work without a collector.
    pub(crate) async fn receive_cancel_requests(
        &self,
        config: &Config,
        consume: &Link,
        cancel_requests: &Arc<CancelRequests>,
    ) {
        let consumer = Consumer::start(consume.clone(), self.control_spec());
        // If the broker refuses, it refuses the consumers of tasks too, and the caller reports that.
        let consuming = consumer.ready().await.is_ok();
        let (synced, mut is_synced) = watch::channel(false);
        let listener = CancelListener {
            consumer,
            publisher: self.publisher.clone(),
            topology: self.topology.clone(),
            cancel_requests: Arc::clone(cancel_requests),
            synced,
            stop: self.stop.clone(),
        };
        self.tasks.spawn(listener.run());
        let timeout = config.worker.cancel_sync_timeout;
        let synced = is_synced.wait_for(|synced| *synced);
        if consuming && tokio::time::timeout(timeout, synced).await.is_err() {
            tracing::warn!(
                ?timeout,
                "no collector has sent the cancel requests; starting without them and asking again later"
            );
        }
    }

    /// Publishes heartbeats from now on.
    pub(crate) fn publish_heartbeats(
        &self,
        config: &Config,
        tasks: Vec<TaskName>,
        concurrency: Arc<Concurrency>,
        running: Arc<RunningTasks>,
        health: &ProcessHealth,
        draining: &CancellationToken,
    ) {
        let heartbeats = HeartbeatTask {
            publisher: self.publisher.clone(),
            topology: self.topology.clone(),
            worker: Arc::clone(&self.identity),
            queues: config.worker.queues.clone(),
            tasks,
            concurrency,
            running,
            health: health.clone(),
            interval: config.worker.heartbeat,
            draining: draining.clone(),
            stop: self.stop.clone(),
        };
        self.tasks.spawn(heartbeats.run());
    }

    /// Detects stalls from now on.
    pub(crate) fn watch(&self, pipeline: Arc<Pipeline>, publisher: &Publisher) {
        let (publisher, stop) = (publisher.clone(), self.stop.clone());
        self.tasks.spawn(Watchdog { pipeline, publisher, stop }.run());
    }

    /// Ends the tasks. The owner of the link closes it.
    pub(crate) async fn end(self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    fn control_spec(&self) -> ConsumerSpec {
        let (identity, topology) = (&self.identity, self.topology.clone());
        let bindings = vec![(topology.control(), CANCEL_KEY.to_owned())];
        // The queue of queries too: the first query is sent at once.
        let names = [topology.control(), topology.queries()];
        let declarations = names.iter().flat_map(|name| topology.named(name)).collect();
        // The name of a queue has at most 255 bytes.
        let owner: String = identity.chars().take(40).collect();
        ConsumerSpec {
            declarations,
            queue: QueueSource::Exclusive {
                name: Box::new(move || topology.reply_queue(&owner)),
                bindings,
            },
            prefetch: cancel_listener::BUFFER,
            tag: format!("garenne-worker {identity} control"),
            no_ack: true,
        }
    }
}
