//! Which deliveries of one consumer can be acknowledged together: arithmetic over delivery numbers.
//!
//! AMQP acknowledges either one delivery or all up to one. "All up to" is many times cheaper, and
//! right exactly when every earlier delivery of the epoch is settled. A bundle of tasks is settled when
//! each of its tasks is: it has as many shares.

use std::collections::{BTreeMap, BTreeSet};

use garenne_common::broker::DeliveryTag;
use garenne_common::failpoints::Protection;

/// The unsettled deliveries of one consumer in its present epoch.
#[derive(Debug, Default)]
pub(crate) struct Acks {
    epoch: u64,
    /// Delivered, and neither done nor handed back; with the shares that are still to be done.
    open: BTreeMap<u64, usize>,
    /// Done, and not yet acknowledged.
    done: BTreeSet<u64>,
}

/// One acknowledgement to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ack {
    /// Of which delivery.
    pub tag: DeliveryTag,
    /// Whether also of all before it in its epoch.
    pub multiple: bool,
}

impl Acks {
    /// A delivery arrived. One of a newer epoch makes all older ones void.
    pub(crate) fn delivered(&mut self, tag: DeliveryTag) {
        if tag.epoch > self.epoch {
            *self = Self { epoch: tag.epoch, ..Self::default() };
        }
        if tag.epoch == self.epoch {
            self.open.insert(tag.number, 1);
        }
    }

    /// A delivery turned out to be a bundle of so many tasks.
    pub(crate) fn divided(&mut self, tag: DeliveryTag, shares: usize) {
        if tag.epoch == self.epoch
            && let Some(left) = self.open.get_mut(&tag.number)
        {
            *left = shares;
        }
    }

    /// So many shares of a delivery have confirmed successors; with the last one it may be acknowledged.
    pub(crate) fn done(&mut self, tag: DeliveryTag, shares: usize) {
        if tag.epoch != self.epoch {
            return;
        }
        let Some(left) = self.open.get_mut(&tag.number) else { return };
        *left = left.saturating_sub(shares);
        if *left == 0 || !Protection::BundleShares.is_enabled() {
            self.open.remove(&tag.number);
            self.done.insert(tag.number);
        }
    }

    /// A delivery is to be handed back; `false` if it was settled or handed back before, which the broker
    /// must not hear twice. A bundle goes back as a whole.
    pub(crate) fn handed_back(&mut self, tag: DeliveryTag) -> bool {
        tag.epoch == self.epoch && self.open.remove(&tag.number).is_some()
    }

    /// What to send now: one for all that lie below every open one, then one each.
    pub(crate) fn take(&mut self) -> Vec<Ack> {
        let beyond = match self.open.first_key_value() {
            Some((first_open, _)) => self.done.split_off(first_open),
            None => BTreeSet::new(),
        };
        let together = std::mem::take(&mut self.done);
        let ack =
            |number, multiple| Ack { tag: DeliveryTag { epoch: self.epoch, number }, multiple };
        let mut acks = Vec::with_capacity(1 + beyond.len());
        acks.extend(together.last().map(|&last| ack(last, together.len() > 1)));
        acks.extend(beyond.into_iter().map(|number| ack(number, false)));
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

    fn delivered(numbers: std::ops::RangeInclusive<u64>) -> Acks {
        let mut acks = Acks::default();
        numbers.for_each(|number| acks.delivered(tag(number)));
        acks
    }

    #[test]
    fn a_finished_run_is_one_ack() {
        let mut acks = delivered(1..=4);
        for number in [2, 1, 3] {
            acks.done(tag(number), 1);
        }
        assert_eq!(acks.take(), [Ack { tag: tag(3), multiple: true }]);
        assert_eq!(acks.take(), []);
    }

    #[test]
    fn a_slow_task_does_not_hold_up_the_others() {
        let mut acks = delivered(1..=4);
        for number in [1, 3] {
            acks.done(tag(number), 1);
        }
        let expected = [Ack { tag: tag(1), multiple: false }, Ack { tag: tag(3), multiple: false }];
        assert_eq!(acks.take(), expected);
    }

    #[test]
    fn what_was_handed_back_is_not_in_the_way() {
        let mut acks = delivered(1..=3);
        assert!(acks.handed_back(tag(1)));
        assert!(!acks.handed_back(tag(1)), "once");
        for number in [2, 3] {
            acks.done(tag(number), 1);
        }
        assert_eq!(acks.take(), [Ack { tag: tag(3), multiple: true }]);
    }

    #[test]
    fn a_bundle_is_acknowledged_with_its_last_task() {
        let mut acks = delivered(1..=3);
        acks.divided(tag(2), 3);
        for (number, shares) in [(1, 1), (2, 1), (3, 1), (2, 1)] {
            acks.done(tag(number), shares);
        }
        let apart = [Ack { tag: tag(1), multiple: false }, Ack { tag: tag(3), multiple: false }];
        assert_eq!(acks.take(), apart);
        acks.done(tag(2), 1);
        assert_eq!(acks.take(), [Ack { tag: tag(2), multiple: false }]);
        acks.done(tag(2), 1);
        assert_eq!(acks.take(), []);
    }

    #[test]
    fn a_new_epoch_voids_the_old_one() {
        let mut acks = delivered(1..=3);
        acks.delivered(DeliveryTag { epoch: 2, number: 1 });
        acks.done(tag(2), 1);
        assert_eq!(acks.take(), []);
    }

    /// Every done delivery is acknowledged exactly once, no open one ever, whatever the order.
    #[test]
    fn random_orders_acknowledge_exactly_what_is_done() {
        for seed in 0..200 {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut acks = delivered(1..=40);
            let mut order: Vec<u64> = (1..=40).collect();
            random.shuffle(&mut order);
            let (mut done, mut acked) = (HashSet::new(), HashSet::new());
            for number in order {
                if random.u8(..) < 30 {
                    assert!(acks.handed_back(tag(number)));
                } else {
                    acks.done(tag(number), 1);
                    done.insert(number);
                }
                if random.bool() {
                    for ack in acks.take() {
                        let newly: Vec<u64> = if ack.multiple {
                            (1..=ack.tag.number).filter(|n| done.contains(n)).collect()
                        } else {
                            vec![ack.tag.number]
                        };
                        if ack.multiple {
                            let first_open = acks.open.keys().next().copied().unwrap_or(u64::MAX);
                            assert!(ack.tag.number < first_open, "seed {seed}");
                        } else {
                            assert!(acked.insert(ack.tag.number), "seed {seed}: twice");
                        }
                        acked.extend(newly);
                    }
                }
            }
            acks.take().into_iter().for_each(|ack| {
                let numbers =
                    if ack.multiple { 1..=ack.tag.number } else { ack.tag.number..=ack.tag.number };
                acked.extend(numbers.filter(|n| done.contains(n)));
            });
            assert_eq!(acked, done, "seed {seed}");
        }
    }
}
