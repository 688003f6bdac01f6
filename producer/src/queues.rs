//! Whether a queue exists, looked up once in a while.
//!
//! A task for a queue that does not exist would end in the unrouted queue: safe, but far from its
//! sender. So the sender is told before. The look and the publish are two steps; a queue deleted in
//! between still leads to the unrouted queue, never to a loss.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use garenne_common::QueueName;
use garenne_common::broker::{Admin, Link};
use garenne_common::topology::Topology;
use tokio::sync::Mutex;

use crate::SubmitError;

/// How long a look holds.
const FRESH: Duration = Duration::from_secs(10);
/// More names than this are not remembered at once.
const MOST: usize = 1_000;

pub(crate) struct KnownQueues {
    admin: Admin,
    topology: Topology,
    /// When each was last seen. Locked during a look, so that a hundred askers look once.
    seen: Mutex<HashMap<QueueName, Instant>>,
}

impl KnownQueues {
    /// Looks over the link that consumes: one that publishes may be blocked by an alarm.
    pub(crate) fn new(link: Link, topology: Topology) -> Self {
        Self { admin: Admin::new(link), topology, seen: Mutex::default() }
    }

    /// `Ok` if tasks for this queue will reach it.
    pub(crate) async fn require(&self, queue: &QueueName) -> Result<(), SubmitError> {
        // Declared by every process, this one included.
        if *queue == QueueName::default() {
            return Ok(());
        }
        let mut seen = self.seen.lock().await;
        if seen.get(queue).is_some_and(|at| at.elapsed() < FRESH) {
            return Ok(());
        }
        let [declaration, _binding] = self.topology.task_queue_declarations(queue);
        if !self.admin.exists(&declaration).await? {
            seen.remove(queue);
            return Err(SubmitError::UnknownQueue { queue: queue.clone() });
        }
        if seen.len() >= MOST {
            seen.clear();
        }
        seen.insert(queue.clone(), Instant::now());
        Ok(())
    }
}
