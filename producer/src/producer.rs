//! Connecting, submitting, closing.
//!
//! The order of a submission: check and encode, find the reply queue, look for the task queue, take
//! the place for the result, publish, wait for the confirm. All of it within one `publish_timeout`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use garenne_common::broker::{Admin, BrokerError, Link, Publisher};
use garenne_common::config::Config;
use garenne_common::topology::Topology;
use garenne_common::wire::RetryNote;
use garenne_common::{BatchId, Codec, QueueName, TaskId, TaskMessage};
use tokio::sync::{OnceCell, broadcast};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use crate::ask::Asker;
use crate::coalesce::Coalescer;
use crate::deadline::{left, until};
use crate::dispatch::Dispatch;
use crate::queues::KnownQueues;
use crate::recovery;
use crate::replies::Replies;
use crate::submission::Prepared;
use crate::{Handle, QueryError, Submission, SubmitError};

/// What the management UI shows of a program that gave no name.
const PROGRAM: &str = "garenne-producer";
/// How long [`Producer::close`] waits for outstanding confirms, and then for its own tasks.
const GRACE: Duration = Duration::from_secs(5);
/// Retry notes that wait for a slow reader before the oldest are dropped.
const RETRY_NOTES: usize = 1_024;

/// Submits tasks, over two connections: one publishes, the other, opened when it is first needed,
/// consumes. Clones share everything.
#[derive(Clone)]
pub struct Producer(Arc<Inner>);

struct Inner {
    dispatch: Arc<Dispatch>,
    coalescer: Coalescer,
    codec: Codec,
    batch_deadline: Duration,
    /// `host:4711`, a part of queue names.
    owner: String,
    consume_link: Link,
    queues: KnownQueues,
    /// Started by the first who wants an answer.
    replies: OnceCell<Arc<Replies>>,
    retries: broadcast::Sender<RetryNote>,
    /// Nothing is sent any more, so that an error after closing leaves no doubt.
    closed: AtomicBool,
    tasks: TaskTracker,
    stop: CancellationToken,
    /// The tasks hold no `Inner`, so they end when its last user is gone, closed or not.
    _stop_on_drop: DropGuard,
}

/// How this process signs.
struct Names {
    /// `garenne map host:4711`, the `app_id` of its messages.
    app: String,
    /// `host:4711`, a part of queue names.
    owner: String,
}

impl Producer {
    /// Connects now, and declares what every process declares.
    ///
    /// A wrong address, login or vhost and a conflicting broker object are errors at once. Later losses
    /// are mended without a word; who submits meanwhile waits, at most `broker.publish_timeout`.
    pub async fn connect(config: &Config) -> Result<Self, BrokerError> {
        Self::connect_as(config, PROGRAM).await
    }

    /// [`connect`](Self::connect) under the name of the program, such as `garenne map`, which the
    /// management UI then shows for connections and messages.
    pub async fn connect_as(config: &Config, program: &str) -> Result<Self, BrokerError> {
        let topology = config.broker.topology();
        let names = Names::of_process(program);
        let publish_link = Link::new(&config.broker, &format!("{} publish", names.app));
        let consume_link = Link::new(&config.broker, &format!("{} consume", names.app));
        // Has a limit of its own, `broker.connect_timeout`, and says best who did not answer.
        publish_link.open().await?;
        // The publisher declares too, whenever it reconnects, but could not report a conflict.
        let (admin, core) = (Admin::new(publish_link.clone()), topology.core());
        let by = Instant::now() + config.broker.publish_timeout;
        until(by, "answer to the declarations", admin.declare(&core)).await?;
        let queues = KnownQueues::new(consume_link.clone(), topology.clone());
        let dispatch = Arc::new(Dispatch {
            publisher: Publisher::start(publish_link, core, &config.broker),
            topology,
            app: names.app,
            limits: config.producer.bundles,
            pace: Arc::default(),
        });
        let stop = CancellationToken::new();
        Ok(Self(Arc::new(Inner {
            coalescer: Coalescer::start(Arc::clone(&dispatch), config.broker.publish_window),
            dispatch,
            codec: config.producer.codec,
            batch_deadline: config.producer.batch_deadline,
            owner: names.owner,
            queues,
            consume_link,
            replies: OnceCell::new(),
            retries: broadcast::Sender::new(RETRY_NOTES),
            closed: AtomicBool::new(false),
            tasks: TaskTracker::new(),
            _stop_on_drop: stop.clone().drop_guard(),
            stop,
        })))
    }

    /// Submits a task, typed or a [`Submission`] with options, and returns a handle that waits for it.
    ///
    /// `Ok` means that the broker has confirmed the task. Any error comes within
    /// `broker.publish_timeout`.
    ///
    /// Calls that are under way at the same time may share a message; one that comes alone is sent
    /// alone and at once (docs/decisions/0020).
    ///
    /// Cancel-safe in this sense: a submission dropped before it was sent is withdrawn; one dropped
    /// between sending and confirm may run without anybody waiting for it. Whoever needs to know
    /// gives the submission an id and submits it again.
    pub async fn submit<O>(
        &self,
        submission: impl Into<Submission<O>>,
    ) -> Result<Handle<O>, SubmitError> {
        self.submit_in(submission.into(), None).await
    }

    /// Submits a task without asking for its result, which goes to the collector alone.
    ///
    /// Cheaper than dropping the handle: no reply is sent at all. A program that submits nothing else
    /// never sees how long its tasks take; slow ones should have a time limit of more than a minute, so
    /// that they share no messages.
    pub async fn submit_detached<O>(
        &self,
        submission: impl Into<Submission<O>>,
    ) -> Result<TaskId, SubmitError> {
        self.submit_detached_in(submission.into(), None).await
    }

    /// Closes for all clones: waits some seconds for outstanding confirms, then tells every handle
    /// that it waits in vain, then closes both connections. Submitted tasks go on.
    pub async fn close(self) {
        let inner = &self.0;
        inner.closed.store(true, Ordering::Release);
        // 1. What was handed over gets its confirm, or its caller an error.
        let by = Instant::now() + GRACE;
        inner.coalescer.close(left(by)).await;
        inner.dispatch.publisher.clone().close(left(by)).await;
        // 2. Only then stop reading, so that results which came meanwhile reached their handles.
        inner.stop.cancel();
        inner.tasks.close();
        if tokio::time::timeout(GRACE, inner.tasks.wait()).await.is_err() {
            tracing::warn!("the reply router did not end in time");
        }
        // 3. The reply queue vanishes with its connection.
        inner.consume_link.close().await;
    }

    pub(crate) async fn submit_in<O>(
        &self,
        submission: Submission<O>,
        batch: Option<&BatchId>,
    ) -> Result<Handle<O>, SubmitError> {
        let by = self.deadline();
        let Prepared { mut task, delay } = submission.prepare(self.0.codec, batch)?;
        let replies = self.replies(by).await?;
        let queue = replies.queue(by).await?;
        self.require_queue(&task, by).await?;
        task.reply = Some(queue.reply_to());
        let id = task.id.clone();
        let waiting = replies.expect(&task, &queue);
        self.publish_task(task, delay, by).await?;
        Ok(Handle::new(id, waiting, self.clone()))
    }

    pub(crate) async fn submit_detached_in<O>(
        &self,
        submission: Submission<O>,
        batch: Option<&BatchId>,
    ) -> Result<TaskId, SubmitError> {
        let by = self.deadline();
        let Prepared { task, delay } = submission.prepare(self.0.codec, batch)?;
        self.require_queue(&task, by).await?;
        let id = task.id.clone();
        self.publish_task(task, delay, by).await?;
        Ok(id)
    }

    pub(crate) async fn require_queue(
        &self,
        task: &TaskMessage,
        by: Instant,
    ) -> Result<(), SubmitError> {
        if self.0.closed.load(Ordering::Acquire) {
            return Err(BrokerError::Closed.into());
        }
        until(by, "answer whether the queue exists", self.0.queues.require(&task.queue)).await
    }

    pub(crate) async fn require_queue_of_replay(
        &self,
        queue: &QueueName,
    ) -> Result<(), QueryError> {
        let look = self.0.queues.require(queue);
        match until(self.deadline(), "answer whether the queue exists", look).await {
            Ok(()) => Ok(()),
            Err(SubmitError::Broker(error)) => Err(error.into()),
            Err(_) => Err(QueryError::UnknownQueue { queue: queue.clone() }),
        }
    }

    async fn publish_task(
        &self,
        task: TaskMessage,
        delay: Duration,
        by: Instant,
    ) -> Result<(), SubmitError> {
        self.0.coalescer.submit(task, delay, by).await
    }

    /// The replies, with everything behind them started on the first call.
    pub(crate) async fn replies(&self, by: Instant) -> Result<Arc<Replies>, BrokerError> {
        if let Some(replies) = self.0.replies.get() {
            return Ok(Arc::clone(replies));
        }
        // In a task of its own: a caller that is not polled for a while must not keep others waiting.
        let producer = self.clone();
        let starting = AbortOnDropHandle::new(tokio::spawn(async move {
            producer.0.replies.get_or_try_init(|| producer.start_replies()).await.cloned()
        }));
        let started = async { starting.await.unwrap_or(Err(BrokerError::Closed)) };
        until(by, "reply queue", started).await
    }

    async fn start_replies(&self) -> Result<Arc<Replies>, BrokerError> {
        let inner = &self.0;
        let link = inner.consume_link.clone();
        let (topology, owner) = (self.topology().clone(), inner.owner.clone());
        let scope = (&inner.tasks, inner.stop.clone());
        let listeners = (inner.retries.clone(), Arc::clone(&inner.dispatch.pace));
        let replies = Replies::start(link, topology, owner, listeners, scope).await?;
        let asker = self.asker_for(Arc::clone(&replies));
        inner.tasks.spawn(recovery::run(asker, inner.stop.clone()));
        Ok(replies)
    }

    pub(crate) fn asker_for(&self, replies: Arc<Replies>) -> Asker {
        Asker::new(self.0.dispatch.publisher.clone(), replies, self.topology().queries())
    }

    pub(crate) fn subscribe_retries(&self) -> broadcast::Receiver<RetryNote> {
        self.0.retries.subscribe()
    }

    /// When whoever began now hears an error at the latest.
    pub(crate) fn deadline(&self) -> Instant {
        Instant::now() + self.0.dispatch.publisher.deadline()
    }

    pub(crate) fn topology(&self) -> &Topology {
        &self.0.dispatch.topology
    }

    pub(crate) fn codec(&self) -> Codec {
        self.0.codec
    }

    pub(crate) fn dispatch(&self) -> &Dispatch {
        &self.0.dispatch
    }

    pub(crate) fn batch_deadline(&self) -> Duration {
        self.0.batch_deadline
    }

    pub(crate) fn app(&self) -> &str {
        &self.0.dispatch.app
    }

    pub(crate) fn owner(&self) -> &str {
        &self.0.owner
    }

    pub(crate) fn consume_link(&self) -> Link {
        self.0.consume_link.clone()
    }
}

impl Names {
    fn of_process(program: &str) -> Self {
        let host = hostname::get().map(|host| host.to_string_lossy().into_owned());
        // Both end up in AMQP short strings, so both are bounded.
        let host: String = host.unwrap_or_else(|_| "host".to_owned()).chars().take(60).collect();
        let program: String = program.chars().take(60).collect();
        let owner = format!("{host}:{}", std::process::id());
        Self { app: format!("{program} {owner}"), owner }
    }
}
