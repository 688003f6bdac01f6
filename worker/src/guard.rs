//! What may run at all: the checks between a delivery and its handler, without any effect.

use std::sync::Arc;

use garenne_common::guards::Guard;
use garenne_common::wire::{self, CrashRecord, Malformed, Message};
use garenne_common::{DeadReason, QueueName, TaskMessage, TaskName, Timestamp};

/// What a delivery turned out to be.
pub(crate) enum Verdict<H> {
    /// A task to run, and who runs it.
    Run(Arc<TaskMessage>, H),
    /// Not to be run; it becomes a dead letter.
    Refuse { reason: DeadReason, error: String },
    /// A sound task without an id: published again under one, or its redelivery would be another task.
    AssignId,
}

/// Looks at a message that came through `queue`; `find` knows the handlers.
pub(crate) fn inspect<H>(
    message: &Message,
    queue: &QueueName,
    find: impl FnOnce(&TaskName) -> Option<H>,
    now: Timestamp,
) -> Verdict<H> {
    let refuse = |reason, error| Verdict::Refuse { reason, error };
    let task = match decode(message, queue) {
        Ok(Some(task)) => task,
        Ok(None) => return Verdict::AssignId,
        Err(malformed) => return refuse(DeadReason::Malformed, malformed.to_string()),
    };
    if let Err(malformed) = CrashRecord::read(message) {
        return refuse(DeadReason::Malformed, malformed.to_string());
    }
    if let Some(at) = task.options.expires_at.filter(|at| *at <= now) {
        return refuse(DeadReason::Expired, format!("it expired at {at} before it could start"));
    }
    let Some(handler) = find(&task.name) else {
        let error = format!("no handler for {} on this worker of queue {queue}", task.name);
        return refuse(DeadReason::UnknownTask, error);
    };
    Verdict::Run(Arc::new(task), handler)
}

fn decode(message: &Message, queue: &QueueName) -> Result<Option<TaskMessage>, Malformed> {
    match wire::task::decode(message, queue) {
        Ok(None) if !Guard::IdBeforeRun.holds() => {
            wire::task::decode(&wire::task::assign_id(message).1, queue)
        }
        decoded => decoded,
    }
}
