//! What comes back: one exclusive reply queue per connection epoch, and the router that reads it.
//!
//! The queue gets a new name whenever its channel is rebuilt; replies under way to the old one are
//! gone. The router only notes that (`outstanding`); asking for what was lost is `recovery`'s part.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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
use tokio::sync::{broadcast, oneshot, watch};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::outstanding::{Ended, Outstanding};

/// Deliveries between the connection and the router, which never waits for anybody.
const BUFFER: u16 = 512;

/// Everything that waits for a message from outside.
pub(crate) struct Replies {
    link: Link,
    /// Nothing is settled by it (replies are read without acknowledgements); it knows what is wrong.
    settler: Settler,
    /// `None` while there is no queue: nothing can be answered then.
    queue: watch::Sender<Option<ReplyQueue>>,
    outstanding: Mutex<Outstanding>,
    /// Askers by correlation id.
    questions: Mutex<HashMap<String, oneshot::Sender<Message>>>,
    retries: broadcast::Sender<RetryNote>,
    /// How long tasks took, for whoever bundles others like them.
    pace: Arc<DurationEstimates>,
}

/// A reply queue and its number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ReplyQueue {
    pub(crate) name: Arc<str>,
    pub(crate) epoch: u64,
}

impl ReplyQueue {
    /// What a task says that is to be answered here.
    pub(crate) fn reply_to(&self) -> ReplyTo {
        ReplyTo { queue: self.name.clone(), correlation_id: None, format: ReplyFormat::Bundle }
    }
}

/// The right to one task's result; dropping it gives the place back.
pub(crate) struct Waiting {
    replies: Arc<Replies>,
    id: TaskId,
    ticket: u64,
    result: oneshot::Receiver<Ended>,
    answered: bool,
}

/// The right to one answer; dropping it gives the place back.
pub(crate) struct Asking {
    replies: Arc<Replies>,
    correlation: String,
    pub(crate) answer: oneshot::Receiver<Message>,
}

impl Replies {
    /// Declares the queue, starts the router, and returns when the broker has registered both.
    pub(crate) async fn start(
        link: Link,
        topology: Topology,
        owner: String,
        (retries, pace): (broadcast::Sender<RetryNote>, Arc<DurationEstimates>),
        (tasks, stop): (&TaskTracker, CancellationToken),
    ) -> Result<Arc<Self>, BrokerError> {
        // The consumer would try for ever; a first failure should be told at once and by name.
        link.open().await?;
        let spec = ConsumerSpec {
            declarations: vec![],
            tag: format!("{owner} replies"),
            queue: QueueSource::Exclusive {
                name: Box::new(move || topology.reply_queue(&owner)),
                bindings: vec![],
            },
            prefetch: BUFFER,
            no_ack: true,
        };
        let consumer = Consumer::start(link.clone(), spec);
        consumer.ready().await?;
        let replies = Arc::new(Self {
            link,
            settler: consumer.settler(),
            queue: watch::Sender::new(None),
            outstanding: Mutex::default(),
            questions: Mutex::default(),
            retries,
            pace,
        });
        let names = consumer.queue();
        replies.adopt(names.borrow().as_deref());
        let router = Router { replies: Arc::clone(&replies), names, consumer };
        tasks.spawn(router.run(stop));
        Ok(replies)
    }

    /// The queue to be answered to; while there is none, waits for it until `by`.
    pub(crate) async fn queue(&self, by: Instant) -> Result<ReplyQueue, BrokerError> {
        let mut queue = self.queue.subscribe();
        // Cloned out at once: what `wait_for` returns holds a lock.
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
        // The link may be busy connecting, hence the limit.
        match timeout(Duration::from_millis(50), self.link.open()).await {
            Ok(Err(error)) => error,
            Ok(Ok(())) | Err(_) => BrokerError::Lost("no reply queue in time".to_owned()),
        }
    }

    /// Tells of every change of the queue.
    pub(crate) fn watch_queue(&self) -> watch::Receiver<Option<ReplyQueue>> {
        self.queue.subscribe()
    }

    /// A place for the result of `id`; taken before the task is sent, or its reply could be missed.
    pub(crate) fn expect(self: &Arc<Self>, task: &TaskMessage, queue: &ReplyQueue) -> Waiting {
        let (now, id) = (Instant::now().into_std(), task.id.clone());
        let mut outstanding = lock(&self.outstanding);
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
        let mut outstanding = lock(&self.outstanding);
        let place = |task: &TaskMessage| {
            let id = task.id.clone();
            let (ticket, result) =
                outstanding.expect(id.clone(), task.fingerprint, queue.epoch, now);
            Waiting { replies: Arc::clone(self), id, ticket, result, answered: false }
        };
        tasks.map(place).collect()
    }

    /// A place for the answer to the question with this correlation id.
    pub(crate) fn expect_answer(self: &Arc<Self>, correlation: String) -> Asking {
        let (asker, answer) = oneshot::channel();
        lock(&self.questions).insert(correlation.clone(), asker);
        Asking { replies: Arc::clone(self), correlation, answer }
    }

    /// Ids to ask the collector for now.
    pub(crate) fn due(&self, limit: usize) -> Vec<(TaskId, Option<Fingerprint>)> {
        lock(&self.outstanding).due(limit, Instant::now().into_std())
    }

    /// Takes over the queue's present name, under a new number if it is a new one.
    fn adopt(&self, name: Option<&str>) {
        self.queue.send_if_modified(|queue| {
            // The last number is kept in `outstanding`, since `queue` is `None` between two names.
            let same = queue.as_ref().map(|queue| &*queue.name) == name;
            if !same {
                *queue = name.map(|name| ReplyQueue {
                    name: Arc::from(name),
                    epoch: lock(&self.outstanding).next_epoch(Instant::now().into_std()),
                });
            }
            !same
        });
    }

    /// Reads one message and tells whoever waits for it.
    fn take(&self, message: Message) {
        // A collector answers some questions with a bundle: the results count, and so does the answer.
        if message.properties.kind.as_deref() == Some(BUNDLE_KIND) {
            match report::decode(&message) {
                Ok(reports) => self.take_reports(reports),
                Err(problem) => tracing::warn!(%problem, "a reply cannot be read"),
            }
        }
        let correlation = message.properties.correlation_id.as_deref().unwrap_or_default();
        let Some(asker) = lock(&self.questions).remove(correlation) else { return };
        if asker.send(message).is_err() {
            tracing::trace!("the asker is gone");
        }
    }

    fn take_reports(&self, reports: Vec<Report>) {
        let mut outstanding = lock(&self.outstanding);
        let mut ids = Memberships::default();
        let mut shown = |sent: BatchId| ids.of(&sent).unwrap_or(sent);
        for report in reports {
            match report {
                Report::Finished(mut result) => {
                    result.batch = result.batch.take().map(&mut shown);
                    self.pace.note(&result.name, result.finished_at.since(result.started_at));
                    outstanding.resolve(result);
                }
                Report::Retrying(mut note) => {
                    note.batch = note.batch.take().map(&mut shown);
                    drop(self.retries.send(note));
                }
                Report::Conflict { id, queried } => outstanding.conflict(&id, queried),
                // Addressed to collectors; nothing here waits for them.
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
            // Before the deliveries of a new queue, though they would be right in any order.
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

/// However the router ends, nobody is left waiting for it.
impl Drop for Router {
    fn drop(&mut self) {
        lock(&self.replies.outstanding).close();
        lock(&self.replies.questions).clear();
    }
}

impl Waiting {
    /// Waits; `None` when the router has ended. Cancel-safe, and not to be called after it returned.
    pub(crate) async fn result(&mut self) -> Option<Ended> {
        let result = (&mut self.result).await.ok();
        self.answered = true;
        result
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        // With its result the place was given up.
        if !self.answered {
            lock(&self.replies.outstanding).forget(&self.id, self.ticket);
        }
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        lock(&self.replies.questions).remove(&self.correlation);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic while holding it left a whole value behind: every change is one insert or one remove.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
