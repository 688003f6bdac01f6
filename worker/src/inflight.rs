//! What this worker is doing, and has just done, by task and attempt.
//!
//! When a connection is lost, the broker delivers again what is still running here. Such a delivery
//! is adopted: the running attempt will settle it, and nothing runs twice. Likewise a message whose
//! successor was confirmed but whose acknowledgement got lost is acknowledged without a second run.
//! All this holds within one worker; a redelivery to another one does run again.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, PoisonError};

use foldhash::fast::RandomState;
use garenne_common::broker::DeliveryTag;
use garenne_common::failpoints::Protection;
use garenne_common::wire::Message;
use garenne_common::wire::lease::fence_of;
use garenne_common::{TaskId, TaskMessage};

/// At least so many settled attempts are remembered, and at most twice as many. A single one is
/// acknowledged soon after; one of a bundle with its last task only, and many quick ones may end while a
/// slow one of their bundle runs.
const REMEMBERED: usize = 32_768;

/// An attempt of a task, as one message asks for it.
///
/// The fence is that of the message: an attempt that is asked for again after its lease has lapsed is
/// another one, and must run although the first was, or is being, run here.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Key {
    /// Which task.
    pub id: TaskId,
    /// Which attempt of it.
    pub attempt: u32,
    /// The last execution under a lease that the message knows of.
    pub fence: u64,
}

impl Key {
    /// What a task asks for that came in a bundle: its first attempt.
    pub fn of_member(task: &TaskMessage) -> Self {
        Self { id: task.id.clone(), attempt: task.attempt, fence: 0 }
    }

    /// What this message asks for.
    pub fn of(task: &TaskMessage, message: &Message) -> Self {
        // What cannot be read counts as none, as it does where an execution begins.
        let fence = fence_of(message).unwrap_or(0);
        Self { id: task.id.clone(), attempt: task.attempt, fence }
    }
}

/// A delivery of one of the worker's queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeliveryRef {
    /// Which of the worker's queues, by position.
    pub queue: usize,
    /// Which delivery of it.
    pub tag: DeliveryTag,
}

/// What is to be done with a delivery.
#[derive(Debug, PartialEq, Eq)]
pub enum Begin {
    /// Run it.
    Run,
    /// It runs here already and will be settled with that run.
    Adopted,
    /// It was settled here already; acknowledge it.
    Settled,
}

/// The deliveries of one attempt: mostly one, for which nothing is allocated.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Deliveries {
    first: Option<DeliveryRef>,
    adopted: Vec<DeliveryRef>,
}

impl Deliveries {
    pub(crate) fn one(delivery: DeliveryRef) -> Self {
        Self { first: Some(delivery), adopted: vec![] }
    }
}

impl IntoIterator for Deliveries {
    type Item = DeliveryRef;
    type IntoIter =
        std::iter::Chain<std::option::IntoIter<DeliveryRef>, std::vec::IntoIter<DeliveryRef>>;

    fn into_iter(self) -> Self::IntoIter {
        self.first.into_iter().chain(self.adopted)
    }
}

/// The attempts of one worker; shared by intake and settling.
#[derive(Debug, Default)]
pub struct Inflight(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    running: HashMap<Key, Run, RandomState>,
    settled: Memory,
}

/// Keys in two generations: when the younger is full, the older is forgotten as a whole. To forget them
/// one by one would be to look each time at what nobody has looked at for long.
#[derive(Debug, Default)]
struct Memory {
    young: HashSet<Key, RandomState>,
    old: HashSet<Key, RandomState>,
}

/// A running attempt.
#[derive(Debug, Default)]
struct Run {
    deliveries: Deliveries,
    /// The collector has the task; what the broker delivers of it is a left-over.
    handed_over: bool,
}

impl Inflight {
    /// A delivery asks for this attempt.
    pub fn begin(&self, key: &Key, delivery: DeliveryRef) -> Begin {
        let mut state = self.lock();
        if let Some(known) = state.recognise(key, delivery) {
            return known;
        }
        let run = Run { deliveries: Deliveries::one(delivery), handed_over: false };
        state.running.insert(key.clone(), run);
        Begin::Run
    }

    /// Like [`begin`](Self::begin) for a delivery that will not run here in any case: `None` if this
    /// attempt is not known.
    pub fn recognise(&self, key: &Key, delivery: DeliveryRef) -> Option<Begin> {
        self.lock().recognise(key, delivery)
    }

    /// The attempt is over and its message has a confirmed successor: all deliveries to acknowledge.
    pub fn settled(&self, key: &Key) -> Deliveries {
        let mut state = self.lock();
        let forgotten = state.settled.insert(key.clone());
        let run = state.running.remove(key).unwrap_or_default();
        drop(state);
        // Takes a while, in which others need not wait.
        drop(forgotten);
        run.deliveries
    }

    /// The attempt goes on and its message has a confirmed successor: its deliveries to acknowledge.
    pub(crate) fn handed_over(&self, key: &Key) -> Deliveries {
        let mut state = self.lock();
        let Some(run) = state.running.get_mut(key) else { return Deliveries::default() };
        run.handed_over = true;
        std::mem::take(&mut run.deliveries)
    }

    /// The attempt is over but may rightly come again: all its deliveries.
    pub fn forgotten(&self, key: &Key) -> Deliveries {
        self.lock().running.remove(key).unwrap_or_default().deliveries
    }

    /// How many attempts run.
    pub(crate) fn len(&self) -> usize {
        self.lock().running.len()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn recognise(&mut self, key: &Key, delivery: DeliveryRef) -> Option<Begin> {
        if let Some(run) =
            self.running.get_mut(key).filter(|_| Protection::RunningRecognised.is_enabled())
        {
            if run.handed_over {
                return Some(Begin::Settled);
            }
            run.deliveries.adopted.push(delivery);
            return Some(Begin::Adopted);
        }
        let settled = self.settled.contains(key) && Protection::SettledRecognised.is_enabled();
        settled.then_some(Begin::Settled)
    }
}

impl Memory {
    /// Takes a key in; what is forgotten for it.
    fn insert(&mut self, key: Key) -> Option<HashSet<Key, RandomState>> {
        self.young.insert(key);
        if self.young.len() < REMEMBERED {
            return None;
        }
        let next = HashSet::with_capacity_and_hasher(REMEMBERED, RandomState::default());
        let full = std::mem::replace(&mut self.young, next);
        Some(std::mem::replace(&mut self.old, full))
    }

    fn contains(&self, key: &Key) -> bool {
        self.young.contains(key) || self.old.contains(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> Key {
        Key { id: TaskId::generate(), attempt: 1, fence: 0 }
    }

    fn all(deliveries: Deliveries) -> Vec<DeliveryRef> {
        deliveries.into_iter().collect()
    }

    fn delivery(epoch: u64) -> DeliveryRef {
        DeliveryRef { queue: 0, tag: DeliveryTag { epoch, number: 1 } }
    }

    #[test]
    fn a_redelivery_of_what_runs_is_adopted_and_settled_with_it() {
        let inflight = Inflight::default();
        let key = key();
        assert_eq!(inflight.begin(&key, delivery(1)), Begin::Run);
        assert_eq!(inflight.begin(&key, delivery(2)), Begin::Adopted);
        assert_eq!(all(inflight.settled(&key)), [delivery(1), delivery(2)]);
        assert_eq!(inflight.begin(&key, delivery(3)), Begin::Settled);
    }

    #[test]
    fn another_attempt_is_another_thing() {
        let inflight = Inflight::default();
        let key = key();
        inflight.settled(&key);
        let next = Key { attempt: 2, ..key.clone() };
        assert_eq!(inflight.begin(&next, delivery(1)), Begin::Run);
        let lapsed = Key { fence: 1, ..key };
        assert_eq!(inflight.begin(&lapsed, delivery(2)), Begin::Run);
    }

    #[test]
    fn what_the_collector_has_is_acknowledged_while_it_runs_on() {
        let inflight = Inflight::default();
        let key = key();
        inflight.begin(&key, delivery(1));
        assert_eq!(all(inflight.handed_over(&key)), [delivery(1)]);
        assert_eq!(inflight.begin(&key, delivery(2)), Begin::Settled);
        assert_eq!(all(inflight.settled(&key)), []);
    }

    #[test]
    fn what_was_handed_back_may_come_again() {
        let inflight = Inflight::default();
        let key = key();
        inflight.begin(&key, delivery(1));
        assert_eq!(all(inflight.forgotten(&key)), [delivery(1)]);
        assert_eq!(inflight.begin(&key, delivery(1)), Begin::Run);
    }

    #[test]
    fn the_memory_is_long_enough_and_bounded() {
        let inflight = Inflight::default();
        let first = key();
        inflight.settled(&first);
        for _ in 0..REMEMBERED {
            inflight.settled(&key());
        }
        assert_eq!(inflight.begin(&first, delivery(1)), Begin::Settled);
        for _ in 0..REMEMBERED {
            inflight.settled(&key());
        }
        assert_eq!(inflight.begin(&first, delivery(2)), Begin::Run);
        let state = inflight.lock();
        assert!(state.settled.young.len() + state.settled.old.len() <= 2 * REMEMBERED);
    }
}
