//! How many tasks run at the same time, and blocking handlers that do not return.
//!
//! Each running task holds a permit. A thread cannot be stopped from outside: a blocking handler that
//! continues after the end of its attempt keeps its permit. So a worker whose handlers hang runs fewer
//! tasks instead of starting ever more threads, and reports the stuck handlers.

use std::sync::Arc;
use std::time::Duration;

use garenne_common::TaskMessage;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

/// How long a handler may take to notice the end of its attempt before it counts as stuck.
const NOTICE_TIMEOUT: Duration = Duration::from_secs(3);
/// How often a stuck handler is logged again.
const REMINDER_INTERVAL: Duration = Duration::from_mins(10);

/// The permit of an attempt; held by everything that still computes for it.
pub(crate) type Permit = Arc<HeldPermit>;

/// One permit, or all of them; released when dropped.
#[derive(Debug)]
pub(crate) struct HeldPermit {
    _permit: OwnedSemaphorePermit,
    released: DropGuard,
}

/// The permits of a worker.
#[derive(Debug)]
pub(crate) struct Concurrency {
    semaphore: Arc<Semaphore>,
    limit: u32,
    stuck: watch::Sender<u32>,
    notice_timeout: Duration,
}

impl Concurrency {
    /// `limit` is the maximum number of tasks that run at the same time.
    pub(crate) fn new(limit: usize) -> Self {
        let stuck = watch::Sender::new(0);
        let semaphore = Arc::new(Semaphore::new(limit));
        let limit = u32::try_from(limit).unwrap_or(u32::MAX);
        Self { semaphore, limit, stuck, notice_timeout: NOTICE_TIMEOUT }
    }

    /// Waits for a permit; first come, first served. The semaphore is never closed, so the result is
    /// never `None` while `self` exists.
    pub(crate) async fn one(&self) -> Option<Permit> {
        self.several(1).await
    }

    /// Waits for all permits that stuck handlers do not hold: the holder runs alone.
    ///
    /// Starts again when a handler gets stuck, since its permit would never come, and every other
    /// request for a permit waits behind this one.
    pub(crate) async fn all(&self) -> Option<Permit> {
        let mut stuck = self.stuck.subscribe();
        loop {
            let count = self.limit.saturating_sub(*stuck.borrow_and_update()).max(1);
            tokio::select! {
                permits = self.several(count) => return permits,
                Ok(()) = stuck.changed() => {}
            }
        }
    }

    async fn several(&self, count: u32) -> Option<Permit> {
        let permit = Arc::clone(&self.semaphore).acquire_many_owned(count).await.ok()?;
        let released = CancellationToken::new().drop_guard();
        Some(Arc::new(HeldPermit { _permit: permit, released }))
    }

    /// Number of free permits.
    pub(crate) fn free(&self) -> usize {
        self.semaphore.available_permits()
    }

    /// Maximum number of tasks that run at the same time.
    pub(crate) fn limit(&self) -> usize {
        usize::try_from(self.limit).unwrap_or(usize::MAX)
    }

    /// Number of running attempts.
    pub(crate) fn busy(&self) -> usize {
        let held = self.limit().saturating_sub(self.semaphore.available_permits());
        held.saturating_sub(self.stuck())
    }

    /// Number of handlers that have not returned although their attempts are over.
    pub(crate) fn stuck(&self) -> usize {
        usize::try_from(*self.stuck.borrow()).unwrap_or(usize::MAX)
    }

    /// Watches the permit of an attempt that was given up, until it is released or `stop` fires.
    ///
    /// `released` belongs to that permit ([`released`]). Logs nothing if it is released in time.
    pub(crate) async fn watch(
        &self,
        task: &TaskMessage,
        released: CancellationToken,
        stop: &CancellationToken,
    ) {
        if wait(&released, stop, self.notice_timeout).await.is_some() {
            return;
        }
        let since = Instant::now();
        let (id, name) = (&task.id, &task.name);
        self.stuck.send_modify(|stuck| *stuck += 1);
        let returned = loop {
            let (stuck, concurrency) = (self.stuck(), self.limit);
            tracing::error!(
                %id, %name, stuck, concurrency, stuck_for = ?since.elapsed() + self.notice_timeout,
                "a blocking handler does not return although its attempt is over; the worker runs \
                 one task fewer until it does"
            );
            if let Some(returned) = wait(&released, stop, REMINDER_INTERVAL).await {
                break returned;
            }
        };
        self.stuck.send_modify(|stuck| *stuck -= 1);
        if returned {
            let (stuck, concurrency) = (self.stuck(), self.limit);
            tracing::warn!(%id, %name, stuck, concurrency, "a stuck handler has returned");
        }
    }
}

/// Fires when a permit is released, without holding it.
pub(crate) fn released(permit: &Permit) -> CancellationToken {
    permit.released.token().clone()
}

/// Waits for the release (`Some(true)`), the stop (`Some(false)`) or the timeout (`None`).
async fn wait(
    released: &CancellationToken,
    stop: &CancellationToken,
    timeout: Duration,
) -> Option<bool> {
    tokio::select! {
        () = released.cancelled() => Some(true),
        () = stop.cancelled() => Some(false),
        () = tokio::time::sleep(timeout) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handlers::Context;

    #[tokio::test]
    async fn a_stuck_handler_is_counted_until_it_returns() {
        let concurrency = Arc::new(Concurrency {
            notice_timeout: Duration::from_millis(50),
            ..Concurrency::new(2)
        });
        let permit = concurrency.one().await.unwrap();
        let released = released(&permit);
        let watcher = tokio::spawn({
            let concurrency = Arc::clone(&concurrency);
            async move {
                let context = Context::of_args("null");
                concurrency.watch(context.task(), released, &CancellationToken::new()).await;
            }
        });
        assert_eq!(concurrency.stuck(), 0, "a handler may take a moment to notice");
        while concurrency.stuck() == 0 {
            tokio::task::yield_now().await;
        }
        drop(permit);
        watcher.await.unwrap();
        assert_eq!(concurrency.stuck(), 0);
        drop(concurrency.all().await.unwrap());
    }

    #[tokio::test]
    async fn the_holder_of_all_permits_runs_alone() {
        let concurrency = Concurrency::new(3);
        let all = concurrency.all().await.unwrap();
        let second = Duration::from_millis(20);
        assert!(tokio::time::timeout(second, concurrency.one()).await.is_err());
        drop(all);
        assert!(tokio::time::timeout(second, concurrency.one()).await.is_ok());
    }

    #[tokio::test]
    async fn a_request_for_all_permits_does_not_wait_for_stuck_handlers() {
        let concurrency = Arc::new(Concurrency {
            notice_timeout: Duration::from_millis(20),
            ..Concurrency::new(2)
        });
        let stuck = concurrency.one().await.unwrap();
        let (all, stop) = (concurrency.all(), CancellationToken::new());
        let context = Context::of_args("null");
        let watching = concurrency.watch(context.task(), released(&stuck), &stop);
        tokio::select! {
            all = all => drop(all.unwrap()),
            () = watching => unreachable!("nobody frees it"),
        }
        drop(concurrency.one().await.unwrap());
        assert_eq!(concurrency.stuck(), 1);
    }
}
