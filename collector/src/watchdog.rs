//! Looks whether work moves: groups are committed, outboxes are published, the store can be read.
//!
//! What stands still beyond a bound is a problem of the process, with what is waited for. The queue
//! does not show it: the broker counts what the prefetch holds as delivered, and `results` looks empty.

use std::sync::Arc;
use std::time::{Duration, Instant};

use garenne_common::ProcessHealth;
use tokio_util::sync::CancellationToken;

use crate::pipeline::Progress;
use crate::store::{Backlog, Store, StoreError, Waiting};

/// How often it looks.
const LOOK: Duration = Duration::from_secs(1);
/// How long something may stand still before it is stalled; longer than one commit waits for a lock.
const BOUND: Duration = Duration::from_secs(15);

pub(crate) struct Watchdog<S> {
    pub(crate) store: S,
    pub(crate) progress: Arc<Progress>,
    pub(crate) health: ProcessHealth,
    pub(crate) stop: CancellationToken,
}

/// How long something has been waiting without any progress.
#[derive(Debug, Default)]
struct Standstill(Option<(u64, Instant)>);

impl Standstill {
    /// `mark` is what waits at the head, `None` if nothing waits: while it stays the same, nothing moves.
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
        stop.run_until_cancelled(self.look_forever()).await;
    }

    async fn look_forever(self) {
        let (mut commits, mut notices, mut resends) =
            (Standstill::default(), Standstill::default(), Standstill::default());
        loop {
            tokio::time::sleep(LOOK).await;
            self.look_at_commits(&mut commits);
            // A store that does not answer must not keep the watchdog from looking at the commits.
            let backlog = tokio::time::timeout(BOUND, self.store.backlog()).await;
            let Some(Backlog { notices: waiting, resends: returning }) = self.judge(backlog) else {
                continue;
            };
            let stalled = [
                ("notices", stalled(&mut notices, waiting)),
                ("tasks on their way back", stalled(&mut resends, returning)),
            ];
            let stalled: Vec<_> = stalled
                .into_iter()
                .filter_map(|(what, age)| age.map(|age| describe(what, age)))
                .collect();
            let detail = (!stalled.is_empty()).then(|| stalled.join("; "));
            self.health.set("outbox_stalled", detail);
        }
    }

    fn look_at_commits(&self, commits: &mut Standstill) {
        let uncommitted = self.progress.uncommitted();
        let mark = (uncommitted.groups > 0).then_some(uncommitted.finished);
        let age = commits.observe(mark, Instant::now());
        self.health.set(
            "commit_stalled",
            (age >= BOUND).then(|| {
                format!(
                    "{} deliveries in {} groups wait for their commit, and none was committed for {} s",
                    uncommitted.deliveries,
                    uncommitted.groups,
                    age.as_secs()
                )
            }),
        );
    }

    fn judge(
        &self,
        backlog: Result<Result<Backlog, StoreError>, tokio::time::error::Elapsed>,
    ) -> Option<Backlog> {
        let (found, detail) = match backlog {
            Ok(Ok(backlog)) => (Some(backlog), None),
            Ok(Err(error)) => (None, Some(error.to_string())),
            Err(_) => {
                let detail = format!("the store has not answered for {} s", BOUND.as_secs());
                (None, Some(detail))
            }
        };
        self.health.set("store_unreadable", detail);
        found
    }
}

fn stalled(standstill: &mut Standstill, waiting: Option<Waiting>) -> Option<(Duration, Waiting)> {
    let age = standstill.observe(waiting.map(|waiting| waiting.oldest), Instant::now());
    waiting.filter(|_| age >= BOUND).map(|waiting| (age, waiting))
}

fn describe(what: &str, (age, waiting): (Duration, Waiting)) -> String {
    let seconds = age.as_secs();
    format!("about {} {what} wait to be published, the oldest for {seconds} s", waiting.count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_waits_and_does_not_move_grows_old() {
        let (mut commits, start) = (Standstill::default(), Instant::now());
        let later = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(commits.observe(None, start), Duration::ZERO);
        assert_eq!(commits.observe(Some(7), later(100)), Duration::ZERO);
        assert_eq!(commits.observe(Some(7), later(120)), Duration::from_secs(20));
        assert_eq!(commits.observe(Some(8), later(130)), Duration::ZERO, "it moved");
        assert_eq!(commits.observe(None, later(190)), Duration::ZERO, "nothing waits");
        assert_eq!(commits.observe(Some(8), later(191)), Duration::ZERO);
    }
}
