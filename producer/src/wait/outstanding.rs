//! Which tasks are waited for, and when the collector should be asked for them. Bookkeeping without
//! IO.
//!
//! Task ids come in with every submission and every result; results go to their waiters, and ids
//! that are due go to [`crate::query::recovery`], which queries the collector. Replies are best
//! effort: ids whose reply queue is gone are due soon and often, all others rarely.

use std::collections::HashMap;
use std::collections::hash_map::Entry as MapEntry;
use std::time::{Duration, Instant};

use foldhash::fast::RandomState;
use garenne_common::{Fingerprint, TaskId, TaskResult};
use tokio::sync::oneshot;

/// Intervals of queries for a task whose reply can no longer come.
const LOST: Intervals =
    Intervals { first: Duration::from_secs(2), longest: Duration::from_secs(10) };
/// Intervals of queries for a task whose reply may still come. Its queue may be long, so the
/// collector is asked rarely.
const USUAL: Intervals =
    Intervals { first: Duration::from_secs(15), longest: Duration::from_mins(5) };

struct Intervals {
    first: Duration,
    longest: Duration,
}

impl Intervals {
    /// The interval after `asked` queries: each is twice the one before.
    fn after(&self, asked: u8) -> Duration {
        // A shift by more than 16 would be far beyond the longest interval.
        (self.first * (1 << asked.min(16))).min(self.longest)
    }
}

/// The tasks that handles wait for; one entry for each id with a living handle.
#[derive(Default)]
pub(crate) struct Outstanding {
    entries: HashMap<TaskId, Entry, RandomState>,
    /// Further waiters for an id that has an entry, because the caller has chosen it and submitted
    /// it again.
    others: HashMap<TaskId, Vec<Waiter>, RandomState>,
    /// Number of the present reply queue. Entries of older queues get no reply any more.
    epoch: u64,
    tickets: u64,
    closed: bool,
}

/// A million entries may exist, and access to them takes much of the time of bulk submissions, so
/// they are kept small.
struct Entry {
    ask_at: Instant,
    /// Whether its reply can no longer come.
    lost: bool,
    asked: u8,
    waiter: Waiter,
}

struct Waiter {
    ticket: u64,
    /// Fingerprint of the task that it waits for, if the caller has chosen its id.
    fingerprint: Option<Fingerprint>,
    result: oneshot::Sender<Ended>,
}

/// How waiting for a task ends.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Ended {
    /// With its final record.
    Result(TaskResult),
    /// Another task with the same id has ended.
    Conflict,
}

impl Outstanding {
    /// Registers a wait for the result of `id`, whose reply goes to the reply queue number `epoch`.
    ///
    /// The returned ticket cancels it ([`forget`](Self::forget)).
    pub(crate) fn expect(
        &mut self,
        id: TaskId,
        fingerprint: Option<Fingerprint>,
        epoch: u64,
        now: Instant,
    ) -> (u64, oneshot::Receiver<Ended>) {
        self.tickets += 1;
        let (waiter, result) = oneshot::channel();
        // Nothing arrives after closing: the sender is dropped, which fails the receiver.
        if !self.closed {
            let waiter = Waiter { ticket: self.tickets, fingerprint, result: waiter };
            match self.entries.entry(id) {
                MapEntry::Vacant(place) => {
                    place.insert(Entry::new(waiter, epoch < self.epoch, now));
                }
                MapEntry::Occupied(known) => {
                    self.others.entry(known.key().clone()).or_default().push(waiter);
                }
            }
        }
        (self.tickets, result)
    }

    /// Gives a result to all that wait for it. A result that nothing waits for is dropped.
    pub(crate) fn resolve(&mut self, result: TaskResult) {
        let Some(entry) = self.entries.remove(&result.id) else { return };
        for other in self.others.remove(&result.id).unwrap_or_default() {
            give(other, result.clone());
        }
        give(entry.waiter, result);
    }

    /// The collector has the result of another task with this id: fails the waiters for the task with
    /// this fingerprint.
    pub(crate) fn conflict(&mut self, id: &TaskId, queried: Fingerprint) {
        let Some(entry) = self.entries.remove(id) else { return };
        let waiters = self.others.remove(id).unwrap_or_default().into_iter();
        for waiter in waiters.chain([entry.waiter]) {
            if waiter.fingerprint == Some(queried) {
                tell(waiter, Ended::Conflict);
                continue;
            }
            if self.entries.contains_key(id) {
                self.others.entry(id.clone()).or_default().push(waiter);
            } else {
                let (ask_at, lost, asked) = (entry.ask_at, entry.lost, entry.asked);
                self.entries.insert(id.clone(), Entry { ask_at, lost, asked, waiter });
            }
        }
    }

    /// Removes a waiter.
    pub(crate) fn forget(&mut self, id: &TaskId, ticket: u64) {
        let Some(entry) = self.entries.get_mut(id) else { return };
        let Some(others) = self.others.get_mut(id) else {
            if entry.waiter.ticket == ticket {
                self.entries.remove(id);
            }
            return;
        };
        if entry.waiter.ticket == ticket
            && let Some(other) = others.pop()
        {
            entry.waiter = other;
        } else {
            others.retain(|other| other.ticket != ticket);
        }
        if others.is_empty() {
            self.others.remove(id);
        }
    }

    /// Starts a new epoch because the reply queue has a new name: replies to the old one are lost.
    ///
    /// Returns the number of the new queue; the first is 1.
    pub(crate) fn next_epoch(&mut self, now: Instant) -> u64 {
        self.epoch += 1;
        for entry in self.entries.values_mut() {
            entry.lose(now);
        }
        self.epoch
    }

    /// Up to `limit` ids that the collector should be asked for now; schedules their next query.
    pub(crate) fn due(&mut self, limit: usize, now: Instant) -> Vec<(TaskId, Option<Fingerprint>)> {
        let due = self.entries.iter_mut().filter(|(_, entry)| entry.ask_at <= now).take(limit);
        due.map(|(id, entry)| {
            entry.ask_again(now);
            (id.clone(), entry.waiter.fingerprint)
        })
        .collect()
    }

    /// Fails all present and future waiters: no result will arrive any more.
    pub(crate) fn close(&mut self) {
        self.closed = true;
        self.entries.clear();
        self.others.clear();
    }
}

impl Entry {
    fn new(waiter: Waiter, lost: bool, now: Instant) -> Self {
        let ask_at = if lost { now } else { now + USUAL.first };
        Self { ask_at, lost, asked: 0, waiter }
    }

    /// Its reply can no longer come.
    fn lose(&mut self, now: Instant) {
        (self.ask_at, self.lost, self.asked) = (now, true, 0);
    }

    /// Notes that the collector is asked for it now, and schedules the next query.
    fn ask_again(&mut self, now: Instant) {
        let intervals = if self.lost { LOST } else { USUAL };
        self.ask_at = now + intervals.after(self.asked);
        self.asked = self.asked.saturating_add(1);
    }
}

fn give(waiter: Waiter, result: TaskResult) {
    let fingerprints = waiter.fingerprint.zip(result.fingerprint);
    let same = fingerprints.is_none_or(|(expected, found)| expected == found);
    tell(waiter, if same { Ended::Result(result) } else { Ended::Conflict });
}

fn tell(waiter: Waiter, ended: Ended) {
    if waiter.result.send(ended).is_err() {
        tracing::trace!("result dropped: its handle is gone");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use garenne_common::{QueueName, Status, TaskName, Timestamp};

    fn id(text: &str) -> TaskId {
        TaskId::new(text).unwrap()
    }

    fn result(text: &str) -> TaskResult {
        TaskResult {
            id: id(text),
            name: TaskName::new("a.b").unwrap(),
            queue: QueueName::default(),
            batch: None,
            status: Status::Cancelled,
            output: None,
            error: None,
            reason: None,
            attempt: 1,
            redelivered: false,
            worker: "w".into(),
            started_at: Timestamp::from_millis(0),
            finished_at: Timestamp::from_millis(0),
            fingerprint: None,
        }
    }

    #[test]
    fn every_waiter_for_an_id_gets_its_result_once() {
        let mut outstanding = Outstanding::default();
        let now = Instant::now();
        let (_, mut first) = outstanding.expect(id("a"), None, 0, now);
        let (_, mut second) = outstanding.expect(id("a"), None, 0, now);
        outstanding.resolve(result("unknown"));
        outstanding.resolve(result("a"));
        outstanding.resolve(result("a"));
        assert_eq!(first.try_recv(), Ok(Ended::Result(result("a"))));
        assert_eq!(second.try_recv(), Ok(Ended::Result(result("a"))));
        assert!(outstanding.entries.is_empty());
    }

    #[test]
    fn forgetting_all_waiters_of_an_id_removes_its_entry() {
        let mut outstanding = Outstanding::default();
        let (ticket, _one) = outstanding.expect(id("a"), None, 0, Instant::now());
        let (other, mut two) = outstanding.expect(id("a"), None, 0, Instant::now());
        outstanding.forget(&id("a"), ticket);
        outstanding.resolve(result("a"));
        assert!(two.try_recv().is_ok());
        outstanding.forget(&id("a"), other);
        assert!(outstanding.entries.is_empty() && outstanding.others.is_empty());
    }

    #[test]
    fn an_entry_and_its_id_fit_a_cache_line() {
        assert_eq!(size_of::<(TaskId, Entry)>(), 64);
    }

    #[test]
    fn any_of_three_waiters_for_an_id_can_be_forgotten() {
        for gone in 0..3 {
            let mut outstanding = Outstanding::default();
            let expect = |_| outstanding.expect(id("a"), None, 0, Instant::now());
            let mut waiting: Vec<_> = (0..3).map(expect).collect();
            let (ticket, _) = waiting.remove(gone);
            outstanding.forget(&id("a"), ticket);
            outstanding.resolve(result("a"));
            assert!(waiting.iter_mut().all(|(_, waiter)| waiter.try_recv().is_ok()), "{gone}");
            assert!(outstanding.entries.is_empty() && outstanding.others.is_empty());
        }
    }

    #[test]
    fn the_collector_is_asked_rarely_while_replies_can_come() {
        let mut outstanding = Outstanding::default();
        let start = Instant::now();
        let _waiter = outstanding.expect(id("a"), None, 0, start);
        let asked: Vec<u64> = (0..1000)
            .filter(|s| !outstanding.due(9, start + Duration::from_secs(*s)).is_empty())
            .collect();
        assert_eq!(asked, [15, 30, 60, 120, 240, 480, 780]);
    }

    #[test]
    fn a_lost_reply_queue_makes_every_id_due_at_once_and_again() {
        let mut outstanding = Outstanding::default();
        let start = Instant::now();
        let waiters: Vec<_> =
            (0..5).map(|n| outstanding.expect(id(&n.to_string()), None, 0, start)).collect();
        assert!(outstanding.due(9, start).is_empty());
        assert_eq!(outstanding.next_epoch(start), 1);
        assert_eq!(outstanding.due(3, start).len(), 3);
        assert_eq!(outstanding.due(3, start).len(), 2);
        assert!(outstanding.due(3, start).is_empty());
        assert_eq!(outstanding.due(9, start + Duration::from_secs(2)).len(), 5);
        drop(waiters);
    }

    #[test]
    fn a_submission_that_raced_with_the_loss_of_its_reply_queue_is_due_at_once() {
        let mut outstanding = Outstanding::default();
        let now = Instant::now();
        let (old, new) = (outstanding.next_epoch(now), outstanding.next_epoch(now));
        let _late = outstanding.expect(id("late"), None, old, now);
        let _fresh = outstanding.expect(id("fresh"), None, new, now);
        assert_eq!(outstanding.due(9, now), [(id("late"), None)]);
    }

    #[test]
    fn closing_fails_present_and_future_waiters() {
        let mut outstanding = Outstanding::default();
        let (_, mut before) = outstanding.expect(id("a"), None, 0, Instant::now());
        outstanding.close();
        let (_, mut after) = outstanding.expect(id("b"), None, 0, Instant::now());
        assert_eq!(before.try_recv(), Err(oneshot::error::TryRecvError::Closed));
        assert_eq!(after.try_recv(), Err(oneshot::error::TryRecvError::Closed));
    }

    #[test]
    fn a_task_with_a_taken_id_conflicts_and_others_wait_on() {
        let mut outstanding = Outstanding::default();
        let (first, second) = (Fingerprint::from_u64(1), Fingerprint::from_u64(2));
        let expect = |of: &mut Outstanding, fingerprint| {
            of.expect(id("a"), fingerprint, 0, Instant::now()).1
        };
        let (mut one, mut two) =
            (expect(&mut outstanding, Some(first)), expect(&mut outstanding, Some(second)));
        outstanding.conflict(&id("a"), second);
        assert_eq!(two.try_recv(), Ok(Ended::Conflict));
        assert!(one.try_recv().is_err());
        let mut two = expect(&mut outstanding, Some(second));
        let result = TaskResult { fingerprint: Some(first), ..result("a") };
        outstanding.resolve(result.clone());
        assert_eq!(one.try_recv(), Ok(Ended::Result(result)));
        assert_eq!(two.try_recv(), Ok(Ended::Conflict));
        assert!(outstanding.entries.is_empty() && outstanding.others.is_empty());
    }
}
