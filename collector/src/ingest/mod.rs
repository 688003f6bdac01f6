//! Ingest: receives deliveries, gathers them into groups, commits and acknowledges each group.
//!
//! Two tasks, so that the next group is gathered while the previous one is committed. Memory is bounded by
//! the prefetch and by three groups: one being gathered, one waiting, one being committed.
//!
//! A group is committed before it is acknowledged. Its notices need not be published before that: they are
//! stored in the outbox by the same transaction, and the relay (`crate::outbox`) publishes them, also after
//! a restart. If acknowledgements waited for publishing, a broker that blocks publishers for lack of memory
//! could never get rid of the results that fill it.

pub mod group;
pub(crate) mod unrouted_replies;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use garenne_common::broker::{Consumer, Delivery, DeliveryTag, Settler};
use garenne_common::{ProcessHealth, Timestamp};
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::ingest::group::{Group, Source};
use crate::ingest::unrouted_replies::UnroutedReplies;
use crate::store::{Store, StoreError};

/// Prefetch of results. It is small, since each delivery may be a whole bundle. A group takes at most half
/// of it, so that the broker sends the other half meanwhile.
pub(crate) const RESULTS_PREFETCH: u16 = 512;
/// Prefetch of dead letters, which contain whole messages and are rare.
pub(crate) const DEAD_PREFETCH: u16 = 64;
/// Prefetch of unrouted messages.
pub(crate) const UNROUTED_PREFETCH: u16 = 64;

/// Pauses between attempts to commit a group; they double from the first to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// The problem of a collector whose groups are not stored.
const STORE_FAILING: &str = "store_failing";

/// A group, and what is needed to acknowledge it.
pub(crate) struct GatheredGroup {
    group: Group,
    deliveries: usize,
    /// The newest delivery of each consumer. Groups are committed in the order of gathering, so one
    /// `multiple` acknowledgement covers all earlier deliveries too. Deliveries of an older epoch in the
    /// same group come again anyway.
    newest: Vec<(Source, Settler, DeliveryTag)>,
}

/// The task that receives and gathers.
pub(crate) struct Ingest {
    pub(crate) sources: Sources,
    pub(crate) group_size: usize,
    pub(crate) linger: Duration,
    pub(crate) progress: Arc<IngestProgress>,
    /// Name of the collector, for dead letters that are created here.
    pub(crate) by: String,
    pub(crate) stop: CancellationToken,
    pub(crate) gathered: mpsc::Sender<GatheredGroup>,
}

/// The three consumers that fill groups.
pub(crate) struct Sources {
    pub(crate) results: Consumer,
    pub(crate) dead: Consumer,
    pub(crate) unrouted: Consumer,
}

/// Counts groups, so that others can determine whether everything that had arrived at some time is stored.
#[derive(Debug, Default)]
pub(crate) struct IngestProgress {
    /// Number of groups that have been started.
    begun: AtomicU64,
    /// Number of groups that are committed.
    finished: AtomicU64,
    /// When the last group was committed, in milliseconds since 1970; 0 before the first.
    committed_at: AtomicU64,
    /// Number of deliveries that have been gathered and are not committed.
    deliveries: AtomicU64,
}

/// Deliveries that are not committed yet.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Uncommitted {
    pub(crate) groups: u64,
    pub(crate) deliveries: u64,
    /// Number of groups that are committed.
    pub(crate) finished: u64,
}

impl IngestProgress {
    /// A delivery that arrived before a group was started is in one of this many groups after it, since
    /// the prefetch holds no more.
    const BEHIND: u64 = 3;

    /// The number of groups that have been started, and that are committed.
    pub(crate) fn groups(&self) -> (u64, u64) {
        (self.mark(), self.finished.load(Ordering::Acquire))
    }

    /// When the last group was committed.
    pub(crate) fn last_commit(&self) -> Option<Timestamp> {
        let at = self.committed_at.load(Ordering::Relaxed);
        (at > 0).then(|| Timestamp::from_millis(at))
    }

    /// A mark for [`has_passed`](Self::has_passed).
    pub(crate) fn mark(&self) -> u64 {
        self.begun.load(Ordering::Acquire)
    }

    /// What is not committed yet.
    pub(crate) fn uncommitted(&self) -> Uncommitted {
        // Read first: a group that is committed between the two loads must not count twice.
        let finished = self.finished.load(Ordering::Acquire);
        let groups = self.mark().saturating_sub(finished);
        Uncommitted { groups, deliveries: self.deliveries.load(Ordering::Acquire), finished }
    }

    fn gathered(&self, deliveries: usize) {
        self.deliveries.fetch_add(as_count(deliveries), Ordering::AcqRel);
    }

    fn finish(&self, deliveries: usize) {
        self.committed_at.store(Timestamp::now().as_millis(), Ordering::Relaxed);
        self.finished.fetch_add(1, Ordering::AcqRel);
        self.deliveries.fetch_sub(as_count(deliveries), Ordering::AcqRel);
    }

    /// Whether everything that had been delivered when the mark was made is stored.
    pub(crate) fn has_passed(&self, mark: u64) -> bool {
        let finished = self.finished.load(Ordering::Acquire);
        // Either nothing is under way, or enough groups have been committed since.
        finished == self.mark() || finished >= mark + Self::BEHIND
    }
}

fn as_count(deliveries: usize) -> u64 {
    u64::try_from(deliveries).unwrap_or(u64::MAX)
}

type Received = (Source, Settler, Delivery);

impl Sources {
    /// The settler of each consumer, with its name.
    pub(crate) fn settlers(&self, queries: &Consumer) -> Vec<(&'static str, Settler)> {
        vec![
            ("results", self.results.settler()),
            ("dead letters", self.dead.settler()),
            ("unrouted", self.unrouted.settler()),
            ("queries", queries.settler()),
        ]
    }

    /// A delivery that has been received already. Rare kinds come first: results could starve them, but
    /// their small prefetch keeps them from starving results.
    fn try_next(&mut self) -> Option<Received> {
        for (source, consumer) in [
            (Source::Dead, &mut self.dead),
            (Source::Unrouted, &mut self.unrouted),
            (Source::Results, &mut self.results),
        ] {
            if let Some(delivery) = consumer.try_next() {
                return Some((source, consumer.settler(), delivery));
            }
        }
        None
    }

    /// The next delivery of any kind; `None` if a consumer has stopped.
    async fn next(&mut self) -> Option<Received> {
        let (source, consumer, delivery) = tokio::select! {
            biased;
            delivery = self.dead.next() => (Source::Dead, &self.dead, delivery),
            delivery = self.unrouted.next() => (Source::Unrouted, &self.unrouted, delivery),
            delivery = self.results.next() => (Source::Results, &self.results, delivery),
        };
        delivery.map(|delivery| (source, consumer.settler(), delivery))
    }
}

impl Ingest {
    /// Gathers groups until `stop`. The broker redelivers what is not passed on by then.
    pub(crate) async fn run(mut self) {
        while let Some((first, was_waiting)) = self.first().await {
            self.progress.begun.fetch_add(1, Ordering::AcqRel);
            let mut group = GatheredGroup::new();
            group.take(first, &self.by);
            self.gather(&mut group, was_waiting).await;
            if !self.pass_on(group).await {
                return;
            }
        }
    }

    /// The first delivery of a group, and whether it had been received already.
    async fn first(&mut self) -> Option<(Received, bool)> {
        if self.stop.is_cancelled() {
            return None;
        }
        if let Some(received) = self.sources.try_next() {
            return Some((received, true));
        }
        tokio::select! {
            biased;
            () = self.stop.cancelled() => None,
            received = self.sources.next() => received.map(|received| (received, false)),
        }
    }

    /// Adds deliveries that have been received. A busy collector also waits up to `linger` for more; an
    /// idle one does not, so that a single result is stored at once.
    async fn gather(&mut self, group: &mut GatheredGroup, busy: bool) {
        let deadline = Instant::now() + self.linger;
        while !group.is_full(self.group_size) {
            if let Some(received) = self.sources.try_next() {
                group.take(received, &self.by);
                continue;
            }
            if !busy {
                return;
            }
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return,
                () = tokio::time::sleep_until(deadline) => return,
                received = self.sources.next() => match received {
                    Some(received) => group.take(received, &self.by),
                    None => return,
                },
            }
        }
    }

    /// Passes a group on to be committed, and keeps filling it while the committer is busy.
    async fn pass_on(&mut self, mut group: GatheredGroup) -> bool {
        loop {
            let open = !group.is_full(self.group_size) && !self.stop.is_cancelled();
            tokio::select! {
                biased;
                slot = self.gathered.reserve() => {
                    self.progress.gathered(group.deliveries);
                    return slot.map(|slot| slot.send(group)).is_ok();
                }
                received = self.sources.next(), if open => {
                    let Some(received) = received else {
                        self.progress.gathered(group.deliveries);
                        return self.gathered.send(group).await.is_ok();
                    };
                    group.take(received, &self.by);
                }
            }
        }
    }
}

impl GatheredGroup {
    fn new() -> Self {
        Self { group: Group::new(Timestamp::now()), deliveries: 0, newest: vec![] }
    }

    fn is_full(&self, group_size: usize) -> bool {
        self.deliveries >= usize::from(RESULTS_PREFETCH / 2) || self.group.is_full(group_size)
    }

    fn take(&mut self, (source, settler, delivery): Received, by: &str) {
        self.deliveries += 1;
        self.group.take(source, &delivery.routing_key, &delivery.message, by);
        match self.newest.iter_mut().find(|(known, ..)| *known == source) {
            Some((_, _, tag)) => *tag = delivery.tag.max(*tag),
            None => self.newest.push((source, settler, delivery.tag)),
        }
    }
}

/// The task that commits and acknowledges.
pub(crate) struct Committer<S> {
    pub(crate) store: S,
    pub(crate) gathered: mpsc::Receiver<GatheredGroup>,
    pub(crate) progress: Arc<IngestProgress>,
    pub(crate) replies: UnroutedReplies,
    /// Wakes the relay of notices.
    pub(crate) outbox_filled: Arc<Notify>,
    pub(crate) health: ProcessHealth,
    /// Whether the results belong to the store of another collector.
    pub(crate) standby: watch::Receiver<bool>,
    pub(crate) stop: CancellationToken,
}

impl<S: Store> Committer<S> {
    /// Commits groups until the other task has ended.
    pub(crate) async fn run(mut self) {
        let mut stats = CommitStats::default();
        while let Some(group) = self.gathered.recv().await {
            if !self.commit_and_ack(group, &mut stats).await {
                return;
            }
            stats.log();
        }
    }

    /// Commits a group and acknowledges its deliveries. Returns `false` if the collector stops instead.
    async fn commit_and_ack(&self, gathered: GatheredGroup, stats: &mut CommitStats) -> bool {
        if *self.standby.borrow() {
            // The deliveries have returned to their queues, and the other store receives them.
            self.progress.finish(gathered.deliveries);
            return true;
        }
        let group = Arc::new(gathered.group);
        #[cfg(feature = "failpoints")]
        sabotage::acknowledge_uncommitted(&gathered.newest);
        let Some(committed) = self.commit(&group).await else { return false };
        self.progress.finish(gathered.deliveries);
        for (_, settler, tag) in gathered.newest {
            if !settler.ack(tag, true) {
                // The group comes again and changes nothing then.
                tracing::debug!(?tag, "acknowledgement of a closed channel dropped");
            }
        }
        if committed.notices > 0 {
            self.outbox_filled.notify_one();
        }
        self.replies.reply_unrouted(&group, &committed.given_up);
        stats.groups += 1;
        stats.deliveries += gathered.deliveries;
        stats.fresh += committed.fresh;
        stats.repeats += committed.repeats;
        true
    }

    /// Commits a group, and tries again until that succeeds: a group that is not stored is never
    /// acknowledged. The broker keeps further messages once the prefetch is exhausted.
    async fn commit(&self, group: &Arc<Group>) -> Option<crate::rules::aggregate::Committed> {
        let mut pause = FIRST_PAUSE;
        loop {
            match self.store.commit(Arc::clone(group)).await {
                Ok(committed) => {
                    if pause > FIRST_PAUSE {
                        tracing::info!("storing again");
                        self.health.clear(STORE_FAILING);
                    }
                    return Some(committed);
                }
                Err(StoreError::Closed) => return None,
                Err(error) => {
                    tracing::error!(records = group.len(), "not stored: {error}");
                    self.health.raise(STORE_FAILING, format!("results are not stored: {error}"));
                }
            }
            tokio::select! {
                () = self.stop.cancelled() => return None,
                () = tokio::time::sleep(pause) => pause = (pause * 2).min(LONGEST_PAUSE),
            }
        }
    }
}

/// What has been committed since the last log line about it.
struct CommitStats {
    since: Instant,
    groups: usize,
    deliveries: usize,
    fresh: u64,
    repeats: u64,
}

impl Default for CommitStats {
    fn default() -> Self {
        Self { since: Instant::now(), groups: 0, deliveries: 0, fresh: 0, repeats: 0 }
    }
}

impl CommitStats {
    const INTERVAL: Duration = Duration::from_secs(10);

    fn log(&mut self) {
        if self.since.elapsed() >= Self::INTERVAL {
            let Self { groups, deliveries, fresh, repeats, .. } = *self;
            tracing::debug!(groups, deliveries, fresh, repeats, "committed");
            *self = Self::default();
        }
    }
}

#[cfg(feature = "failpoints")]
mod sabotage {
    use garenne_common::broker::{DeliveryTag, Settler};
    use garenne_common::failpoints::Protection;

    use super::Source;

    /// Without `CommitBeforeAck`: acknowledges a group before it is committed.
    pub(super) fn acknowledge_uncommitted(newest: &[(Source, Settler, DeliveryTag)]) {
        if !Protection::CommitBeforeAck.is_enabled() {
            for (_, settler, tag) in newest {
                settler.ack(*tag, true);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_has_passed_when_all_is_stored_or_enough_groups_came_later() {
        let progress = IngestProgress::default();
        assert!(progress.has_passed(progress.mark()));
        progress.begun.store(5, Ordering::Release);
        progress.finished.store(4, Ordering::Release);
        let mark = progress.mark();
        assert!(!progress.has_passed(mark), "a group is not committed yet");
        progress.begun.store(9, Ordering::Release);
        progress.finished.store(7, Ordering::Release);
        assert!(!progress.has_passed(mark));
        progress.finished.store(8, Ordering::Release);
        assert!(progress.has_passed(mark));
    }
}
