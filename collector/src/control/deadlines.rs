//! Deadlines: abandons batches that were not sealed, and publishes tasks again whose lease was not renewed.
//!
//! A seal or renewal may be unread in the results queue, after an outage even beyond its deadline. So a batch
//! is abandoned only after two consecutive checks that found the queue drained, and only if its deadline had
//! passed before the first of them: a seal that was sent in time has been read by then. The term of a lease
//! starts with its last renewal, but not before the first of a series of such checks. While the broker takes
//! no messages, nothing can be sealed or renewed, so such a check does not count. A clock that jumps ahead
//! ends no batch and no lease ([`crate::rules::clock`]).

use std::sync::Arc;
use std::time::{Duration, Instant};

use garenne_common::Timestamp;
use garenne_common::broker::{Admin, Outgoing, Publisher};
use garenne_common::topology::Topology;
use garenne_common::wire::Message;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::ingest::{IngestProgress, RESULTS_PREFETCH};
use crate::rules::clock::Clock;
use crate::store::{Store, StoreError};

/// Interval of the checks.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// A broker that has not confirmed a message by then takes none, or is too slow for conclusions.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum number of batches or tasks in one transaction.
const SLICE: usize = 500;

pub(crate) struct Deadlines<S> {
    pub(crate) store: S,
    pub(crate) admin: Admin,
    pub(crate) publisher: Publisher,
    pub(crate) topology: Topology,
    /// The queue of the results consumer; changes when the connection is lost.
    pub(crate) consuming: watch::Receiver<Option<String>>,
    pub(crate) progress: Arc<IngestProgress>,
    pub(crate) outbox_filled: Arc<Notify>,
    pub(crate) resends_filled: Arc<Notify>,
    pub(crate) stop: CancellationToken,
}

/// Consecutive checks that found the queue drained.
#[derive(Clone, Copy)]
struct Drained {
    first: Timestamp,
    last: Timestamp,
    /// The progress of ingest at the last one.
    mark: u64,
}

impl<S: Store> Deadlines<S> {
    pub(crate) async fn run(mut self) {
        let mut drained = None;
        let mut clock = Clock::new(Timestamp::now(), Instant::now());
        let stop = self.stop.clone();
        loop {
            let check = async {
                tokio::time::sleep(POLL_INTERVAL).await;
                self.check(drained, &mut clock).await
            };
            let checked = tokio::select! {
                () = stop.cancelled() => return,
                checked = check => checked,
            };
            drained = checked.unwrap_or_else(|error| {
                tracing::warn!("deadlines were not checked: {error}");
                None
            });
        }
    }

    /// One check. Returns the series of checks that it belongs to, if the queue was drained.
    async fn check(
        &mut self,
        before: Option<Drained>,
        clock: &mut Clock,
    ) -> Result<Option<Drained>, StoreError> {
        let (now, running) = (Timestamp::now(), Instant::now());
        if let Some(jump) = clock.jumped(now, running) {
            let minutes = jump.as_secs() / 60;
            tracing::warn!(
                "the clock jumped ahead by {minutes} minutes; no batch is abandoned for 24 hours, and the \
                 terms of leases are counted anew"
            );
            return Ok(None);
        }
        // Checked first: usually nothing is due, and then the broker is not queried.
        let (batches, leases) =
            (self.store.has_overdue_batches(now).await?, self.store.has_leases().await?);
        let batches = batches && !clock.is_held(running);
        if !batches && !leases {
            return Ok(None);
        }
        #[cfg(feature = "failpoints")]
        sabotage::abandon_at_once(self, now).await?;
        let mark = self.progress.mark();
        let interrupted = self.consuming.has_changed().unwrap_or(true);
        if !self.is_drained().await || !self.takes_messages().await {
            return Ok(None);
        }
        let Some(before) = before.filter(|_| !interrupted) else {
            return Ok(Some(Drained { first: now, last: now, mark }));
        };
        if !self.progress.has_passed(before.mark) {
            // Reports that were received at the last check may not be stored yet.
            return Ok(Some(before));
        }
        if batches {
            self.abandon(before.last).await?;
        }
        if leases {
            self.lapse(before.first).await?;
        }
        Ok(Some(Drained { last: now, mark, ..before }))
    }

    async fn abandon(&self, overdue_at: Timestamp) -> Result<(), StoreError> {
        let ended = self.store.abandon_overdue(overdue_at, SLICE).await?;
        if ended > 0 {
            tracing::warn!(batches = ended, "batches abandoned: not sealed by their deadline");
            self.outbox_filled.notify_one();
        }
        Ok(())
    }

    async fn lapse(&self, listening_since: Timestamp) -> Result<(), StoreError> {
        let topology = self.topology.clone();
        let lapsed = self.store.lapse_leases(topology, listening_since, SLICE).await?;
        if lapsed > 0 {
            self.resends_filled.notify_one();
        }
        Ok(())
    }

    /// Whether the broker takes messages; a memory or disk alarm shows only when publishing.
    async fn takes_messages(&self) -> bool {
        // No queue is bound with this key: the message is confirmed and dropped.
        let (exchange, routing_key) = (self.topology.control(), "probe".to_owned());
        let probe = Outgoing { exchange, routing_key, message: Message::default() };
        self.publisher.publish_within(probe, PROBE_TIMEOUT).await.is_ok()
    }

    /// Whether we consume and are not behind. What we hold unacknowledged, [`Progress`] knows.
    async fn is_drained(&mut self) -> bool {
        if self.consuming.borrow_and_update().is_none() {
            return false;
        }
        let depth = self.admin.depth(&self.topology.results()).await;
        depth.is_ok_and(|depth| depth.is_some_and(|depth| depth <= u32::from(RESULTS_PREFETCH)))
    }
}

#[cfg(feature = "failpoints")]
mod sabotage {
    use garenne_common::Timestamp;
    use garenne_common::failpoints::Protection;

    use super::{Deadlines, Store, StoreError};

    /// Without `DrainedTwice`: abandons overdue batches although reports of their members may wait.
    pub(super) async fn abandon_at_once<S: Store>(
        deadlines: &Deadlines<S>,
        now: Timestamp,
    ) -> Result<(), StoreError> {
        if Protection::DrainedTwice.is_enabled() { Ok(()) } else { deadlines.abandon(now).await }
    }
}
