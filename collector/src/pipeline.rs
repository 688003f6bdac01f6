//! The way of a delivery: receive, gather into a group, commit, acknowledge.
//!
//! Two tasks, so that the next group gathers while the previous one commits. Memory is bounded by the
//! prefetch and by three groups: one gathering, one waiting, one committing.
//!
//! The order that must hold is commit before acknowledge. Notices need not be published before the
//! acknowledgement: they lie in the outbox, in the same transaction as their results, and the relay
//! ([`crate::notices`]) drains it at start-up and ever after. If acknowledging waited for publishing,
//! a broker that has stopped its publishers for lack of memory could never get rid of the results
//! that fill it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use garenne_common::broker::{Consumer, Delivery, DeliveryTag, Settler};
use garenne_common::failpoints::Protection;
use garenne_common::{ProcessHealth, Timestamp};
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::group::{Group, Source};
use crate::replies::Replies;
use crate::store::{Store, StoreError};

/// Unacknowledged deliveries of results. Each may be a whole bundle, so it need not be large, and a
/// group takes at most half of them, so that the broker sends the other half meanwhile.
pub(crate) const RESULTS_PREFETCH: u16 = 512;
/// Dead letters carry whole messages and are few.
pub(crate) const DEAD_PREFETCH: u16 = 64;
/// Likewise.
pub(crate) const UNROUTED_PREFETCH: u16 = 64;

/// Pauses between attempts to commit one group.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// The problem of a collector whose groups are not stored.
const STORE_FAILING: &str = "store_failing";

/// A group and what acknowledges it.
pub(crate) struct Parcel {
    group: Group,
    deliveries: usize,
    /// Per consumer the newest delivery. Groups are finished in the order in which they are gathered,
    /// so everything before it is finished too and one `multiple` acknowledges all of it; deliveries
    /// of an older epoch in the same group are void anyway.
    newest: Vec<(Source, Settler, DeliveryTag)>,
}

/// The receiving half.
pub(crate) struct Intake {
    pub(crate) sources: Sources,
    pub(crate) group_size: usize,
    pub(crate) linger: Duration,
    pub(crate) progress: Arc<Progress>,
    /// Signs dead letters that are made here.
    pub(crate) by: String,
    pub(crate) stop: CancellationToken,
    pub(crate) parcels: mpsc::Sender<Parcel>,
}

/// The three consumers that fill groups.
pub(crate) struct Sources {
    pub(crate) results: Consumer,
    pub(crate) dead: Consumer,
    pub(crate) unrouted: Consumer,
}

/// How many parcels were begun and how many are finished, for those who must know that what had
/// arrived by some moment is stored.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    begun: AtomicU64,
    finished: AtomicU64,
    /// When the last group was committed, in milliseconds; 0 before the first.
    committed_at: AtomicU64,
    /// Deliveries that were handed to the committing half and are not finished.
    deliveries: AtomicU64,
}

/// What is received and not committed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Uncommitted {
    pub(crate) groups: u64,
    pub(crate) deliveries: u64,
    /// How many groups were finished so far.
    pub(crate) finished: u64,
}

impl Progress {
    /// What was delivered before a parcel and is not in it goes into one of the next so many: the
    /// prefetch holds no more.
    const BEHIND: u64 = 3;

    /// How many groups were begun, and how many are committed.
    pub(crate) fn groups(&self) -> (u64, u64) {
        (self.mark(), self.finished.load(Ordering::Acquire))
    }

    /// When the last group was committed.
    pub(crate) fn last_commit(&self) -> Option<Timestamp> {
        let at = self.committed_at.load(Ordering::Relaxed);
        (at > 0).then(|| Timestamp::from_millis(at))
    }

    /// A mark that [`has_passed`](Self::has_passed) understands.
    pub(crate) fn mark(&self) -> u64 {
        self.begun.load(Ordering::Acquire)
    }

    /// What waits for its commit.
    pub(crate) fn uncommitted(&self) -> Uncommitted {
        // Read first: a group that finishes between the two loads must not be counted twice.
        let finished = self.finished.load(Ordering::Acquire);
        let groups = self.mark().saturating_sub(finished);
        Uncommitted { groups, deliveries: self.deliveries.load(Ordering::Acquire), finished }
    }

    fn handed_on(&self, deliveries: usize) {
        self.deliveries.fetch_add(as_count(deliveries), Ordering::AcqRel);
    }

    fn finish(&self, deliveries: usize) {
        self.committed_at.store(Timestamp::now().as_millis(), Ordering::Relaxed);
        self.finished.fetch_add(1, Ordering::AcqRel);
        self.deliveries.fetch_sub(as_count(deliveries), Ordering::AcqRel);
    }

    /// Whether everything that was delivered when the mark was made is stored.
    pub(crate) fn has_passed(&self, mark: u64) -> bool {
        let finished = self.finished.load(Ordering::Acquire);
        // Nothing is under way; or so much was finished that what had arrived then is part of it.
        finished == self.mark() || finished >= mark + Self::BEHIND
    }
}

fn as_count(deliveries: usize) -> u64 {
    u64::try_from(deliveries).unwrap_or(u64::MAX)
}

type Received = (Source, Settler, Delivery);

impl Sources {
    /// What settles each consumer's deliveries, by name.
    pub(crate) fn settlers(&self, questions: &Consumer) -> Vec<(&'static str, Settler)> {
        vec![
            ("results", self.results.settler()),
            ("dead letters", self.dead.settler()),
            ("unrouted", self.unrouted.settler()),
            ("questions", questions.settler()),
        ]
    }

    /// What is here already. The rare kinds come first: there are few of them per group, because few
    /// may be unacknowledged, so they cannot keep results waiting, but results could starve them.
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

    /// The next delivery of any kind; `None` when a consumer was stopped.
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

impl Intake {
    /// Gathers groups until it is told to stop. What it received and did not hand on, the broker
    /// delivers again to the next collector.
    pub(crate) async fn run(mut self) {
        while let Some((first, was_waiting)) = self.first().await {
            self.progress.begun.fetch_add(1, Ordering::AcqRel);
            let mut parcel = Parcel::new();
            parcel.take(first, &self.by);
            self.gather(&mut parcel, was_waiting).await;
            if !self.hand_on(parcel).await {
                return;
            }
        }
    }

    /// The first delivery of a group, and whether it was waiting for us.
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

    /// Takes what is here. Where deliveries come faster than groups are finished, waits a little for
    /// more; an idle collector does not, so a single result is stored at once.
    async fn gather(&mut self, parcel: &mut Parcel, busy: bool) {
        let deadline = Instant::now() + self.linger;
        while !parcel.is_full(self.group_size) {
            if let Some(received) = self.sources.try_next() {
                parcel.take(received, &self.by);
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
                    Some(received) => parcel.take(received, &self.by),
                    None => return,
                },
            }
        }
    }

    /// Hands a parcel to the committing half, and goes on filling it while that one is busy.
    async fn hand_on(&mut self, mut parcel: Parcel) -> bool {
        loop {
            let open = !parcel.is_full(self.group_size) && !self.stop.is_cancelled();
            tokio::select! {
                biased;
                place = self.parcels.reserve() => {
                    self.progress.handed_on(parcel.deliveries);
                    return place.map(|place| place.send(parcel)).is_ok();
                }
                received = self.sources.next(), if open => {
                    let Some(received) = received else {
                        self.progress.handed_on(parcel.deliveries);
                        return self.parcels.send(parcel).await.is_ok();
                    };
                    parcel.take(received, &self.by);
                }
            }
        }
    }
}

impl Parcel {
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

/// The committing half.
pub(crate) struct Committer<S> {
    pub(crate) store: S,
    pub(crate) parcels: mpsc::Receiver<Parcel>,
    pub(crate) progress: Arc<Progress>,
    pub(crate) replies: Replies,
    /// Wakes the relay of notices.
    pub(crate) outbox_filled: Arc<Notify>,
    pub(crate) health: ProcessHealth,
    /// Whether the results belong to another store.
    pub(crate) standby: watch::Receiver<bool>,
    pub(crate) stop: CancellationToken,
}

impl<S: Store> Committer<S> {
    /// Finishes parcels until no more can come.
    pub(crate) async fn run(mut self) {
        let mut seen = Seen::default();
        while let Some(parcel) = self.parcels.recv().await {
            if !self.finish(parcel, &mut seen).await {
                return;
            }
            seen.summarise();
        }
    }

    /// Commits a parcel's group and acknowledges its deliveries; `false` if it had to leave them.
    async fn finish(&self, parcel: Parcel, seen: &mut Seen) -> bool {
        if *self.standby.borrow() {
            // All of it is back in its queue already, and another store takes it.
            self.progress.finish(parcel.deliveries);
            return true;
        }
        let group = Arc::new(parcel.group);
        if !Protection::CommitBeforeAck.is_enabled() {
            for (_, settler, tag) in &parcel.newest {
                settler.ack(*tag, true);
            }
        }
        let Some(committed) = self.commit(&group).await else { return false };
        self.progress.finish(parcel.deliveries);
        for (_, settler, tag) in parcel.newest {
            if !settler.ack(tag, true) {
                // The group comes again, and changes nothing then.
                tracing::debug!(?tag, "the channel of these deliveries is gone");
            }
        }
        if committed.notices > 0 {
            self.outbox_filled.notify_one();
        }
        self.replies.tell_unrouted(&group, &committed.given_up);
        seen.groups += 1;
        seen.deliveries += parcel.deliveries;
        seen.fresh += committed.fresh;
        seen.repeats += committed.repeats;
        true
    }

    /// Commits, however often it takes: a group that is not stored is never acknowledged. Meanwhile
    /// the prefetch runs full and the broker keeps the rest.
    async fn commit(&self, group: &Arc<Group>) -> Option<crate::aggregate::Committed> {
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

/// What was done since the last line of the log about it.
struct Seen {
    since: Instant,
    groups: usize,
    deliveries: usize,
    fresh: u64,
    repeats: u64,
}

impl Default for Seen {
    fn default() -> Self {
        Self { since: Instant::now(), groups: 0, deliveries: 0, fresh: 0, repeats: 0 }
    }
}

impl Seen {
    const EVERY: Duration = Duration::from_secs(10);

    fn summarise(&mut self) {
        if self.since.elapsed() >= Self::EVERY {
            let Self { groups, deliveries, fresh, repeats, .. } = *self;
            tracing::debug!(groups, deliveries, fresh, repeats, "committed");
            *self = Self::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_had_arrived_is_stored_when_all_is_done_or_enough_came_after_it() {
        let progress = Progress::default();
        assert!(progress.has_passed(progress.mark()));
        progress.begun.store(5, Ordering::Release);
        progress.finished.store(4, Ordering::Release);
        let mark = progress.mark();
        assert!(!progress.has_passed(mark), "a parcel is under way");
        progress.begun.store(9, Ordering::Release);
        progress.finished.store(7, Ordering::Release);
        assert!(!progress.has_passed(mark));
        progress.finished.store(8, Ordering::Release);
        assert!(progress.has_passed(mark));
    }
}
