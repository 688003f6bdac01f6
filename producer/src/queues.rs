//! Whether a queue exists, looked up once in a while.
//!
//! A task for a queue that does not exist would end in the unrouted queue: safe, but far from its
//! sender. So the sender is told before. The look and the publish are two steps; a queue deleted in
//! between still leads to the unrouted queue, never to a loss.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use garenne_common::QueueName;
use garenne_common::broker::{Admin, BrokerError, Link};
use garenne_common::topology::Topology;
use tokio_util::task::AbortOnDropHandle;

use crate::SubmitError;

/// How long a look holds.
const FRESH: Duration = Duration::from_secs(10);
/// More names than this are not remembered at once.
const MOST: usize = 1_000;

pub(crate) struct KnownQueues(Arc<Shared>);

struct Shared {
    admin: Admin,
    topology: Topology,
    /// When each was last seen.
    seen: Mutex<HashMap<QueueName, Instant>>,
    /// Held during a look, so that a hundred askers look once.
    looking: tokio::sync::Mutex<()>,
}

impl KnownQueues {
    /// Looks over the link that consumes: one that publishes may be blocked by an alarm.
    pub(crate) fn new(link: Link, topology: Topology) -> Self {
        let (seen, looking) = (Mutex::default(), tokio::sync::Mutex::default());
        Self(Arc::new(Shared { admin: Admin::new(link), topology, seen, looking }))
    }

    /// `Ok` if tasks for this queue will reach it.
    pub(crate) async fn require(&self, queue: &QueueName) -> Result<(), SubmitError> {
        // Declared by every process, this one included.
        if *queue == QueueName::default() || self.0.is_fresh(queue) {
            return Ok(());
        }
        // In a task of its own: a caller that is not polled for a while must not keep others from it.
        let (shared, queue) = (Arc::clone(&self.0), queue.clone());
        let look = tokio::spawn(async move { shared.look(queue).await });
        AbortOnDropHandle::new(look).await.unwrap_or(Err(BrokerError::Closed.into()))
    }
}

impl Shared {
    fn is_fresh(&self, queue: &QueueName) -> bool {
        self.seen().get(queue).is_some_and(|at| at.elapsed() < FRESH)
    }

    async fn look(&self, queue: QueueName) -> Result<(), SubmitError> {
        let _turn = self.looking.lock().await;
        if self.is_fresh(&queue) {
            return Ok(());
        }
        let [declaration, _binding] = self.topology.task_queue_declarations(&queue);
        if !self.admin.exists(&declaration).await? {
            self.seen().remove(&queue);
            return Err(SubmitError::UnknownQueue { queue });
        }
        let mut seen = self.seen();
        if seen.len() >= MOST {
            seen.clear();
        }
        seen.insert(queue, Instant::now());
        Ok(())
    }

    fn seen(&self) -> MutexGuard<'_, HashMap<QueueName, Instant>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
