//! Single submissions that share messages while the broker is busy with earlier ones.
//!
//! A message costs the broker many times what a task in it costs, and it confirms messages no
//! faster than it writes them. So only a few submissions at a time are sent alone. Those that come
//! while these are unconfirmed are collected, and sent in bundles as confirms arrive
//! (docs/decisions/0020). No submission waits for others to come: with little under way it is sent
//! at once.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use garenne_common::TaskMessage;
use garenne_common::broker::BrokerError;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::dispatch::{Dispatch, TaggedTask};
use crate::SubmitError;
use crate::deadline::left;
use crate::error::submit_error;

/// How many sends may be unconfirmed before further submissions are collected.
const MAX_DIRECT: usize = 4;
/// After this time a permit is free again, confirmed or not: a queue that confirms nothing must not
/// block submissions to the others.
const PERMIT_TIMEOUT: Duration = Duration::from_millis(100);
/// Bundle size for task names whose duration has not been measured yet. Smaller than for bulk
/// submissions, since tasks that are submitted one by one are more often slow.
const UNMEASURED_BUNDLE: u32 = 20;
/// A task with a longer time limit is expected to be slow and is sent alone: it would keep the
/// delivery of its bundle unacknowledged.
const LONG_TIMEOUT: Duration = Duration::from_mins(1);

/// Publishes single tasks, together with others while the broker is busy. Dropping it ends its task
/// as soon as no submission waits in it.
pub(crate) struct Coalescer {
    dispatch: Arc<Dispatch>,
    permits: Arc<Semaphore>,
    inbox: mpsc::Sender<TaggedTask<Caller>>,
    finish: CancellationToken,
    task: TaskTracker,
}

/// A caller of [`Coalescer::submit`] that waits for a confirm.
struct Caller {
    /// When it stops waiting.
    by: Instant,
    confirm: oneshot::Sender<Result<(), BrokerError>>,
}

impl Coalescer {
    /// Starts the task that bundles submissions; at most `capacity` of them wait in its inbox.
    pub(crate) fn start(dispatch: Arc<Dispatch>, capacity: usize) -> Self {
        let (to, inbox) = mpsc::channel(capacity);
        let (permits, finish) = (Arc::new(Semaphore::new(MAX_DIRECT)), CancellationToken::new());
        let task = TaskTracker::new();
        let bundler = Bundler {
            dispatch: Arc::clone(&dispatch),
            permits: Arc::clone(&permits),
            inbox,
            finish: finish.clone(),
        };
        task.spawn(bundler.run());
        task.close();
        Self { dispatch, permits, inbox: to, finish, task }
    }

    /// Publishes one task, possibly in a bundle, and waits for the broker's confirm.
    pub(crate) async fn submit(
        &self,
        task: TaskMessage,
        delay: Duration,
        by: Instant,
    ) -> Result<(), SubmitError> {
        let id = task.id.clone();
        let failed = |error| submit_error(&id, error);
        if self.is_sent_alone(&task) {
            let sent = self.dispatch.send(&[TaggedTask { task, delay, tag: () }], by);
            return sent.await.map_err(failed);
        }
        if let Ok(permit) = self.permits.try_acquire() {
            let sent = self.dispatch.send(&[TaggedTask { task, delay, tag: () }], by);
            return holding(permit, sent).await.map_err(failed);
        }
        let timeout = left(by);
        let (confirm, confirmed) = oneshot::channel();
        let tagged = TaggedTask { task, delay, tag: Caller { by, confirm } };
        let whole = async {
            // An inbox that is closed has taken nothing, so the task was certainly not sent.
            self.inbox.send(tagged).await.map_err(|_| BrokerError::Closed)?;
            confirmed.await.unwrap_or(Err(BrokerError::Closed)).map_err(failed)
        };
        match timeout_at(by, whole).await {
            Ok(result) => result,
            Err(_) => Err(failed(self.dispatch.publisher.timeout_error(timeout))),
        }
    }

    /// Accepts no further submissions, and waits at most `grace` until all present ones have ended.
    pub(crate) async fn close(&self, grace: Duration) {
        self.finish.cancel();
        if timeout(grace, self.task.wait()).await.is_err() {
            tracing::warn!("some submissions were not confirmed before the producer was closed");
        }
    }

    /// Whether a task is expected to be too slow to share a message.
    fn is_sent_alone(&self, task: &TaskMessage) -> bool {
        let Dispatch { limits, durations, .. } = &*self.dispatch;
        limits.tasks == 1
            || task.options.timeout.is_some_and(|limit| limit > LONG_TIMEOUT)
            || durations.estimate(&task.name).is_some_and(|takes| takes > limits.work / 2)
    }
}

/// The task behind a [`Coalescer`].
struct Bundler {
    dispatch: Arc<Dispatch>,
    permits: Arc<Semaphore>,
    inbox: mpsc::Receiver<TaggedTask<Caller>>,
    finish: CancellationToken,
}

impl Bundler {
    async fn run(mut self) {
        let mut under_way = FuturesUnordered::new();
        let (mut first, mut open) = (None, true);
        // All permits may be held by futures that nobody polls, so the wait for one is limited.
        let mut permit_timeout = std::pin::pin!(sleep(Duration::ZERO));
        while open || first.is_some() || !under_way.is_empty() {
            tokio::select! {
                tagged = self.inbox.recv(), if open && first.is_none() => match tagged {
                    Some(tagged) => {
                        first = Some(tagged);
                        permit_timeout.as_mut().reset(Instant::now() + PERMIT_TIMEOUT);
                    }
                    None => open = false,
                },
                () = &mut permit_timeout, if first.is_some() => {
                    under_way.extend(self.bundles(first.take(), None));
                }
                permit = Arc::clone(&self.permits).acquire_owned(), if first.is_some() => {
                    // The semaphore is never closed.
                    let Ok(permit) = permit else { return };
                    under_way.extend(self.bundles(first.take(), Some(permit)));
                }
                Some(()) = under_way.next() => {}
                () = self.finish.cancelled(), if !self.inbox.is_closed() => self.inbox.close(),
            }
        }
    }

    /// Divides all waiting submissions into messages; their publishing shares one permit.
    fn bundles(
        &mut self,
        first: Option<TaggedTask<Caller>>,
        permit: Option<OwnedSemaphorePermit>,
    ) -> Vec<impl Future<Output = ()> + use<>> {
        let mut tasks: Vec<_> = first.into_iter().collect();
        while let Ok(tagged) = self.inbox.try_recv() {
            tasks.push(tagged);
        }
        // A caller that has stopped waiting has withdrawn its submission.
        tasks.retain(|tagged| !tagged.tag.confirm.is_closed());
        let permit = Arc::new(permit);
        let publish = |bundle| publish(Arc::clone(&self.dispatch), bundle, Arc::clone(&permit));
        self.dispatch.divide(tasks, UNMEASURED_BUNDLE).into_iter().map(publish).collect()
    }
}

async fn publish(
    dispatch: Arc<Dispatch>,
    mut bundle: Vec<TaggedTask<Caller>>,
    permit: Arc<Option<OwnedSemaphorePermit>>,
) {
    let Some(by) = bundle.iter().map(|tagged| tagged.tag.by).max() else { return };
    let sent = dispatch.send(&bundle, by);
    let result = tokio::select! {
        result = holding(permit, sent) => result,
        // Withdrawn, if it was not sent yet.
        () = all_dropped(&mut bundle) => return,
    };
    for tagged in bundle {
        // The caller may have stopped waiting meanwhile, as the documentation of `submit` allows.
        drop(tagged.tag.confirm.send(result.clone()));
    }
}

/// Holds a permit while `sent` is under way, but at most [`PERMIT_TIMEOUT`].
async fn holding<T>(permit: impl Sized, sent: impl Future<Output = T>) -> T {
    let mut sent = std::pin::pin!(sent);
    tokio::select! {
        biased;
        result = &mut sent => return result,
        () = sleep(PERMIT_TIMEOUT) => drop(permit),
    }
    sent.await
}

/// Completes when all callers of these tasks have stopped waiting.
async fn all_dropped(bundle: &mut [TaggedTask<Caller>]) {
    for tagged in bundle {
        tagged.tag.confirm.closed().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::pending;

    #[tokio::test]
    async fn a_permit_is_released_although_nothing_is_confirmed() {
        let permits = Arc::new(Semaphore::new(1));
        let permit = Arc::clone(&permits).acquire_owned().await.unwrap();
        let stuck = tokio::spawn(holding(permit, pending::<()>()));
        assert!(permits.try_acquire().is_err());
        let freed = timeout(PERMIT_TIMEOUT * 20, permits.acquire()).await;
        assert!(freed.is_ok(), "the permit was kept");
        stuck.abort();
    }
}
