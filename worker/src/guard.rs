//! What may run at all: the checks between a delivery and its handler, without any effect.

use std::sync::Arc;

use garenne_common::wire::{self, Message};
use garenne_common::{DeadReason, QueueName, TaskMessage, Timestamp};

use crate::handler::{Handler, Registry};

/// What a delivery turned out to be.
pub(crate) enum Verdict {
    /// A task to run, and who runs it.
    Run(Arc<TaskMessage>, Arc<dyn Handler>),
    /// Not to be run; it becomes a dead letter.
    Refuse { reason: DeadReason, error: String },
    /// A sound task without an id: published again under one, or its redelivery would be another task.
    AssignId,
}

/// Looks at a message that came through `queue`.
pub(crate) fn inspect(
    message: &Message,
    queue: &QueueName,
    registry: &Registry,
    now: Timestamp,
) -> Verdict {
    let refuse = |reason, error| Verdict::Refuse { reason, error };
    let task = match wire::task::decode(message, queue) {
        Ok(Some(task)) => task,
        Ok(None) => return Verdict::AssignId,
        Err(malformed) => return refuse(DeadReason::Malformed, malformed.to_string()),
    };
    if let Some(at) = task.options.expires_at.filter(|at| *at <= now) {
        return refuse(DeadReason::Expired, format!("it expired at {at} before it could start"));
    }
    let Some(handler) = registry.find(&task.name) else {
        let error = format!("no handler for {} on this worker of queue {queue}", task.name);
        return refuse(DeadReason::UnknownTask, error);
    };
    Verdict::Run(Arc::new(task), handler)
}
