//! Detects stalls: groups that are not committed, outboxes that are not published, a store that cannot be
//! read. Reports them in the health of the process.
//!
//! The queues do not show a stall: the broker counts the prefetch as delivered, and `results` looks empty.

use std::sync::Arc;
use std::time::{Duration, Instant};

use garenne_common::ProcessHealth;
use tokio_util::sync::CancellationToken;

use crate::ingest::IngestProgress;
use crate::store::{Backlog, Store, StoreError, Waiting};

const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// Time without progress after which work is stalled; longer than a commit waits for a lock.
const STALL_TIMEOUT: Duration = Duration::from_secs(15);

pub(crate) struct Watchdog<S> {
    pub(crate) store: S,
    pub(crate) progress: Arc<IngestProgress>,
    pub(crate) health: ProcessHealth,
    pub(crate) stop: CancellationToken,
}

/// How long work has waited without progress.
#[derive(Debug, Default)]
struct Stall(Option<(u64, Instant)>);

impl Stall {
    /// `mark` identifies the first waiting item, `None` if there is none. While it is the same, there is no
    /// progress. Returns the time since it changed.
    fn observe(&mut self, mark: Option<u64>, now: Instant) -> Duration {
        match (mark, self.0) {
            (Some(mark), Some((before, since))) if mark == before => now.duration_since(since),
            (mark, _) => {
                self.0 = mark.map(|mark| (mark, now));
                Duration::ZERO
            }
        }
    }
}

impl<S: Store> Watchdog<S> {
    pub(crate) async fn run(self) {
        let stop = self.stop.clone();
        stop.run_until_cancelled(self.check_forever()).await;
    }

    async fn check_forever(self) {
        let (mut commits, mut notices, mut resends) =
            (Stall::default(), Stall::default(), Stall::default());
        loop {
            tokio::time::sleep(POLL_INTERVAL).await;
            self.check_commits(&mut commits);
            // A store that does not respond must not block the checks of commits.
            let backlog = tokio::time::timeout(STALL_TIMEOUT, self.store.backlog()).await;
            let Some(Backlog { notices: waiting, resends: returning }) = self.check_store(backlog)
            else {
                continue;
            };
            let stalled = [
                ("notices", stalled(&mut notices, waiting)),
                ("tasks to publish again", stalled(&mut resends, returning)),
            ];
            let stalled: Vec<_> = stalled
                .into_iter()
                .filter_map(|(what, age)| age.map(|age| describe(what, age)))
                .collect();
            let detail = (!stalled.is_empty()).then(|| stalled.join("; "));
            self.health.set("outbox_stalled", detail);
        }
    }

    fn check_commits(&self, commits: &mut Stall) {
        let uncommitted = self.progress.uncommitted();
        let mark = (uncommitted.groups > 0).then_some(uncommitted.finished);
        let age = commits.observe(mark, Instant::now());
        self.health.set(
            "commit_stalled",
            (age >= STALL_TIMEOUT).then(|| {
                format!(
                    "{} deliveries in {} groups wait for their commit, and none was committed for {} s",
                    uncommitted.deliveries,
                    uncommitted.groups,
                    age.as_secs()
                )
            }),
        );
    }

    fn check_store(
        &self,
        backlog: Result<Result<Backlog, StoreError>, tokio::time::error::Elapsed>,
    ) -> Option<Backlog> {
        let (readable, detail) = match backlog {
            Ok(Ok(backlog)) => (Some(backlog), None),
            Ok(Err(error)) => (None, Some(error.to_string())),
            Err(_) => {
                let detail =
                    format!("the store has not responded for {} s", STALL_TIMEOUT.as_secs());
                (None, Some(detail))
            }
        };
        self.health.set("store_unreadable", detail);
        readable
    }
}

fn stalled(stall: &mut Stall, waiting: Option<Waiting>) -> Option<(Duration, Waiting)> {
    let age = stall.observe(waiting.map(|waiting| waiting.oldest), Instant::now());
    waiting.filter(|_| age >= STALL_TIMEOUT).map(|waiting| (age, waiting))
}

fn describe(what: &str, (age, waiting): (Duration, Waiting)) -> String {
    let seconds = age.as_secs();
    format!("about {} {what} wait to be published, the oldest for {seconds} s", waiting.count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_waiting_items_without_progress_age() {
        let (mut commits, start) = (Stall::default(), Instant::now());
        let later = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(commits.observe(None, start), Duration::ZERO);
        assert_eq!(commits.observe(Some(7), later(100)), Duration::ZERO);
        assert_eq!(commits.observe(Some(7), later(120)), Duration::from_secs(20));
        assert_eq!(commits.observe(Some(8), later(130)), Duration::ZERO, "progress");
        assert_eq!(commits.observe(None, later(190)), Duration::ZERO, "nothing is waiting");
        assert_eq!(commits.observe(Some(8), later(191)), Duration::ZERO);
    }
}
