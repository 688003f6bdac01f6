//! Publishes heartbeats: every few seconds, that the worker is alive and what it serves.
//!
//! Best effort: a heartbeat that finds no room at the publisher is skipped, so that it never delays a
//! result.

use std::sync::Arc;
use std::time::Duration;

use garenne_common::broker::{Outgoing, Publisher};
use garenne_common::topology::Topology;
use garenne_common::wire::Heartbeat;
use garenne_common::{ProcessHealth, QueueName, TaskName, Timestamp, VERSION};
use tokio_util::sync::CancellationToken;

use crate::run::concurrency::Concurrency;
use crate::run::running_tasks::RunningTasks;

/// The task that publishes heartbeats.
pub(crate) struct HeartbeatTask {
    pub(crate) publisher: Publisher,
    pub(crate) topology: Topology,
    pub(crate) worker: Arc<str>,
    pub(crate) queues: Vec<QueueName>,
    pub(crate) tasks: Vec<TaskName>,
    pub(crate) concurrency: Arc<Concurrency>,
    pub(crate) running: Arc<RunningTasks>,
    pub(crate) health: ProcessHealth,
    pub(crate) interval: Duration,
    /// Fires when the worker takes no more tasks.
    pub(crate) draining: CancellationToken,
    pub(crate) stop: CancellationToken,
}

impl HeartbeatTask {
    /// Publishes a heartbeat at once, then periodically, and when the worker starts to drain.
    pub(crate) async fn run(self) {
        let mut tick = tokio::time::interval(self.interval);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut reported_draining = false;
        loop {
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = self.draining.cancelled(), if !reported_draining => reported_draining = true,
                _ = tick.tick() => {}
            }
            self.publish();
        }
    }

    fn publish(&self) {
        let exchange = self.topology.heartbeats();
        let message = self.heartbeat().encode();
        let outgoing = Outgoing { exchange, routing_key: String::new(), message };
        if !self.publisher.offer(outgoing) {
            tracing::debug!("no room for a heartbeat");
        }
    }

    fn heartbeat(&self) -> Heartbeat {
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        Heartbeat {
            worker: self.worker.to_string(),
            version: VERSION.to_owned(),
            queues: self.queues.clone(),
            tasks: self.tasks.clone(),
            concurrency: count(self.concurrency.limit()),
            running: count(self.running.oldest(0).0),
            stuck_handlers: count(self.concurrency.stuck()),
            draining: self.draining.is_cancelled(),
            problems: self.health.problems(),
            every_ms: u32::try_from(self.interval.as_millis()).unwrap_or(u32::MAX),
            at: Timestamp::now(),
        }
    }
}
