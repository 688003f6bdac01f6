//! Deadlines: ends batches that nobody sealed, and publishes tasks again whose lease nobody renews.
//!
//! A seal or a renewal may lie unread in the results queue, after an outage even past its deadline. So
//! a batch is given up only when the queue was seen drained twice in a row, and only if its deadline
//! had passed before the first look: by then a seal that was sent in time has been read. The term of
//! a lease is counted from its last renewal, but not from before an unbroken row of such looks. And
//! while the broker takes no messages, nobody can seal or renew anything: such a look counts for none.
//! A clock that jumps ahead ends no batch and no term ([`crate::clock`]).

use std::sync::Arc;
use std::time::{Duration, Instant};

use garenne_common::Timestamp;
use garenne_common::broker::{Admin, Outgoing, Publisher};
use garenne_common::failpoints::Protection;
use garenne_common::topology::Topology;
use garenne_common::wire::Message;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::pipeline::{Progress, RESULTS_PREFETCH};
use crate::store::{Store, StoreError};

/// How often deadlines are looked at, and so how far the two looks are apart.
const LOOK: Duration = Duration::from_secs(1);
/// A broker that has not confirmed a message by then takes none, or is too slow to judge others by.
const PROBE: Duration = Duration::from_secs(5);
/// Batches ended, or tasks published again, in one transaction.
const SLICE: usize = 500;

pub(crate) struct Deadlines<S> {
    pub(crate) store: S,
    pub(crate) admin: Admin,
    pub(crate) publisher: Publisher,
    pub(crate) topology: Topology,
    /// Which queue the consumer of results reads; changes when it was lost.
    pub(crate) consuming: watch::Receiver<Option<String>>,
    pub(crate) progress: Arc<Progress>,
    pub(crate) outbox_filled: Arc<Notify>,
    pub(crate) resends_filled: Arc<Notify>,
    pub(crate) stop: CancellationToken,
}

/// Looks in a row that found the queue drained, with nothing between them that could hide a report.
#[derive(Clone, Copy)]
struct Drained {
    first: Timestamp,
    last: Timestamp,
    /// How far the pipeline was at the last one.
    mark: u64,
}

impl<S: Store> Deadlines<S> {
    pub(crate) async fn run(mut self) {
        let mut drained = None;
        let mut clock = Clock::new(Timestamp::now(), Instant::now());
        let stop = self.stop.clone();
        loop {
            let look = async {
                tokio::time::sleep(LOOK).await;
                self.look(drained, &mut clock).await
            };
            let looked = tokio::select! {
                () = stop.cancelled() => return,
                looked = look => looked,
            };
            drained = looked.unwrap_or_else(|error| {
                tracing::warn!("deadlines were not looked at: {error}");
                None
            });
        }
    }

    /// One look; the row of looks that it belongs to, if the queue was drained.
    async fn look(
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
        // Asked first: mostly nothing is due, and then the broker is left in peace.
        let (batches, leases) =
            (self.store.has_overdue_batches(now).await?, self.store.has_leases().await?);
        let batches = batches && !clock.is_held(running);
        if !batches && !leases {
            return Ok(None);
        }
        if !Protection::DrainedTwice.is_enabled() {
            self.abandon(now).await?;
        }
        let mark = self.progress.mark();
        let interrupted = self.consuming.has_changed().unwrap_or(true);
        if !self.is_drained().await || !self.takes_messages().await {
            return Ok(None);
        }
        let Some(before) = before.filter(|_| !interrupted) else {
            return Ok(Some(Drained { first: now, last: now, mark }));
        };
        if !self.progress.has_passed(before.mark) {
            // What the last look took for read may still be on its way to the disk.
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
            tracing::warn!(batches = ended, "abandoned: not sealed by their deadline");
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

    /// Whether the broker takes messages; a memory or disk alarm shows only to whoever publishes.
    async fn takes_messages(&self) -> bool {
        // Under a key that nobody listens for: confirmed, and gone.
        let (exchange, routing_key) = (self.topology.control(), "probe".to_owned());
        let probe = Outgoing { exchange, routing_key, message: Message::default() };
        self.publisher.publish_within(probe, PROBE).await.is_ok()
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
