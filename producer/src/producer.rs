//! [`Producer`]: connecting, submitting single tasks, closing.
//!
//! The steps of a submission: check and encode it, get the reply queue, check the task queue,
//! register the wait for its result, publish, wait for the confirm. All of them within one
//! `publish_timeout`.

use std::sync::Arc;
use std::time::Duration;

use garenne_common::broker::BrokerError;
use garenne_common::config::Config;
use garenne_common::topology::Topology;
use garenne_common::{BatchId, TaskId, TaskMessage};
use tokio::time::Instant;

use crate::session::Session;
use crate::submit::submission::Prepared;
use crate::{Handle, Submission, SubmitError};

/// What the management UI shows for a program that gave no name.
const PROGRAM: &str = "garenne-producer";

/// Submits tasks, over two connections: one publishes, the other, opened when it is first needed,
/// consumes. Clones share everything.
#[derive(Clone)]
pub struct Producer(pub(crate) Arc<Session>);

impl Producer {
    /// Connects, and declares the exchanges and queues that every process declares.
    ///
    /// A wrong address, login or vhost and a conflicting broker object are errors at once. Lost
    /// connections are re-established in the background; `submit` waits meanwhile, at most
    /// `broker.publish_timeout`.
    pub async fn connect(config: &Config) -> Result<Self, BrokerError> {
        Self::connect_as(config, PROGRAM).await
    }

    /// [`connect`](Self::connect) under the name of the program, such as `garenne map`, which the
    /// management UI then shows for connections and messages.
    pub async fn connect_as(config: &Config, program: &str) -> Result<Self, BrokerError> {
        Ok(Self(Arc::new(Session::connect(config, program).await?)))
    }

    /// Submits a task, typed or a [`Submission`] with options, and returns a handle that waits for
    /// its result.
    ///
    /// `Ok` means that the broker has confirmed the task. Errors are returned within
    /// `broker.publish_timeout`.
    ///
    /// Concurrent calls may share a message; a call without others under way is sent alone and at
    /// once (docs/decisions/0020).
    ///
    /// Cancel safety: a submission that is dropped before it was sent is withdrawn. One that is
    /// dropped between sending and confirm may still run. To make sure, give the submission an id
    /// and submit it again.
    pub async fn submit<O>(
        &self,
        submission: impl Into<Submission<O>>,
    ) -> Result<Handle<O>, SubmitError> {
        self.submit_in(submission.into(), None).await
    }

    /// Submits a task without waiting for its result, which only the collector receives.
    ///
    /// Cheaper than dropping the handle: no reply is sent at all. A program that submits only
    /// detached tasks never learns how long its tasks take; set a time limit of more than a minute
    /// on slow ones, so that they are not bundled with others.
    pub async fn submit_detached<O>(
        &self,
        submission: impl Into<Submission<O>>,
    ) -> Result<TaskId, SubmitError> {
        self.submit_detached_in(submission.into(), None).await
    }

    /// Closes the producer for all its clones: waits at most 5 seconds for outstanding confirms,
    /// fails the handles that still wait, and closes both connections. Submitted tasks are not
    /// affected.
    pub async fn close(self) {
        self.0.close().await;
    }

    pub(crate) async fn submit_in<O>(
        &self,
        submission: Submission<O>,
        batch: Option<&BatchId>,
    ) -> Result<Handle<O>, SubmitError> {
        let by = self.deadline();
        let Prepared { mut task, delay } = submission.prepare(self.0.codec, batch)?;
        let replies = self.0.replies(by).await?;
        let queue = replies.queue(by).await?;
        self.0.require_queue(&task.queue, by).await?;
        task.reply = Some(queue.reply_to());
        let id = task.id.clone();
        let waiting = replies.expect(&task, &queue);
        self.publish_task(task, delay, by).await?;
        Ok(Handle::new(id, waiting, Arc::clone(&self.0)))
    }

    pub(crate) async fn submit_detached_in<O>(
        &self,
        submission: Submission<O>,
        batch: Option<&BatchId>,
    ) -> Result<TaskId, SubmitError> {
        let by = self.deadline();
        let Prepared { task, delay } = submission.prepare(self.0.codec, batch)?;
        self.0.require_queue(&task.queue, by).await?;
        let id = task.id.clone();
        self.publish_task(task, delay, by).await?;
        Ok(id)
    }

    async fn publish_task(
        &self,
        task: TaskMessage,
        delay: Duration,
        by: Instant,
    ) -> Result<(), SubmitError> {
        self.0.coalescer.submit(task, delay, by).await
    }

    /// When an operation that begins now has to end, with an error at the latest.
    pub(crate) fn deadline(&self) -> Instant {
        self.0.deadline()
    }

    pub(crate) fn topology(&self) -> &Topology {
        self.0.topology()
    }

    /// The `app_id` of this producer's messages.
    pub(crate) fn app(&self) -> &str {
        &self.0.dispatch.app
    }
}
