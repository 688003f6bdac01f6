//! Progress of the settlement task, for the watchdog: counters that attempts and the settlement task write
//! and others read. Decides nothing.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Updated for every task, so without locks.
#[derive(Debug)]
pub(crate) struct SettleProgress {
    start: Instant,
    /// Number of settlements that attempts have submitted.
    submitted: AtomicU64,
    /// Number of settlements that are complete.
    concluded: AtomicU64,
    /// When the oldest unconfirmed successor was given to the publisher, in milliseconds since `start`;
    /// [`NONE`] if all are confirmed.
    oldest: AtomicU64,
}

const NONE: u64 = u64::MAX;

impl Default for SettleProgress {
    fn default() -> Self {
        Self {
            start: Instant::now(),
            submitted: AtomicU64::new(0),
            concluded: AtomicU64::new(0),
            oldest: AtomicU64::new(NONE),
        }
    }
}

impl SettleProgress {
    /// Records that a settlement is about to be sent to the settlement task.
    pub(crate) fn submitted(&self) {
        self.submitted.fetch_add(1, Ordering::Relaxed);
    }

    /// Records the state of the settlement task.
    pub(crate) fn update(&self, concluded: u64, oldest: Option<Instant>) {
        let millis = oldest.map(|oldest| oldest.saturating_duration_since(self.start).as_millis());
        let millis = millis.map_or(NONE, |millis| u64::try_from(millis).unwrap_or(NONE));
        self.concluded.store(concluded, Ordering::Relaxed);
        self.oldest.store(millis, Ordering::Relaxed);
    }

    /// Number of settlements that are complete.
    pub(crate) fn concluded(&self) -> u64 {
        self.concluded.load(Ordering::Relaxed)
    }

    /// Number of settlements that are not complete.
    pub(crate) fn open(&self) -> u64 {
        // In this order: a settlement that completes in between must not make the difference negative.
        let concluded = self.concluded();
        self.submitted.load(Ordering::Relaxed).saturating_sub(concluded)
    }

    /// How long the oldest unconfirmed successor has waited.
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
    fn open_settlements_and_the_age_of_the_oldest_are_known() {
        let progress = SettleProgress::default();
        progress.submitted();
        progress.submitted();
        assert_eq!((progress.open(), progress.oldest_unconfirmed()), (2, None));
        progress.update(1, Some(progress.start));
        assert_eq!(progress.open(), 1);
        assert!(progress.oldest_unconfirmed().is_some());
        progress.update(2, None);
        assert_eq!((progress.open(), progress.oldest_unconfirmed()), (0, None));
    }
}
