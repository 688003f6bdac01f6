//! Whether a task queue exists, with positive answers cached for a few seconds.
//!
//! A task for a queue that does not exist would end in the unrouted queue: safe, but its sender
//! would not learn of it. So `submit` checks first. The check and the publish are two steps: a task
//! whose queue is deleted in between still goes to the unrouted queue and is never lost.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use garenne_common::QueueName;
use garenne_common::broker::{Admin, BrokerError, Link};
use garenne_common::topology::Topology;
use parking_lot::Mutex;
use tokio_util::task::AbortOnDropHandle;

use crate::SubmitError;

/// How long a queue that was seen is assumed to exist.
const CACHE_TIME: Duration = Duration::from_secs(10);
/// Capacity of the cache, in names; a full cache is emptied.
const MAX_NAMES: usize = 1_000;

/// Checks that queues exist, and caches those that do.
pub(crate) struct KnownQueues(Arc<QueueCache>);

struct QueueCache {
    admin: Admin,
    topology: Topology,
    /// When each queue was last seen.
    seen: Mutex<HashMap<QueueName, Instant>>,
    /// Held during a check, so that concurrent callers check once.
    checking: tokio::sync::Mutex<()>,
}

impl KnownQueues {
    /// Checks over the link that consumes, since an alarm may block the one that publishes.
    pub(crate) fn new(link: Link, topology: Topology) -> Self {
        let (seen, checking) = (Mutex::default(), tokio::sync::Mutex::default());
        Self(Arc::new(QueueCache { admin: Admin::new(link), topology, seen, checking }))
    }

    /// `Ok` if tasks for this queue will reach it.
    pub(crate) async fn require(&self, queue: &QueueName) -> Result<(), SubmitError> {
        // Every process declares the default queue, this one included.
        if *queue == QueueName::default() || self.0.is_cached(queue) {
            return Ok(());
        }
        // In a task of its own: a caller that is not polled for a while must not block the others.
        let (cache, queue) = (Arc::clone(&self.0), queue.clone());
        let check = tokio::spawn(async move { cache.check(queue).await });
        AbortOnDropHandle::new(check).await.unwrap_or(Err(BrokerError::Closed.into()))
    }
}

impl QueueCache {
    fn is_cached(&self, queue: &QueueName) -> bool {
        self.seen.lock().get(queue).is_some_and(|at| at.elapsed() < CACHE_TIME)
    }

    async fn check(&self, queue: QueueName) -> Result<(), SubmitError> {
        let _turn = self.checking.lock().await;
        if self.is_cached(&queue) {
            return Ok(());
        }
        let [declaration, _binding] = self.topology.task_queue_declarations(&queue);
        if !self.admin.exists(&declaration).await? {
            self.seen.lock().remove(&queue);
            return Err(SubmitError::UnknownQueue { queue });
        }
        let mut seen = self.seen.lock();
        if seen.len() >= MAX_NAMES {
            seen.clear();
        }
        seen.insert(queue, Instant::now());
        Ok(())
    }
}
