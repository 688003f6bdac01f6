//! Unacknowledged deliveries of one queue, and which of them can be acknowledged together.
//!
//! AMQP acknowledges either one delivery or all deliveries up to one. The second form is many times
//! cheaper and is correct if every earlier delivery of the channel has been settled. A bundle of tasks
//! is settled when each of its tasks is. No IO: the settlement task sends the acknowledgements.

use std::collections::{BTreeMap, BTreeSet};

use garenne_common::broker::DeliveryTag;
use garenne_common::failpoints::Protection;
use parking_lot::Mutex;

/// The unacknowledged deliveries of one queue.
#[derive(Debug, Default)]
pub struct UnackedDeliveries(Mutex<Unacked>);

impl UnackedDeliveries {
    /// Records a delivery. Must be called before anything can settle it. The first delivery of a newer
    /// epoch discards all older ones, which the broker delivers again.
    pub fn delivered(&self, tag: DeliveryTag) {
        self.0.lock().delivered(tag);
    }

    /// Records that a delivery is a bundle of this many tasks. Must be called before any of them can be
    /// settled.
    pub fn is_bundle_of(&self, tag: DeliveryTag, tasks: usize) {
        self.0.lock().is_bundle_of(tag, tasks);
    }

    /// Records that this many tasks of a delivery have confirmed successors. The delivery can be
    /// acknowledged once all of them have.
    pub(crate) fn settled(&self, tag: DeliveryTag, tasks: usize) {
        self.0.lock().settled(tag, tasks);
    }

    /// Removes a delivery that is about to be requeued. Returns `false` if it has been settled or
    /// requeued already, or belongs to an older epoch; the broker must not be told twice.
    pub(crate) fn requeued(&self, tag: DeliveryTag) -> bool {
        self.0.lock().requeued(tag)
    }

    /// Takes the acknowledgements that are due: one for all deliveries below the oldest unsettled one,
    /// then one for each other.
    pub(crate) fn take_acks(&self) -> Vec<Ack> {
        self.0.lock().take_acks()
    }
}

/// One acknowledgement to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ack {
    /// The delivery.
    pub tag: DeliveryTag,
    /// Whether it includes all earlier deliveries of the same epoch.
    pub multiple: bool,
}

#[derive(Debug, Default)]
struct Unacked {
    epoch: u64,
    /// Deliveries that are not settled, with the number of their tasks that are not.
    open: BTreeMap<u64, usize>,
    /// Deliveries that are settled and not acknowledged yet.
    settled: BTreeSet<u64>,
}

impl Unacked {
    fn delivered(&mut self, tag: DeliveryTag) {
        if tag.epoch > self.epoch {
            *self = Self { epoch: tag.epoch, ..Self::default() };
        }
        if tag.epoch == self.epoch {
            self.open.insert(tag.number, 1);
        }
    }

    fn is_bundle_of(&mut self, tag: DeliveryTag, tasks: usize) {
        if tag.epoch == self.epoch
            && let Some(left) = self.open.get_mut(&tag.number)
        {
            *left = tasks;
        }
    }

    fn settled(&mut self, tag: DeliveryTag, tasks: usize) {
        if tag.epoch != self.epoch {
            return;
        }
        let Some(left) = self.open.get_mut(&tag.number) else { return };
        *left = left.saturating_sub(tasks);
        if *left == 0 || !Protection::BundleShares.is_enabled() {
            self.open.remove(&tag.number);
            self.settled.insert(tag.number);
        }
    }

    fn requeued(&mut self, tag: DeliveryTag) -> bool {
        tag.epoch == self.epoch && self.open.remove(&tag.number).is_some()
    }

    fn take_acks(&mut self) -> Vec<Ack> {
        let single = match self.open.first_key_value() {
            Some((first_open, _)) => self.settled.split_off(first_open),
            None => BTreeSet::new(),
        };
        let together = std::mem::take(&mut self.settled);
        let ack =
            |number, multiple| Ack { tag: DeliveryTag { epoch: self.epoch, number }, multiple };
        let mut acks = Vec::with_capacity(1 + single.len());
        acks.extend(together.last().map(|&last| ack(last, together.len() > 1)));
        acks.extend(single.into_iter().map(|number| ack(number, false)));
        acks
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn tag(number: u64) -> DeliveryTag {
        DeliveryTag { epoch: 1, number }
    }

    fn delivered(numbers: std::ops::RangeInclusive<u64>) -> Unacked {
        let mut unacked = Unacked::default();
        numbers.for_each(|number| unacked.delivered(tag(number)));
        unacked
    }

    #[test]
    fn consecutive_settled_deliveries_share_one_acknowledgement() {
        let mut unacked = delivered(1..=4);
        for number in [2, 1, 3] {
            unacked.settled(tag(number), 1);
        }
        assert_eq!(unacked.take_acks(), [Ack { tag: tag(3), multiple: true }]);
        assert_eq!(unacked.take_acks(), []);
    }

    #[test]
    fn deliveries_beyond_an_open_one_are_acknowledged_one_by_one() {
        let mut unacked = delivered(1..=4);
        for number in [1, 3] {
            unacked.settled(tag(number), 1);
        }
        let expected = [Ack { tag: tag(1), multiple: false }, Ack { tag: tag(3), multiple: false }];
        assert_eq!(unacked.take_acks(), expected);
    }

    #[test]
    fn a_requeued_delivery_does_not_block_later_ones() {
        let mut unacked = delivered(1..=3);
        assert!(unacked.requeued(tag(1)));
        assert!(!unacked.requeued(tag(1)), "once");
        for number in [2, 3] {
            unacked.settled(tag(number), 1);
        }
        assert_eq!(unacked.take_acks(), [Ack { tag: tag(3), multiple: true }]);
    }

    #[test]
    fn a_bundle_is_acknowledged_with_its_last_task() {
        let mut unacked = delivered(1..=3);
        unacked.is_bundle_of(tag(2), 3);
        for (number, tasks) in [(1, 1), (2, 1), (3, 1), (2, 1)] {
            unacked.settled(tag(number), tasks);
        }
        let apart = [Ack { tag: tag(1), multiple: false }, Ack { tag: tag(3), multiple: false }];
        assert_eq!(unacked.take_acks(), apart);
        unacked.settled(tag(2), 1);
        assert_eq!(unacked.take_acks(), [Ack { tag: tag(2), multiple: false }]);
        unacked.settled(tag(2), 1);
        assert_eq!(unacked.take_acks(), []);
    }

    #[test]
    fn a_new_epoch_discards_the_old_one() {
        let mut unacked = delivered(1..=3);
        unacked.delivered(DeliveryTag { epoch: 2, number: 1 });
        unacked.settled(tag(2), 1);
        assert_eq!(unacked.take_acks(), []);
    }

    /// Settled deliveries are acknowledged exactly once and open ones never, in any order.
    #[test]
    fn random_orders_acknowledge_exactly_the_settled_deliveries() {
        for seed in 0..200 {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut unacked = delivered(1..=40);
            let mut order: Vec<u64> = (1..=40).collect();
            random.shuffle(&mut order);
            let (mut done, mut acked) = (HashSet::new(), HashSet::new());
            for number in order {
                if random.u8(..) < 30 {
                    assert!(unacked.requeued(tag(number)));
                } else {
                    unacked.settled(tag(number), 1);
                    done.insert(number);
                }
                if random.bool() {
                    for ack in unacked.take_acks() {
                        let newly: Vec<u64> = if ack.multiple {
                            (1..=ack.tag.number).filter(|n| done.contains(n)).collect()
                        } else {
                            vec![ack.tag.number]
                        };
                        if ack.multiple {
                            let first_open =
                                unacked.open.keys().next().copied().unwrap_or(u64::MAX);
                            assert!(ack.tag.number < first_open, "seed {seed}");
                        } else {
                            assert!(acked.insert(ack.tag.number), "seed {seed}: twice");
                        }
                        acked.extend(newly);
                    }
                }
            }
            unacked.take_acks().into_iter().for_each(|ack| {
                let numbers =
                    if ack.multiple { 1..=ack.tag.number } else { ack.tag.number..=ack.tag.number };
                acked.extend(numbers.filter(|n| done.contains(n)));
            });
            assert_eq!(acked, done, "seed {seed}");
        }
    }
}
