//! Tasks that are submitted one by one, and share messages while the broker is busy with earlier ones.
//!
//! A message costs the broker many times what a task in it does, and it confirms messages no faster
//! than it writes them. So a few submissions at a time are on their way alone; those that come
//! meanwhile gather, and leave in bundles as confirms come in (docs/decisions/0020). Nobody waits for
//! company: whoever submits while little is under way is sent at once.

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

use crate::SubmitError;
use crate::deadline::left;
use crate::dispatch::{Dispatch, Parcel};
use crate::error::submit_error;

/// So much is under way before submissions begin to gather.
const PLACES: usize = 4;
/// After so long a place is free again, confirmed or not: a queue that confirms nothing must not keep
/// others from theirs.
const HELD: Duration = Duration::from_millis(100);
/// Of tasks whose time nobody knows yet so many go together: fewer than in bulk, because who submits
/// one by one may well have slow ones.
const UNKNOWN: u32 = 20;
/// Who allows a task more than this expects it to take long; it would keep its bundle unacknowledged.
const LONG: Duration = Duration::from_mins(1);

/// Where submissions meet. Dropping it ends its task as soon as nobody waits there.
pub(crate) struct Coalescer {
    dispatch: Arc<Dispatch>,
    room: Arc<Semaphore>,
    waiting: mpsc::Sender<Parcel<Caller>>,
    finish: CancellationToken,
    task: TaskTracker,
}

/// Who waits for a confirm, and until when.
struct Caller {
    by: Instant,
    answer: oneshot::Sender<Result<(), BrokerError>>,
}

impl Coalescer {
    /// Starts the task; at most `most` submissions wait there.
    pub(crate) fn start(dispatch: Arc<Dispatch>, most: usize) -> Self {
        let (waiting, inbox) = mpsc::channel(most);
        let (room, finish) = (Arc::new(Semaphore::new(PLACES)), CancellationToken::new());
        let task = TaskTracker::new();
        let gatherer = Gatherer {
            dispatch: Arc::clone(&dispatch),
            room: Arc::clone(&room),
            inbox,
            finish: finish.clone(),
        };
        task.spawn(gatherer.run());
        task.close();
        Self { dispatch, room, waiting, finish, task }
    }

    /// Publishes one task, with others if there are any, and waits for the broker's confirm.
    pub(crate) async fn submit(
        &self,
        task: TaskMessage,
        delay: Duration,
        by: Instant,
    ) -> Result<(), SubmitError> {
        let id = task.id.clone();
        let failed = |error| submit_error(&id, error);
        if self.goes_alone(&task) {
            let sent = self.dispatch.send(&[Parcel { task, delay, tag: () }], by);
            return sent.await.map_err(failed);
        }
        if let Ok(place) = self.room.try_acquire() {
            let sent = self.dispatch.send(&[Parcel { task, delay, tag: () }], by);
            return holding(place, sent).await.map_err(failed);
        }
        let patience = left(by);
        let (answer, confirmed) = oneshot::channel();
        let parcel = Parcel { task, delay, tag: Caller { by, answer } };
        let whole = async {
            // Refused, it has not left this process: an error without a doubt.
            self.waiting.send(parcel).await.map_err(|_| BrokerError::Closed)?;
            confirmed.await.unwrap_or(Err(BrokerError::Closed)).map_err(failed)
        };
        match timeout_at(by, whole).await {
            Ok(result) => result,
            Err(_) => Err(failed(self.dispatch.publisher.why_late(patience))),
        }
    }

    /// Waits until everything that is here has been answered, at most `grace`; takes nothing more.
    pub(crate) async fn close(&self, grace: Duration) {
        self.finish.cancel();
        if timeout(grace, self.task.wait()).await.is_err() {
            tracing::warn!("some submissions were not confirmed before closing");
        }
    }

    /// Whether a task is too slow, as far as anybody knows, for company to be good for it.
    fn goes_alone(&self, task: &TaskMessage) -> bool {
        let Dispatch { limits, pace, .. } = &*self.dispatch;
        limits.tasks == 1
            || task.options.timeout.is_some_and(|limit| limit > LONG)
            || pace.estimate(&task.name).is_some_and(|takes| takes > limits.work / 2)
    }
}

/// The task behind a [`Coalescer`].
struct Gatherer {
    dispatch: Arc<Dispatch>,
    room: Arc<Semaphore>,
    inbox: mpsc::Receiver<Parcel<Caller>>,
    finish: CancellationToken,
}

impl Gatherer {
    async fn run(mut self) {
        let mut under_way = FuturesUnordered::new();
        let (mut first, mut open) = (None, true);
        // Others may hold all places in futures that nobody polls, so none is waited for for long.
        let mut patience = std::pin::pin!(sleep(Duration::ZERO));
        while open || first.is_some() || !under_way.is_empty() {
            tokio::select! {
                parcel = self.inbox.recv(), if open && first.is_none() => match parcel {
                    Some(parcel) => {
                        first = Some(parcel);
                        patience.as_mut().reset(Instant::now() + HELD);
                    }
                    None => open = false,
                },
                () = &mut patience, if first.is_some() => {
                    under_way.extend(self.bundles(first.take(), None));
                }
                place = Arc::clone(&self.room).acquire_owned(), if first.is_some() => {
                    // It is never closed.
                    let Ok(place) = place else { return };
                    under_way.extend(self.bundles(first.take(), Some(place)));
                }
                Some(()) = under_way.next() => {}
                () = self.finish.cancelled(), if !self.inbox.is_closed() => self.inbox.close(),
            }
        }
    }

    /// Everything that waits now, as messages to be published. Together they are one thing under way.
    fn bundles(
        &mut self,
        first: Option<Parcel<Caller>>,
        place: Option<OwnedSemaphorePermit>,
    ) -> Vec<impl Future<Output = ()> + use<>> {
        let mut parcels: Vec<_> = first.into_iter().collect();
        while let Ok(parcel) = self.inbox.try_recv() {
            parcels.push(parcel);
        }
        // Whoever has given up by now has withdrawn the submission.
        parcels.retain(|parcel| !parcel.tag.answer.is_closed());
        let place = Arc::new(place);
        let publish = |bundle| publish(Arc::clone(&self.dispatch), bundle, Arc::clone(&place));
        self.dispatch.divide(parcels, UNKNOWN).into_iter().map(publish).collect()
    }
}

async fn publish(
    dispatch: Arc<Dispatch>,
    mut bundle: Vec<Parcel<Caller>>,
    place: Arc<Option<OwnedSemaphorePermit>>,
) {
    let Some(by) = bundle.iter().map(|parcel| parcel.tag.by).max() else { return };
    let sent = dispatch.send(&bundle, by);
    let result = tokio::select! {
        result = holding(place, sent) => result,
        // It is withdrawn if it was not sent yet.
        () = all_gone(&mut bundle) => return,
    };
    for parcel in bundle {
        // One that has given up meanwhile hears nothing, as the documentation of `submit` says.
        drop(parcel.tag.answer.send(result.clone()));
    }
}

/// Keeps a place while something is under way, but not for long.
async fn holding<T>(place: impl Sized, sent: impl Future<Output = T>) -> T {
    let mut sent = std::pin::pin!(sent);
    tokio::select! {
        biased;
        result = &mut sent => return result,
        () = sleep(HELD) => drop(place),
    }
    sent.await
}

/// Waits until nobody waits for any of them any more.
async fn all_gone(bundle: &mut [Parcel<Caller>]) {
    for parcel in bundle {
        parcel.tag.answer.closed().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::pending;

    #[tokio::test]
    async fn a_place_is_free_again_though_nothing_is_confirmed() {
        let room = Arc::new(Semaphore::new(1));
        let place = Arc::clone(&room).acquire_owned().await.unwrap();
        let stuck = tokio::spawn(holding(place, pending::<()>()));
        assert!(room.try_acquire().is_err());
        let freed = timeout(HELD * 20, room.acquire()).await;
        assert!(freed.is_ok(), "the place was kept");
        stuck.abort();
    }
}
