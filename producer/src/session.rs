//! The connections of a producer and everything that is shared by its clones.
//!
//! Configuration comes in; a [`Session`] publishes, checks queues, and starts the reply queue when
//! it is first needed. It does not know submissions or handles: that is [`crate::Producer`]'s part.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use garenne_common::broker::{Admin, BrokerError, Link, Publisher};
use garenne_common::config::Config;
use garenne_common::topology::Topology;
use garenne_common::wire::RetryNote;
use garenne_common::{Codec, QueueName};
use tokio::sync::{OnceCell, broadcast};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use crate::SubmitError;
use crate::deadline::{left, until};
use crate::query::client::QueryClient;
use crate::query::recovery;
use crate::submit::coalesce::Coalescer;
use crate::submit::dispatch::Dispatch;
use crate::submit::known_queues::KnownQueues;
use crate::wait::replies::{Replies, RepliesSpec};

/// How long [`Session::close`] waits for outstanding confirms, and then for its own tasks.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// Capacity of the channel of retry notes; a slow reader misses the oldest ones.
const RETRY_NOTES: usize = 1_024;

/// What all clones of a producer share: two connections, of which one publishes and the other,
/// opened when it is first needed, consumes.
pub(crate) struct Session {
    pub(crate) dispatch: Arc<Dispatch>,
    pub(crate) coalescer: Coalescer,
    /// Encoding of typed arguments, unless a submission chooses another.
    pub(crate) codec: Codec,
    /// How long after its opening a batch ends as abandoned if it has not been sealed.
    pub(crate) batch_deadline: Duration,
    /// `host:4711`, a part of queue names.
    pub(crate) owner: String,
    pub(crate) consume_link: Link,
    queues: KnownQueues,
    /// Started by the first caller that needs a result or a response.
    replies: OnceCell<Arc<Replies>>,
    pub(crate) retries: broadcast::Sender<RetryNote>,
    /// Set by `close`. Nothing is sent afterwards, so a later error never leaves a task in doubt.
    closed: AtomicBool,
    tasks: TaskTracker,
    stop: CancellationToken,
    /// The background tasks hold no `Session`, so they end when its last user drops it, closed or
    /// not.
    _stop_on_drop: DropGuard,
}

/// The names under which this process appears on the broker.
struct ProcessNames {
    /// `garenne map host:4711`, the `app_id` of its messages.
    app: String,
    /// `host:4711`, a part of queue names.
    owner: String,
}

impl Session {
    /// Connects and declares the core topology.
    pub(crate) async fn connect(config: &Config, program: &str) -> Result<Self, BrokerError> {
        let topology = config.broker.topology();
        let names = ProcessNames::new(program);
        let publish_link = Link::new(&config.broker, &format!("{} publish", names.app));
        let consume_link = Link::new(&config.broker, &format!("{} consume", names.app));
        // Limited by `broker.connect_timeout`; its errors name the address that did not answer.
        publish_link.open().await?;
        // The publisher also declares when it reconnects, but could not report a conflict.
        let (admin, core) = (Admin::new(publish_link.clone()), topology.core());
        let by = Instant::now() + config.broker.publish_timeout;
        until(by, "the declarations", admin.declare(&core)).await?;
        let queues = KnownQueues::new(consume_link.clone(), topology.clone());
        let dispatch = Arc::new(Dispatch {
            publisher: Publisher::start(publish_link, core, &config.broker),
            topology,
            app: names.app,
            limits: config.producer.bundles,
            durations: Arc::default(),
        });
        let stop = CancellationToken::new();
        Ok(Self {
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
        })
    }

    /// Closes the session for all its users. Every step is bounded by [`CLOSE_TIMEOUT`].
    pub(crate) async fn close(&self) {
        self.closed.store(true, Ordering::Release);
        // 1. Submissions that were handed over get their confirm, or their callers an error.
        let by = Instant::now() + CLOSE_TIMEOUT;
        self.coalescer.close(left(by)).await;
        self.dispatch.publisher.clone().close(left(by)).await;
        // 2. Reading stops only now, so that results that arrived meanwhile reached their handles.
        self.stop.cancel();
        self.tasks.close();
        if tokio::time::timeout(CLOSE_TIMEOUT, self.tasks.wait()).await.is_err() {
            tracing::warn!("the reply router did not stop within {CLOSE_TIMEOUT:?}");
        }
        // 3. The broker deletes the reply queue together with its connection.
        self.consume_link.close().await;
    }

    /// Checks that the session is open and that tasks for `queue` will reach it.
    pub(crate) async fn require_queue(
        &self,
        queue: &QueueName,
        by: Instant,
    ) -> Result<(), SubmitError> {
        if self.closed.load(Ordering::Acquire) {
            return Err(BrokerError::Closed.into());
        }
        self.require_existing(queue, by).await
    }

    /// Checks that tasks for `queue` will reach it.
    pub(crate) async fn require_existing(
        &self,
        queue: &QueueName,
        by: Instant,
    ) -> Result<(), SubmitError> {
        until(by, "the check of the queue", self.queues.require(queue)).await
    }

    /// The reply queue and its router; the first call starts them.
    pub(crate) async fn replies(
        self: &Arc<Self>,
        by: Instant,
    ) -> Result<Arc<Replies>, BrokerError> {
        if let Some(replies) = self.replies.get() {
            return Ok(Arc::clone(replies));
        }
        // In a task of its own: a caller that is not polled for a while must not block the others.
        let session = Arc::clone(self);
        let starting = AbortOnDropHandle::new(tokio::spawn(async move {
            session.replies.get_or_try_init(|| session.start_replies()).await.cloned()
        }));
        let started = async { starting.await.unwrap_or(Err(BrokerError::Closed)) };
        until(by, "the reply queue", started).await
    }

    async fn start_replies(&self) -> Result<Arc<Replies>, BrokerError> {
        let spec = RepliesSpec {
            link: self.consume_link.clone(),
            topology: self.topology().clone(),
            owner: self.owner.clone(),
            retries: self.retries.clone(),
            durations: Arc::clone(&self.dispatch.durations),
        };
        let replies = Replies::start(spec, &self.tasks, self.stop.clone()).await?;
        let client = self.query_client(Arc::clone(&replies));
        self.tasks.spawn(recovery::run(client, self.stop.clone()));
        Ok(replies)
    }

    /// A client that sends queries and receives responses through `replies`.
    pub(crate) fn query_client(&self, replies: Arc<Replies>) -> QueryClient {
        QueryClient::new(self.dispatch.publisher.clone(), replies, self.topology().queries())
    }

    /// When an operation that begins now has to end, with an error at the latest.
    pub(crate) fn deadline(&self) -> Instant {
        Instant::now() + self.dispatch.publisher.deadline()
    }

    pub(crate) fn topology(&self) -> &Topology {
        &self.dispatch.topology
    }
}

impl ProcessNames {
    fn new(program: &str) -> Self {
        let host = hostname::get().map(|host| host.to_string_lossy().into_owned());
        // Both end up in AMQP short strings, so both are bounded.
        let host: String = host.unwrap_or_else(|_| "host".to_owned()).chars().take(60).collect();
        let program: String = program.chars().take(60).collect();
        let owner = format!("{host}:{}", std::process::id());
        Self { app: format!("{program} {owner}"), owner }
    }
}
