//! Ends batches that nobody sealed: their producer is gone, and whoever waits must hear of it.
//!
//! A seal may lie unread in the results queue, after an outage even past its batch's deadline. So a
//! batch is given up only when the queue was seen drained twice in a row, and only if its deadline
//! had passed before the first look: by then a seal that was sent in time has been read.

use std::sync::Arc;
use std::time::Duration;

use garenne_common::Timestamp;
use garenne_common::broker::Admin;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::pipeline::RESULTS_PREFETCH;
use crate::store::{Store, StoreError};

/// How often deadlines are looked at, and so how far the two looks are apart.
const LOOK: Duration = Duration::from_secs(1);
/// Batches ended in one transaction.
const SLICE: usize = 500;

pub(crate) struct Deadlines<S> {
    pub(crate) store: S,
    pub(crate) admin: Admin,
    pub(crate) results_queue: String,
    /// Which queue the consumer of results reads; changes when it was lost.
    pub(crate) consuming: watch::Receiver<Option<String>>,
    pub(crate) outbox_filled: Arc<Notify>,
    pub(crate) stop: CancellationToken,
}

impl<S: Store> Deadlines<S> {
    pub(crate) async fn run(mut self) {
        let mut drained_at = None;
        let stop = self.stop.clone();
        loop {
            let look = async {
                tokio::time::sleep(LOOK).await;
                self.look(drained_at).await
            };
            let looked = tokio::select! {
                () = stop.cancelled() => return,
                looked = look => looked,
            };
            drained_at = looked.unwrap_or_else(|error| {
                tracing::warn!("deadlines of batches were not looked at: {error}");
                None
            });
        }
    }

    /// One look; when the queue was seen drained, if it was.
    async fn look(
        &mut self,
        drained_at: Option<Timestamp>,
    ) -> Result<Option<Timestamp>, StoreError> {
        let now = Timestamp::now();
        // Asked first: mostly no batch is overdue, and then the broker is left in peace.
        if !self.store.has_overdue_batches(now).await? {
            return Ok(None);
        }
        let interrupted = self.consuming.has_changed().unwrap_or(true);
        if !self.is_drained().await {
            return Ok(None);
        }
        if let Some(earlier) = drained_at.filter(|_| !interrupted) {
            let ended = self.store.abandon_overdue(earlier, SLICE).await?;
            if ended > 0 {
                tracing::warn!(batches = ended, "abandoned: not sealed by their deadline");
                self.outbox_filled.notify_one();
            }
        }
        Ok(Some(now))
    }

    /// Whether we consume and are not behind. What we hold unacknowledged is committed by the next
    /// look, or the store fails and that look with it.
    async fn is_drained(&mut self) -> bool {
        if self.consuming.borrow_and_update().is_none() {
            return false;
        }
        let depth = self.admin.depth(&self.results_queue).await;
        depth.is_ok_and(|depth| depth.is_some_and(|depth| depth <= u32::from(RESULTS_PREFETCH)))
    }
}
