//! The reply queue and the router that reads it: one exclusive queue per connection epoch.
//!
//! Replies come in; results go to [`outstanding`](super::outstanding), responses of the collector
//! to the queries that wait for them, retry notes to their subscribers. The queue gets a new name
//! whenever its channel is rebuilt, and replies to the old one are lost. The router only records
//! that; asking the collector for lost results is up to [`crate::query::recovery`].

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use garenne_common::batch_key::Memberships;
use garenne_common::broker::{
    BrokerError, Consumer, ConsumerSpec, Health, Link, QueueSource, Settler,
};
use garenne_common::bundling::DurationEstimates;
use garenne_common::topology::Topology;
use garenne_common::wire::report::{self, BUNDLE_KIND};
use garenne_common::wire::{Message, Report, RetryNote};
use garenne_common::{BatchId, Fingerprint, ReplyFormat, ReplyTo, TaskId, TaskMessage};
use parking_lot::Mutex;
use tokio::sync::{broadcast, oneshot, watch};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::outstanding::{Ended, Outstanding};

/// Capacity of the buffer of deliveries between the connection and the router, which never blocks.
const BUFFER: u16 = 512;

/// The reply queue, and everything that waits for messages from it.
pub(crate) struct Replies {
    link: Link,
    /// Only asked for the consumer's health. Replies are read without acknowledgements, so it
    /// settles none.
    settler: Settler,
    /// `None` while there is no queue, so that nothing can be replied to.
    queue: watch::Sender<Option<ReplyQueue>>,
    outstanding: Mutex<Outstanding>,
    /// Queries that wait for a response, by correlation id.
    queries: Mutex<HashMap<String, oneshot::Sender<Message>>>,
    retries: broadcast::Sender<RetryNote>,
    durations: Arc<DurationEstimates>,
}

/// What [`Replies::start`] needs.
pub(crate) struct RepliesSpec {
    /// The connection that consumes.
    pub(crate) link: Link,
    pub(crate) topology: Topology,
    /// `host:4711`, a part of the queue's name.
    pub(crate) owner: String,
    /// Receives the notes of failed attempts.
    pub(crate) retries: broadcast::Sender<RetryNote>,
    /// Receives how long tasks took, by name; sizes later bundles.
    pub(crate) durations: Arc<DurationEstimates>,
}

/// A reply queue and the number of its epoch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ReplyQueue {
    pub(crate) name: Arc<str>,
    pub(crate) epoch: u64,
}

impl ReplyQueue {
    /// The reply address of a task whose result should arrive here.
    pub(crate) fn reply_to(&self) -> ReplyTo {
        ReplyTo { queue: self.name.clone(), correlation_id: None, format: ReplyFormat::Bundle }
    }
}

/// A wait for one task's result; dropping it removes it.
pub(crate) struct Waiting {
    replies: Arc<Replies>,
    id: TaskId,
    ticket: u64,
    result: oneshot::Receiver<Ended>,
    answered: bool,
}

/// A query that waits for its response; dropping it removes it.
pub(crate) struct PendingResponse {
    replies: Arc<Replies>,
    correlation: String,
    pub(crate) response: oneshot::Receiver<Message>,
}

impl Replies {
    /// Declares the queue, starts the router in `tasks`, and returns when the broker has registered
    /// the consumer.
    ///
    /// Fails if the broker cannot be reached; later losses are repaired in the background.
    pub(crate) async fn start(
        spec: RepliesSpec,
        tasks: &TaskTracker,
        stop: CancellationToken,
    ) -> Result<Arc<Self>, BrokerError> {
        let RepliesSpec { link, topology, owner, retries, durations } = spec;
        // The consumer would retry forever; the first failure should be returned at once.
        link.open().await?;
        let consumer = ConsumerSpec {
            declarations: vec![],
            tag: format!("{owner} replies"),
            queue: QueueSource::Exclusive {
                name: Box::new(move || topology.reply_queue(&owner)),
                bindings: vec![],
            },
            prefetch: BUFFER,
            no_ack: true,
        };
        let consumer = Consumer::start(link.clone(), consumer);
        consumer.ready().await?;
        let replies = Arc::new(Self {
            link,
            settler: consumer.settler(),
            queue: watch::Sender::new(None),
            outstanding: Mutex::default(),
            queries: Mutex::default(),
            retries,
            durations,
        });
        let names = consumer.queue();
        replies.adopt(names.borrow().as_deref());
        let router = Router { replies: Arc::clone(&replies), names, consumer };
        tasks.spawn(router.run(stop));
        Ok(replies)
    }

    /// The present reply queue; while there is none, waits for it until `by`.
    pub(crate) async fn queue(&self, by: Instant) -> Result<ReplyQueue, BrokerError> {
        let mut queue = self.queue.subscribe();
        // Cloned at once, because what `wait_for` returns holds a lock.
        let present = async { queue.wait_for(Option::is_some).await.ok()?.clone() };
        match timeout_at(by, present).await {
            Ok(present) => present.ok_or(BrokerError::Closed),
            Err(_) => Err(self.why_no_queue().await),
        }
    }

    async fn why_no_queue(&self) -> BrokerError {
        if let Health::Down(Some(error)) = self.settler.health() {
            return error;
        }
        // Limited, because the link may be busy connecting.
        match timeout(Duration::from_millis(50), self.link.open()).await {
            Ok(Err(error)) => error,
            Ok(Ok(())) | Err(_) => {
                BrokerError::Lost("timed out waiting for the reply queue".to_owned())
            }
        }
    }

    /// Notifies of every change of the queue.
    pub(crate) fn watch_queue(&self) -> watch::Receiver<Option<ReplyQueue>> {
        self.queue.subscribe()
    }

    /// Registers a wait for the result of a task. Must happen before the task is sent, or its reply
    /// could be missed.
    pub(crate) fn expect(self: &Arc<Self>, task: &TaskMessage, queue: &ReplyQueue) -> Waiting {
        let (now, id) = (Instant::now().into_std(), task.id.clone());
        let mut outstanding = self.outstanding.lock();
        let (ticket, result) = outstanding.expect(id.clone(), task.fingerprint, queue.epoch, now);
        drop(outstanding);
        Waiting { replies: Arc::clone(self), id, ticket, result, answered: false }
    }

    /// [`expect`](Self::expect) for many at once.
    pub(crate) fn expect_all<'t>(
        self: &Arc<Self>,
        tasks: impl Iterator<Item = &'t TaskMessage>,
        queue: &ReplyQueue,
    ) -> Vec<Waiting> {
        let now = Instant::now().into_std();
        let mut outstanding = self.outstanding.lock();
        let place = |task: &TaskMessage| {
            let id = task.id.clone();
            let (ticket, result) =
                outstanding.expect(id.clone(), task.fingerprint, queue.epoch, now);
            Waiting { replies: Arc::clone(self), id, ticket, result, answered: false }
        };
        tasks.map(place).collect()
    }

    /// Registers a wait for the response to the query with this correlation id.
    pub(crate) fn expect_response(self: &Arc<Self>, correlation: String) -> PendingResponse {
        let (to, response) = oneshot::channel();
        self.queries.lock().insert(correlation.clone(), to);
        PendingResponse { replies: Arc::clone(self), correlation, response }
    }

    /// Up to `limit` ids that the collector should be asked for now.
    pub(crate) fn due(&self, limit: usize) -> Vec<(TaskId, Option<Fingerprint>)> {
        self.outstanding.lock().due(limit, Instant::now().into_std())
    }

    /// Adopts the queue's present name; a new name starts a new epoch.
    fn adopt(&self, name: Option<&str>) {
        self.queue.send_if_modified(|queue| {
            // The last epoch is kept in `outstanding`, since `queue` is `None` between two names.
            let same = queue.as_ref().map(|queue| &*queue.name) == name;
            if !same {
                *queue = name.map(|name| ReplyQueue {
                    name: Arc::from(name),
                    epoch: self.outstanding.lock().next_epoch(Instant::now().into_std()),
                });
            }
            !same
        });
    }

    /// Gives one message to whatever waits for it.
    fn take(&self, message: Message) {
        // The collector answers a `results` query with a bundle: its results resolve waits, and the
        // message is also the response to the query.
        if message.properties.kind.as_deref() == Some(BUNDLE_KIND) {
            match report::decode(&message) {
                Ok(reports) => self.take_reports(reports),
                Err(problem) => tracing::warn!(%problem, "ignoring a malformed reply"),
            }
        }
        let correlation = message.properties.correlation_id.as_deref().unwrap_or_default();
        let Some(query) = self.queries.lock().remove(correlation) else { return };
        if query.send(message).is_err() {
            tracing::trace!("response dropped: its query is gone");
        }
    }

    fn take_reports(&self, reports: Vec<Report>) {
        let mut outstanding = self.outstanding.lock();
        let mut ids = Memberships::default();
        let mut public = |sent: BatchId| ids.of(&sent).unwrap_or(sent);
        for report in reports {
            match report {
                Report::Finished(mut result) => {
                    result.batch = result.batch.take().map(&mut public);
                    self.durations.note(&result.name, result.finished_at.since(result.started_at));
                    outstanding.resolve(result);
                }
                Report::Retrying(mut note) => {
                    note.batch = note.batch.take().map(&mut public);
                    drop(self.retries.send(note));
                }
                Report::Conflict { id, queried } => outstanding.conflict(&id, queried),
                // For collectors; nothing here waits for them.
                Report::BatchOpened { .. }
                | Report::BatchSealed { .. }
                | Report::Lease(_)
                | Report::FinishedUnderLease { .. } => {}
            }
        }
    }
}

struct Router {
    replies: Arc<Replies>,
    names: watch::Receiver<Option<String>>,
    consumer: Consumer,
}

impl Router {
    async fn run(mut self, stop: CancellationToken) {
        loop {
            // Set before the deliveries of a new queue are read, although either order would be
            // correct.
            let name = self.names.borrow_and_update().clone();
            self.replies.adopt(name.as_deref());
            tokio::select! {
                delivery = self.consumer.next() => match delivery {
                    Some(delivery) => self.replies.take(delivery.message),
                    None => return,
                },
                changed = self.names.changed() => if changed.is_err() { return; },
                () = stop.cancelled() => return,
            }
        }
    }
}

/// However the router ends, all waits fail.
impl Drop for Router {
    fn drop(&mut self) {
        self.replies.outstanding.lock().close();
        self.replies.queries.lock().clear();
    }
}

impl Waiting {
    /// Waits for the result; `None` when the router has ended. Cancel-safe; must not be called
    /// again after it has returned.
    pub(crate) async fn result(&mut self) -> Option<Ended> {
        let result = (&mut self.result).await.ok();
        self.answered = true;
        result
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        // Its entry was removed when the result arrived.
        if !self.answered {
            self.replies.outstanding.lock().forget(&self.id, self.ticket);
        }
    }
}

impl Drop for PendingResponse {
    fn drop(&mut self) {
        self.replies.queries.lock().remove(&self.correlation);
    }
}
