//! The attempts that this worker runs or has recently settled.
//!
//! When a connection is lost, the broker delivers running tasks again. Such a redelivery is attached to
//! the running attempt, which settles it as well, so that nothing runs twice. A redelivery of a message
//! whose successor was confirmed but whose acknowledgement was lost is acknowledged without another
//! run. Both hold within one worker: a redelivery to another worker runs again.

use std::collections::{HashMap, HashSet};

use foldhash::fast::RandomState;
use garenne_common::failpoints::Protection;
use garenne_common::wire::lease::fence_of;
use garenne_common::{TaskId, TaskMessage};
use parking_lot::Mutex;

use crate::intake::queue::DeliveryRef;
use crate::intake::source::TaskSource;

/// Minimum number of settled attempts that are remembered; the maximum is twice this number. A task of
/// a bundle is acknowledged with the last task of its bundle, and many short tasks may end before that.
const REMEMBERED: usize = 32_768;

/// Identifies an attempt of a task as one message requests it.
///
/// The fence is that of the message: an attempt that is requested again after its lease has lapsed is a
/// different one. It must run even if the first one has run, or is still running, in this worker.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct AttemptKey {
    /// The task.
    pub id: TaskId,
    /// The number of the attempt; the first one is 1.
    pub attempt: u32,
    /// The fence of the last execution under a lease that the message knows of; 0 if there was none.
    pub fence: u64,
}

impl AttemptKey {
    /// The attempt that a delivered task requests.
    pub fn of(task: &TaskMessage, source: &TaskSource) -> Self {
        let fence = match source {
            // An unreadable fence counts as none, as it does when an execution begins.
            TaskSource::Message(message) => fence_of(message).unwrap_or(0),
            // Leased tasks are never in bundles.
            TaskSource::Bundle { .. } => 0,
        };
        Self { id: task.id.clone(), attempt: task.attempt, fence }
    }

    /// The attempt that a task of a bundle requests.
    pub(crate) fn of_bundled(task: &TaskMessage) -> Self {
        Self { id: task.id.clone(), attempt: task.attempt, fence: 0 }
    }
}

/// What a worker knows of an attempt that a delivery requests.
#[derive(Debug, PartialEq, Eq)]
pub enum Registration {
    /// Nothing: it is to be run.
    New,
    /// It is running here; its settlement includes the delivery.
    AlreadyRunning,
    /// It was settled here; the delivery is to be acknowledged.
    AlreadySettled,
}

/// The deliveries of one attempt; usually one, for which nothing is allocated.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Deliveries {
    first: Option<DeliveryRef>,
    again: Vec<DeliveryRef>,
}

impl From<DeliveryRef> for Deliveries {
    fn from(delivery: DeliveryRef) -> Self {
        Self { first: Some(delivery), again: vec![] }
    }
}

impl IntoIterator for Deliveries {
    type Item = DeliveryRef;
    type IntoIter =
        std::iter::Chain<std::option::IntoIter<DeliveryRef>, std::vec::IntoIter<DeliveryRef>>;

    fn into_iter(self) -> Self::IntoIter {
        self.first.into_iter().chain(self.again)
    }
}

/// The attempts of one worker; shared by the pipeline and the settlement task.
#[derive(Debug, Default)]
pub struct KnownAttempts(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    running: HashMap<AttemptKey, RunningAttempt, RandomState>,
    settled: RecentKeys,
}

/// Keys in two generations. When the younger one is full, the older one is dropped as a whole: dropping
/// keys one by one would touch memory that has been cold for long.
#[derive(Debug, Default)]
struct RecentKeys {
    young: HashSet<AttemptKey, RandomState>,
    old: HashSet<AttemptKey, RandomState>,
}

#[derive(Debug, Default)]
struct RunningAttempt {
    deliveries: Deliveries,
    /// The collector holds the task under a lease; further deliveries of the message are obsolete.
    leased: bool,
}

impl KnownAttempts {
    /// Registers the attempt that a delivery requests, unless it is known.
    pub fn register(&self, key: &AttemptKey, delivery: DeliveryRef) -> Registration {
        let mut known = self.0.lock();
        if let Some(registration) = known.find(key, delivery) {
            return registration;
        }
        let attempt = RunningAttempt { deliveries: delivery.into(), leased: false };
        known.running.insert(key.clone(), attempt);
        Registration::New
    }

    /// Like [`register`](Self::register) for a delivery that does not run here in any case: `New` only
    /// means that the attempt is unknown.
    pub fn find(&self, key: &AttemptKey, delivery: DeliveryRef) -> Registration {
        self.0.lock().find(key, delivery).unwrap_or(Registration::New)
    }

    /// The attempt has ended and its successor is confirmed. Returns its deliveries, to be acknowledged.
    pub fn settle(&self, key: &AttemptKey) -> Deliveries {
        let mut known = self.0.lock();
        let dropped = known.settled.insert(key.clone());
        let attempt = known.running.remove(key).unwrap_or_default();
        drop(known);
        // Slow, and without the lock, so that others do not wait for it.
        drop(dropped);
        attempt.deliveries
    }

    /// The attempt continues under a confirmed lease. Returns its deliveries, to be acknowledged.
    pub(crate) fn lease(&self, key: &AttemptKey) -> Deliveries {
        let mut known = self.0.lock();
        let Some(attempt) = known.running.get_mut(key) else { return Deliveries::default() };
        attempt.leased = true;
        std::mem::take(&mut attempt.deliveries)
    }

    /// The attempt has ended and may arrive and run again. Returns its deliveries.
    pub fn forget(&self, key: &AttemptKey) -> Deliveries {
        self.0.lock().running.remove(key).unwrap_or_default().deliveries
    }

    /// The number of running attempts.
    pub(crate) fn len(&self) -> usize {
        self.0.lock().running.len()
    }
}

impl Known {
    fn find(&mut self, key: &AttemptKey, delivery: DeliveryRef) -> Option<Registration> {
        let running = self.running.get_mut(key);
        if let Some(attempt) = running.filter(|_| Protection::RunningRecognised.is_enabled()) {
            if attempt.leased {
                return Some(Registration::AlreadySettled);
            }
            attempt.deliveries.again.push(delivery);
            return Some(Registration::AlreadyRunning);
        }
        let settled = self.settled.contains(key) && Protection::SettledRecognised.is_enabled();
        settled.then_some(Registration::AlreadySettled)
    }
}

impl RecentKeys {
    /// Adds a key. Returns the generation that is dropped for it, if any.
    fn insert(&mut self, key: AttemptKey) -> Option<HashSet<AttemptKey, RandomState>> {
        self.young.insert(key);
        if self.young.len() < REMEMBERED {
            return None;
        }
        let next = HashSet::with_capacity_and_hasher(REMEMBERED, RandomState::default());
        let full = std::mem::replace(&mut self.young, next);
        Some(std::mem::replace(&mut self.old, full))
    }

    fn contains(&self, key: &AttemptKey) -> bool {
        self.young.contains(key) || self.old.contains(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::intake::queue::QueueIndex;
    use garenne_common::broker::DeliveryTag;

    fn key() -> AttemptKey {
        AttemptKey { id: TaskId::generate(), attempt: 1, fence: 0 }
    }

    fn all(deliveries: Deliveries) -> Vec<DeliveryRef> {
        deliveries.into_iter().collect()
    }

    fn delivery(epoch: u64) -> DeliveryRef {
        DeliveryRef { queue: QueueIndex(0), tag: DeliveryTag { epoch, number: 1 } }
    }

    #[test]
    fn a_redelivery_of_a_running_attempt_is_settled_with_it() {
        let known = KnownAttempts::default();
        let key = key();
        assert_eq!(known.register(&key, delivery(1)), Registration::New);
        assert_eq!(known.register(&key, delivery(2)), Registration::AlreadyRunning);
        assert_eq!(all(known.settle(&key)), [delivery(1), delivery(2)]);
        assert_eq!(known.register(&key, delivery(3)), Registration::AlreadySettled);
    }

    #[test]
    fn attempts_and_fences_are_told_apart() {
        let known = KnownAttempts::default();
        let key = key();
        known.settle(&key);
        let next = AttemptKey { attempt: 2, ..key.clone() };
        assert_eq!(known.register(&next, delivery(1)), Registration::New);
        let lapsed = AttemptKey { fence: 1, ..key };
        assert_eq!(known.register(&lapsed, delivery(2)), Registration::New);
    }

    #[test]
    fn a_leased_attempt_is_acknowledged_while_it_runs() {
        let known = KnownAttempts::default();
        let key = key();
        known.register(&key, delivery(1));
        assert_eq!(all(known.lease(&key)), [delivery(1)]);
        assert_eq!(known.register(&key, delivery(2)), Registration::AlreadySettled);
        assert_eq!(all(known.settle(&key)), []);
    }

    #[test]
    fn a_forgotten_attempt_may_run_again() {
        let known = KnownAttempts::default();
        let key = key();
        known.register(&key, delivery(1));
        assert_eq!(all(known.forget(&key)), [delivery(1)]);
        assert_eq!(known.register(&key, delivery(1)), Registration::New);
    }

    #[test]
    fn settled_attempts_are_remembered_in_bounded_memory() {
        let known = KnownAttempts::default();
        let first = key();
        known.settle(&first);
        for _ in 0..REMEMBERED {
            known.settle(&key());
        }
        assert_eq!(known.register(&first, delivery(1)), Registration::AlreadySettled);
        for _ in 0..REMEMBERED {
            known.settle(&key());
        }
        assert_eq!(known.register(&first, delivery(2)), Registration::New);
        let state = known.0.lock();
        assert!(state.settled.young.len() + state.settled.old.len() <= 2 * REMEMBERED);
    }
}
