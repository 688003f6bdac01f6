//! What a handler may know about the attempt it runs.

use std::sync::Arc;

use garenne_common::{BatchId, TaskId, TaskMessage, TaskName};
use tokio_util::sync::{CancellationToken, WaitForCancellationFuture};

/// The attempt that a handler runs. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Context {
    task: Arc<TaskMessage>,
    worker: Arc<str>,
    facts: Facts,
    /// The attempt is over, whatever the handler does.
    over: CancellationToken,
    /// The attempt should end; so it does when it is over.
    cancelled: CancellationToken,
}

/// What is known of an execution besides its task.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Facts {
    pub(crate) redelivered: bool,
    /// Crashes charged to the task so far.
    pub(crate) crashes: u32,
    /// Its number, if it runs under a lease.
    pub(crate) fence: Option<u64>,
}

impl Context {
    /// `over` is cancelled at the end of the attempt.
    pub(crate) fn new(
        task: Arc<TaskMessage>,
        worker: Arc<str>,
        facts: Facts,
        over: CancellationToken,
    ) -> Self {
        let cancelled = over.child_token();
        Self { task, worker, facts, over, cancelled }
    }

    /// The task's id; the same over all attempts.
    pub fn id(&self) -> &TaskId {
        &self.task.id
    }

    /// The task's name.
    pub fn name(&self) -> &TaskName {
        &self.task.name
    }

    /// Which attempt this is; the first is 1.
    pub fn attempt(&self) -> u32 {
        self.task.attempt
    }

    /// Whether the task's policy gives it no attempt after this one.
    pub fn is_last_attempt(&self) -> bool {
        !self.task.options.retry.allows_another(self.task.attempt)
    }

    /// The batch that counts this task.
    pub fn batch(&self) -> Option<BatchId> {
        self.task.batch.as_ref().map(|batch| batch.public().into_owned())
    }

    /// A key to make effects happen once: the same for every execution of this task.
    ///
    /// A task may run more than once (a worker died after the effect, before the acknowledgement).
    /// Store this key with the effect, in one transaction, and a second execution finds it.
    pub fn idempotency_key(&self) -> &str {
        self.task.id.as_str()
    }

    /// Whether the broker had delivered this very message before, to anybody.
    pub fn redelivered(&self) -> bool {
        self.facts.redelivered
    }

    /// The number of this execution, if the task runs under a lease: higher than that of every earlier
    /// execution.
    ///
    /// A task runs under a lease when its time limit comes near the broker's consumer timeout. If its
    /// worker falls silent, the task is given to another one, and the silent one may still wake up.
    /// A store that keeps the highest number it has seen, and refuses a lower one, keeps such a late
    /// writer out. Tasks without a lease have no such number: use
    /// [`idempotency_key`](Self::idempotency_key) there.
    pub fn fence(&self) -> Option<u64> {
        self.facts.fence
    }

    /// How often a process has died while it ran this task alone, in any attempt.
    pub fn crashes(&self) -> u32 {
        self.facts.crashes
    }

    /// The name under which this worker signs its results.
    pub fn worker(&self) -> &str {
        &self.worker
    }

    /// Completes when the attempt should end: somebody cancelled the task, its soft time limit has
    /// passed, its time is up, or the worker gives up waiting for it.
    ///
    /// After a soft limit the handler may still return its result until the time is up, and after a
    /// cancellation for `worker.cancel_grace` (a success then stands). Otherwise an async handler is
    /// dropped right after; a blocking one is not and should look at
    /// [`is_cancelled`](Self::is_cancelled) from time to time.
    pub fn cancelled(&self) -> WaitForCancellationFuture<'_> {
        self.cancelled.cancelled()
    }

    /// Whether the attempt should end.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.is_cancelled()
    }

    pub(crate) fn task(&self) -> &TaskMessage {
        &self.task
    }

    /// Asks the handler to come to an end.
    pub(crate) fn cancel(&self) {
        self.cancelled.cancel();
    }

    /// The attempt is over: what the handler returns from now on counts for nothing.
    pub(crate) fn end(&self) {
        self.over.cancel();
    }

    /// Completes when the attempt is over.
    pub(crate) fn over(&self) -> WaitForCancellationFuture<'_> {
        self.over.cancelled()
    }
}

#[cfg(test)]
impl Context {
    /// A first attempt of some task with these JSON arguments.
    pub(crate) fn of_args(args: &str) -> Self {
        let task = TaskMessage {
            id: TaskId::generate(),
            name: TaskName::new("some.task").unwrap(),
            queue: garenne_common::QueueName::default(),
            args: garenne_common::Payload {
                codec: garenne_common::Codec::Json,
                bytes: args.as_bytes().to_vec().into(),
            },
            attempt: 1,
            batch: None,
            reply: None,
            options: garenne_common::Options::default(),
            submitted_at: None,
            traceparent: None,
        };
        Self::new(Arc::new(task), Arc::from("w"), Facts::default(), CancellationToken::new())
    }
}
