//! Deletes old final records, attempts, dead letters and ended batches. Never deletes notices.
//!
//! A deleted task that is delivered again counts as new. So `collector.retention` must be longer than any
//! message can be under way: the longest delay (at most 38 days, by the topology), plus all retries, plus the
//! longest outage. The default of 7 days suits tasks that are delayed by less than a few days.
//!
//! Ages are measured by the wall clock, so nothing is deleted while that may be wrong
//! ([`crate::rules::clock`]).

use std::time::{Duration, Instant};

use garenne_common::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::rules::clock::Clock;
use crate::store::Store;

/// How often old records are deleted.
const POLL_INTERVAL: Duration = Duration::from_mins(1);
/// Records of each kind in one transaction. Few, so that a group waits for it only milliseconds.
const SLICE: usize = 2_000;
/// Pause between two transactions, so that groups take precedence. Slice and pause allow 200,000 records per
/// second. Beside a collector at full speed, half as many records were deleted as stored (measured), so the
/// file grows while that lasts.
const PAUSE: Duration = Duration::from_millis(10);

pub(crate) struct Retention<S> {
    pub(crate) store: S,
    pub(crate) keep: Duration,
    /// The last commit before this process opened the store.
    pub(crate) last_commit: Option<Timestamp>,
    pub(crate) stop: CancellationToken,
}

impl<S: Store> Retention<S> {
    pub(crate) async fn run(self) {
        let stop = self.stop.clone();
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.delete_forever() => {}
        }
    }

    async fn delete_forever(&self) {
        let mut clock = Clock::new(Timestamp::now(), Instant::now());
        if let Some(gap) = clock.opened(self.last_commit) {
            let hours = gap.as_secs() / 3_600;
            tracing::warn!(
                "the last commit is {hours} hours old, or the clock is wrong; nothing is deleted for 24 hours"
            );
        }
        loop {
            let (now, running) = (Timestamp::now(), Instant::now());
            if let Some(jump) = clock.jumped(now, running) {
                let minutes = jump.as_secs() / 60;
                tracing::warn!(
                    "the clock jumped ahead by {minutes} minutes; nothing is deleted for 24 hours"
                );
            }
            if clock.is_held(running) {
                tokio::time::sleep(POLL_INTERVAL).await;
                continue;
            }
            let deleted = self.delete_old(now).await;
            if deleted > 0 {
                tracing::debug!(records = deleted, "old records deleted");
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    async fn delete_old(&self, now: Timestamp) -> usize {
        let now = now.as_millis();
        let keep = u64::try_from(self.keep.as_millis()).unwrap_or(u64::MAX);
        let before = Timestamp::from_millis(now.saturating_sub(keep));
        let mut all = 0;
        loop {
            match self.store.delete_old(before, SLICE).await {
                Ok(0) => return all,
                Ok(deleted) => all += deleted,
                Err(error) => {
                    tracing::warn!("old records were not deleted: {error}");
                    return all;
                }
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
}
