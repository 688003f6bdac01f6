//! What may run at all: the checks between a delivery and its handler, without any effect.

use std::sync::Arc;

use garenne_common::failpoints::Protection;
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
    (now, max_body): (Timestamp, usize),
) -> Verdict<H> {
    let refuse = |reason, error| Verdict::Refuse { reason, error };
    if wire::bundle::is_one(message) {
        // One that can be read never gets here: its tasks do, one by one.
        let error =
            wire::bundle::decode(message, queue).map(drop).map_err(|error| error.to_string());
        let error = error.err().unwrap_or_else(|| "a bundle of tasks in place of one".to_owned());
        return refuse(DeadReason::Malformed, error);
    }
    if let Err(error) = within(message.body.len(), max_body) {
        return refuse(DeadReason::Malformed, error);
    }
    let task = match decode(message, queue) {
        Ok(Some(task)) => task,
        Ok(None) => return Verdict::AssignId,
        Err(malformed) => return refuse(DeadReason::Malformed, malformed.to_string()),
    };
    if let Err(malformed) = CrashRecord::read(message) {
        return refuse(DeadReason::Malformed, malformed.to_string());
    }
    match may_run(&task, find, now) {
        Ok(handler) => Verdict::Run(Arc::new(task), handler),
        Err((reason, error)) => refuse(reason, error),
    }
}

/// Looks at a task of a bundle, of which only the form is known to be sound: its handler, or why it is
/// not to be run.
pub(crate) fn inspect_member<H>(
    task: &TaskMessage,
    find: impl FnOnce(&TaskName) -> Option<H>,
    (now, max_body): (Timestamp, usize),
) -> Result<H, (DeadReason, String)> {
    within(task.args.bytes.len(), max_body).map_err(|error| (DeadReason::Malformed, error))?;
    let args = wire::task::check_args(&task.args);
    args.map_err(|malformed| (DeadReason::Malformed, malformed.to_string()))?;
    may_run(task, find, now)
}

/// Before anything is parsed: a value takes up to thirty times the room of its text.
fn within(bytes: usize, max_body: usize) -> Result<(), String> {
    if bytes <= max_body {
        return Ok(());
    }
    Err(format!(
        "a body of {bytes} bytes is too large, more than the {max_body} of worker.max_body; raise it \
         on the workers of this queue, or send where the data is"
    ))
}

fn may_run<H>(
    task: &TaskMessage,
    find: impl FnOnce(&TaskName) -> Option<H>,
    now: Timestamp,
) -> Result<H, (DeadReason, String)> {
    if let Some(at) = task.options.expires_at.filter(|at| *at <= now) {
        return Err((DeadReason::Expired, format!("it expired at {at} before it could start")));
    }
    find(&task.name).ok_or_else(|| {
        let (name, queue) = (&task.name, &task.queue);
        let error = format!("no handler for {name} on this worker of queue {queue}");
        (DeadReason::UnknownTask, error)
    })
}

fn decode(message: &Message, queue: &QueueName) -> Result<Option<TaskMessage>, Malformed> {
    match wire::task::decode(message, queue) {
        Ok(None) if !Protection::IdBeforeRun.is_enabled() => {
            wire::task::decode(&wire::task::assign_id(message).1, queue)
        }
        decoded => decoded,
    }
}
