//! What a handler knows about the attempt that it runs.

use std::sync::Arc;

use garenne_common::{BatchId, TaskId, TaskMessage, TaskName};
use tokio_util::sync::{CancellationToken, WaitForCancellationFuture};

/// The attempt that a handler runs. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Context {
    task: Arc<TaskMessage>,
    worker: Arc<str>,
    facts: ExecutionFacts,
    /// Fires when the attempt is over, whether the handler has returned or not.
    over: CancellationToken,
    /// Fires when the attempt should end, at the latest when it is over.
    cancelled: CancellationToken,
}

/// Facts about an execution besides its task.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct ExecutionFacts {
    pub(crate) redelivered: bool,
    /// Number of crashes of the task so far.
    pub(crate) crashes: u32,
    /// Its number if it runs under a lease.
    pub(crate) fence: Option<u64>,
}

impl Context {
    /// `over` fires at the end of the attempt.
    pub(crate) fn new(
        task: Arc<TaskMessage>,
        worker: Arc<str>,
        facts: ExecutionFacts,
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

    /// Whether the task's retry policy allows no attempt after this one.
    pub fn is_last_attempt(&self) -> bool {
        !self.task.options.retry.allows_another(self.task.attempt)
    }

    /// The batch that this task belongs to.
    pub fn batch(&self) -> Option<BatchId> {
        self.task.batch.as_ref().map(|batch| batch.public().into_owned())
    }

    /// A key that is the same for every execution of this task, to make its effects happen once.
    ///
    /// A task may run more than once, for instance if its worker dies after the effect and before the
    /// acknowledgement. Store this key with the effect, in one transaction, and a second execution
    /// finds it.
    pub fn idempotency_key(&self) -> &str {
        self.task.id.as_str()
    }

    /// Whether the broker has delivered this message before, to any consumer.
    pub fn redelivered(&self) -> bool {
        self.facts.redelivered
    }

    /// The number of this execution if the task runs under a lease; higher than that of every earlier
    /// execution.
    ///
    /// A task runs under a lease if its time limit is close to the broker's consumer timeout or above. If
    /// its worker stops renewing the lease, the task is given to another worker, and the first one may
    /// still be running. A store that remembers the highest number and rejects lower ones rejects such
    /// a late writer. Tasks without a lease have no such number: use
    /// [`idempotency_key`](Self::idempotency_key) there.
    pub fn fence(&self) -> Option<u64> {
        self.facts.fence
    }

    /// How many processes have died while they ran only this task, in all attempts.
    pub fn crashes(&self) -> u32 {
        self.facts.crashes
    }

    /// The name of this worker in its results.
    pub fn worker(&self) -> &str {
        &self.worker
    }

    /// Completes when the attempt should end: the task is cancelled, its soft or hard time limit has
    /// passed, or the worker stops and waits no longer.
    ///
    /// After the soft limit the handler may still return a result until the hard limit, and after a
    /// cancellation for `worker.cancel_grace` (a success is kept). Otherwise an async handler is dropped
    /// right afterwards. A blocking handler is not; it should check
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

    /// Asks the handler to end.
    pub(crate) fn cancel(&self) {
        self.cancelled.cancel();
    }

    /// The attempt is over: a later result of the handler is ignored.
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
            fingerprint: None,
        };
        Self::new(
            Arc::new(task),
            Arc::from("w"),
            ExecutionFacts::default(),
            CancellationToken::new(),
        )
    }
}
