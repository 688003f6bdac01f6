//! How far settling has got, for the watchdog: counters that the settling task and the attempts write
//! and others read. Decides nothing.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Written on the way of every task, so no locks.
#[derive(Debug)]
pub(crate) struct SettleGauge {
    start: Instant,
    /// Settlements that attempts wanted to hand over.
    submitted: AtomicU64,
    /// Settlements that have ended.
    concluded: AtomicU64,
    /// When the oldest unconfirmed successor was handed to the publisher, in milliseconds after
    /// `start`; [`NONE`] if all are confirmed.
    oldest: AtomicU64,
}

const NONE: u64 = u64::MAX;

impl Default for SettleGauge {
    fn default() -> Self {
        Self {
            start: Instant::now(),
            submitted: AtomicU64::new(0),
            concluded: AtomicU64::new(0),
            oldest: AtomicU64::new(NONE),
        }
    }
}

impl SettleGauge {
    /// A settlement is about to be handed to the settling task.
    pub(crate) fn submit(&self) {
        self.submitted.fetch_add(1, Ordering::Relaxed);
    }

    /// What the settling task has done so far.
    pub(crate) fn update(&self, concluded: u64, oldest: Option<Instant>) {
        let millis = oldest.map(|oldest| oldest.saturating_duration_since(self.start).as_millis());
        let millis = millis.map_or(NONE, |millis| u64::try_from(millis).unwrap_or(NONE));
        self.concluded.store(concluded, Ordering::Relaxed);
        self.oldest.store(millis, Ordering::Relaxed);
    }

    /// Settlements that have ended.
    pub(crate) fn concluded(&self) -> u64 {
        self.concluded.load(Ordering::Relaxed)
    }

    /// Settlements that have begun and not ended.
    pub(crate) fn open(&self) -> u64 {
        // In this order, or one that ends in between would count less than nothing.
        let concluded = self.concluded();
        self.submitted.load(Ordering::Relaxed).saturating_sub(concluded)
    }

    /// How long the oldest successor has waited for its confirm.
    pub(crate) fn oldest_unconfirmed(&self) -> Option<Duration> {
        match self.oldest.load(Ordering::Relaxed) {
            NONE => None,
            millis => Some(self.start.elapsed().saturating_sub(Duration::from_millis(millis))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_open_and_how_old_the_oldest_is() {
        let gauge = SettleGauge::default();
        gauge.submit();
        gauge.submit();
        assert_eq!((gauge.open(), gauge.oldest_unconfirmed()), (2, None));
        gauge.update(1, Some(gauge.start));
        assert_eq!(gauge.open(), 1);
        assert!(gauge.oldest_unconfirmed().is_some());
        gauge.update(2, None);
        assert_eq!((gauge.open(), gauge.oldest_unconfirmed()), (0, None));
    }
}
