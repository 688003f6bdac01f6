//! What this worker is doing, and has just done, by task and attempt.
//!
//! When a connection is lost, the broker delivers again what is still running here. Such a delivery
//! is adopted: the running attempt will settle it, and nothing runs twice. Likewise a message whose
//! successor was confirmed but whose acknowledgement got lost is acknowledged without a second run.
//! All this holds within one worker; a redelivery to another one does run again.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Mutex, PoisonError};

use garenne_common::TaskId;
use garenne_common::broker::DeliveryTag;

/// How many settled attempts are remembered: more than prefetch ever allows to be under way.
const REMEMBERED: usize = 16_384;

/// An attempt of a task.
pub type Key = (TaskId, u32);

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

/// The attempts of one worker; shared by intake and settling.
#[derive(Debug, Default)]
pub struct Inflight(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    running: HashMap<Key, Run>,
    settled: HashSet<Key>,
    settled_order: VecDeque<Key>,
}

/// A running attempt.
#[derive(Debug, Default)]
struct Run {
    deliveries: Vec<DeliveryRef>,
    /// The collector has the task; what the broker delivers of it is a left-over.
    handed_over: bool,
}

impl Inflight {
    /// A delivery asks for this attempt.
    pub fn begin(&self, key: &Key, delivery: DeliveryRef) -> Begin {
        let mut state = self.lock();
        if let Some(run) = state.running.get_mut(key) {
            if run.handed_over {
                return Begin::Settled;
            }
            run.deliveries.push(delivery);
            return Begin::Adopted;
        }
        if state.settled.contains(key) {
            return Begin::Settled;
        }
        let run = Run { deliveries: vec![delivery], handed_over: false };
        state.running.insert(key.clone(), run);
        Begin::Run
    }

    /// The attempt is over and its message has a confirmed successor: all deliveries to acknowledge.
    pub fn settled(&self, key: &Key) -> Vec<DeliveryRef> {
        let mut state = self.lock();
        if state.settled.insert(key.clone()) {
            state.settled_order.push_back(key.clone());
        }
        if state.settled_order.len() > REMEMBERED
            && let Some(oldest) = state.settled_order.pop_front()
        {
            state.settled.remove(&oldest);
        }
        state.running.remove(key).unwrap_or_default().deliveries
    }

    /// The attempt goes on and its message has a confirmed successor: its deliveries to acknowledge.
    pub(crate) fn handed_over(&self, key: &Key) -> Vec<DeliveryRef> {
        let mut state = self.lock();
        let Some(run) = state.running.get_mut(key) else { return vec![] };
        run.handed_over = true;
        std::mem::take(&mut run.deliveries)
    }

    /// The attempt is over but may rightly come again: all its deliveries.
    pub fn forgotten(&self, key: &Key) -> Vec<DeliveryRef> {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn delivery(epoch: u64) -> DeliveryRef {
        DeliveryRef { queue: 0, tag: DeliveryTag { epoch, number: 1 } }
    }

    #[test]
    fn a_redelivery_of_what_runs_is_adopted_and_settled_with_it() {
        let inflight = Inflight::default();
        let key = (TaskId::generate(), 1);
        assert_eq!(inflight.begin(&key, delivery(1)), Begin::Run);
        assert_eq!(inflight.begin(&key, delivery(2)), Begin::Adopted);
        assert_eq!(inflight.settled(&key), [delivery(1), delivery(2)]);
        assert_eq!(inflight.begin(&key, delivery(3)), Begin::Settled);
    }

    #[test]
    fn another_attempt_is_another_thing() {
        let inflight = Inflight::default();
        let id = TaskId::generate();
        inflight.settled(&(id.clone(), 1));
        assert_eq!(inflight.begin(&(id, 2), delivery(1)), Begin::Run);
    }

    #[test]
    fn what_the_collector_has_is_acknowledged_while_it_runs_on() {
        let inflight = Inflight::default();
        let key = (TaskId::generate(), 1);
        inflight.begin(&key, delivery(1));
        assert_eq!(inflight.handed_over(&key), [delivery(1)]);
        assert_eq!(inflight.begin(&key, delivery(2)), Begin::Settled);
        assert_eq!(inflight.settled(&key), []);
    }

    #[test]
    fn what_was_handed_back_may_come_again() {
        let inflight = Inflight::default();
        let key = (TaskId::generate(), 1);
        inflight.begin(&key, delivery(1));
        assert_eq!(inflight.forgotten(&key), [delivery(1)]);
        assert_eq!(inflight.begin(&key, delivery(1)), Begin::Run);
    }

    #[test]
    fn the_memory_is_bounded() {
        let inflight = Inflight::default();
        for _ in 0..REMEMBERED + 10 {
            inflight.settled(&(TaskId::generate(), 1));
        }
        assert_eq!(inflight.lock().settled.len(), REMEMBERED);
    }
}
