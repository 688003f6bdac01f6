//! Puts what ends in any order back into the order of the input: pure bookkeeping.
//!
//! How much may wait here is bounded by its user, who does not begin more than a window of items
//! beyond the oldest one that has not come out.

use std::collections::BTreeMap;

/// Holds back what ended before its turn. Items are numbered from 0 without gaps.
#[derive(Debug)]
pub(crate) struct InOrder<T> {
    /// `false`: let everything out at once.
    keep: bool,
    next: u64,
    waiting: BTreeMap<u64, T>,
}

impl<T> InOrder<T> {
    /// In the order of the numbers, or with `keep` false in the order of arrival.
    pub(crate) const fn new(keep: bool) -> Self {
        Self { keep, next: 0, waiting: BTreeMap::new() }
    }

    /// Takes an item in and lets out all whose turn has come.
    pub(crate) fn push(&mut self, number: u64, item: T) -> Vec<T> {
        if !self.keep {
            self.next += 1;
            return vec![item];
        }
        self.waiting.insert(number, item);
        let mut out = vec![];
        while let Some(item) = self.waiting.remove(&self.next) {
            self.next += 1;
            out.push(item);
        }
        out
    }

    /// How many came out.
    pub(crate) const fn released(&self) -> u64 {
        self.next
    }

    /// What still waits, in order; for an end before the end.
    pub(crate) fn rest(&mut self) -> impl Iterator<Item = T> {
        std::mem::take(&mut self.waiting).into_values()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_the_order_of_arrival_the_order_out_is_that_of_the_numbers() {
        let mut order = InOrder::new(true);
        let out: Vec<_> = [3, 0, 2, 1, 4].into_iter().flat_map(|n| order.push(n, n)).collect();
        assert_eq!(out, [0, 1, 2, 3, 4]);
        assert_eq!(order.released(), 5);
    }

    #[test]
    fn an_item_waits_for_the_one_before_it() {
        let mut order = InOrder::new(true);
        assert!(order.push(1, 'b').is_empty());
        assert!(order.push(3, 'd').is_empty());
        assert_eq!(order.push(0, 'a'), ['a', 'b']);
        assert_eq!(order.rest().collect::<Vec<_>>(), ['d']);
    }

    #[test]
    fn unordered_means_as_they_come() {
        let mut order = InOrder::new(false);
        assert_eq!(order.push(7, 'x'), ['x']);
        assert_eq!(order.released(), 1);
    }
}
