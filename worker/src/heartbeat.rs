//! Says every few seconds that the worker is alive, and what it serves. Best effort: a heartbeat that
//! finds no room in the publisher is left out, so it never keeps a result waiting.

use std::sync::Arc;
use std::time::Duration;

use garenne_common::broker::{Outgoing, Publisher};
use garenne_common::topology::Topology;
use garenne_common::wire::Heartbeat;
use garenne_common::{ProcessHealth, QueueName, TaskName, Timestamp, VERSION};
use tokio_util::sync::CancellationToken;

use crate::register::Register;
use crate::slots::Slots;

/// What a worker says of itself.
pub(crate) struct Beat {
    pub(crate) publisher: Publisher,
    pub(crate) topology: Topology,
    pub(crate) worker: Arc<str>,
    pub(crate) queues: Vec<QueueName>,
    pub(crate) tasks: Vec<TaskName>,
    /// How many tasks it runs at once.
    pub(crate) size: usize,
    pub(crate) slots: Arc<Slots>,
    pub(crate) register: Arc<Register>,
    pub(crate) health: ProcessHealth,
    pub(crate) every: Duration,
    /// The worker takes no more tasks.
    pub(crate) draining: CancellationToken,
    pub(crate) stop: CancellationToken,
}

impl Beat {
    /// Says it at once, then again and again, and once more when the worker begins to drain.
    pub(crate) async fn run(self) {
        let mut tick = tokio::time::interval(self.every);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut said_draining = false;
        loop {
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = self.draining.cancelled(), if !said_draining => said_draining = true,
                _ = tick.tick() => {}
            }
            self.say();
        }
    }

    fn say(&self) {
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
            concurrency: count(self.size),
            running: count(self.register.oldest(0).0),
            stuck_handlers: count(self.slots.lost()),
            draining: self.draining.is_cancelled(),
            problems: self.health.problems(),
            every_ms: u32::try_from(self.every.as_millis()).unwrap_or(u32::MAX),
            at: Timestamp::now(),
        }
    }
}
