//! Forgets what is old: final records, attempts, dead letters, batches that are over. Never notices.
//!
//! A forgotten task that is delivered once more would count as new. So `collector.retention` must be
//! longer than any message can stay on its way: the longest delay (38 days at most, by the topology),
//! plus all retries, plus the longest outage. The default of 7 days suits tasks that are delayed by
//! less than a few days.
//!
//! Age is told by the wall clock, so nothing is deleted while that cannot be believed ([`crate::clock`]).

use std::time::{Duration, Instant};

use garenne_common::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::store::Store;

/// How often it looks for old records.
const LOOK: Duration = Duration::from_mins(1);
/// Records of each kind in one transaction: few, so that a group waits only milliseconds for it.
const SLICE: usize = 2_000;
/// Between two slices, so that groups come first. Slice and pause allow 200,000 records a second; beside
/// a collector at full speed it was seen to forget half as many as were stored, so the file grows for as
/// long as that lasts.
const PAUSE: Duration = Duration::from_millis(10);

pub(crate) struct Retention<S> {
    pub(crate) store: S,
    pub(crate) keep: Duration,
    /// When something was stored last before this process opened the store.
    pub(crate) last_commit: Option<Timestamp>,
    pub(crate) stop: CancellationToken,
}

impl<S: Store> Retention<S> {
    pub(crate) async fn run(self) {
        let stop = self.stop.clone();
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.forget_forever() => {}
        }
    }

    async fn forget_forever(&self) {
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
                tokio::time::sleep(LOOK).await;
                continue;
            }
            let forgotten = self.forget_all(now).await;
            if forgotten > 0 {
                tracing::debug!(records = forgotten, "forgotten");
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn forget_all(&self, now: Timestamp) -> usize {
        let now = now.as_millis();
        let keep = u64::try_from(self.keep.as_millis()).unwrap_or(u64::MAX);
        let before = Timestamp::from_millis(now.saturating_sub(keep));
        let mut all = 0;
        loop {
            match self.store.forget(before, SLICE).await {
                Ok(0) => return all,
                Ok(forgotten) => all += forgotten,
                Err(error) => {
                    tracing::warn!("old records were not deleted: {error}");
                    return all;
                }
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
}
