//! Restores the order of the input for results that arrive in any order. Bookkeeping without IO.
//!
//! The number of waiting items is bounded by the caller, which starts no more than a window of
//! items beyond the oldest one that was not released.

use std::collections::BTreeMap;

/// Holds back items until all earlier ones have been released. Items are numbered from 0 without
/// gaps.
#[derive(Debug)]
pub(crate) struct InOrder<T> {
    /// `false`: release every item at once.
    keep: bool,
    next: u64,
    waiting: BTreeMap<u64, T>,
}

impl<T> InOrder<T> {
    /// Releases items in the order of their numbers, or with `keep` false in the order of arrival.
    pub(crate) const fn new(keep: bool) -> Self {
        Self { keep, next: 0, waiting: BTreeMap::new() }
    }

    /// Adds an item and returns all items whose turn has come.
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

    /// The number of released items.
    pub(crate) const fn released(&self) -> u64 {
        self.next
    }

    /// The items that still wait, in order; for an early end.
    pub(crate) fn rest(&mut self) -> impl Iterator<Item = T> {
        std::mem::take(&mut self.waiting).into_values()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_are_released_in_the_order_of_their_numbers() {
        let mut order = InOrder::new(true);
        let out: Vec<_> = [3, 0, 2, 1, 4].into_iter().flat_map(|n| order.push(n, n)).collect();
        assert_eq!(out, [0, 1, 2, 3, 4]);
        assert_eq!(order.released(), 5);
    }

    #[test]
    fn an_item_waits_for_all_earlier_ones() {
        let mut order = InOrder::new(true);
        assert!(order.push(1, 'b').is_empty());
        assert!(order.push(3, 'd').is_empty());
        assert_eq!(order.push(0, 'a'), ['a', 'b']);
        assert_eq!(order.rest().collect::<Vec<_>>(), ['d']);
    }

    #[test]
    fn without_order_items_are_released_at_once() {
        let mut order = InOrder::new(false);
        assert_eq!(order.push(7, 'x'), ['x']);
        assert_eq!(order.released(), 1);
    }
}
