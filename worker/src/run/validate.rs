//! Decides whether a delivered task runs in this worker. Pure: no IO, and the time is a parameter.
//!
//! A task runs if it is sound, not expired, has a handler here, and is neither running in nor recently
//! settled by this worker. For any other the result is the settlement that replaces its run.

use std::sync::Arc;

use garenne_common::failpoints::Protection;
use garenne_common::wire::{self, CrashRecord, Malformed, Message};
use garenne_common::{DeadReason, QueueName, TaskMessage, TaskName, Timestamp};

use super::known_attempts::{AttemptKey, KnownAttempts, Registration};
use crate::intake::queue::DeliveryRef;
use crate::intake::source::{Arrival, TaskSource};
use crate::settle::{Settlement, SettlementBuilder, Subject, Successor};

/// Validates a delivery of `queue` at `now` and registers the attempt that it requests.
///
/// `find` looks up the handler. `Err` contains the settlement of a task that does not run: a dead letter,
/// an acknowledgement of an attempt that is settled already, or the message again under an id. It is
/// `Err(None)` for a task that is running here, whose settlement includes this delivery.
pub fn validate<H>(
    arrival: &Arrival,
    queue: &QueueName,
    now: Timestamp,
    find: impl FnOnce(&TaskName) -> Option<H>,
    known: &KnownAttempts,
    settlements: &SettlementBuilder,
) -> Result<(Arc<TaskMessage>, H), Option<Box<Settlement>>> {
    let checked = match &arrival.source {
        TaskSource::Message(message) => check_message(message, queue, settlements.max_body),
        TaskSource::Bundle { task, .. } => {
            check_bundled(task, settlements.max_body).map(|()| Some(Arc::clone(task)))
        }
    };
    let found = checked.and_then(|task| match task {
        Some(task) => find_handler(&task, find, now).map(|handler| Some((task, handler))),
        None => Ok(None),
    });
    match found {
        Ok(Some((task, handler))) => {
            register(&task, arrival, known)?;
            Ok((task, handler))
        }
        Ok(None) => Err(Some(Box::new(settlements.assign_id(arrival, queue)))),
        Err(Refusal { reason, error }) => {
            let id = arrival.source.id();
            tracing::warn!(%queue, id, reason = reason.as_str(), error, "dead letter");
            Err(Some(Box::new(settlements.refuse(arrival, queue, now, reason, &error))))
        }
    }
}

/// Settles the tasks of a bundle that was delivered before. Known tasks are settled with their runs; each
/// other task leaves the bundle in a message of its own, so that the broker counts its deliveries by
/// itself. The messages are marked as delivered before, since any of them may have crashed a worker.
pub fn split_bundle(
    tasks: &[TaskMessage],
    delivery: DeliveryRef,
    app_id: &str,
    known: &KnownAttempts,
    settlements: &SettlementBuilder,
) -> Vec<Settlement> {
    let settlement = |task: &TaskMessage| match known.find(&AttemptKey::of_bundled(task), delivery)
    {
        Registration::AlreadyRunning => None,
        Registration::AlreadySettled => {
            Some(Settlement::new(Subject::task(delivery), Successor::Confirmed))
        }
        Registration::New => Some(settlements.split_from_bundle(delivery, task, app_id)),
    };
    tasks.iter().filter_map(settlement).collect()
}

/// Why a task becomes a dead letter without a run.
struct Refusal {
    reason: DeadReason,
    error: String,
}

impl Refusal {
    fn malformed(error: String) -> Self {
        Self { reason: DeadReason::Malformed, error }
    }
}

fn register(
    task: &Arc<TaskMessage>,
    arrival: &Arrival,
    known: &KnownAttempts,
) -> Result<(), Option<Box<Settlement>>> {
    let key = AttemptKey::of(task, &arrival.source);
    match known.register(&key, arrival.delivery) {
        Registration::New => Ok(()),
        Registration::AlreadyRunning => {
            tracing::info!(id = %task.id, "redelivery of a running task");
            Err(None)
        }
        Registration::AlreadySettled => {
            let subject = Subject::task(arrival.delivery);
            Err(Some(Box::new(Settlement::new(subject, Successor::Confirmed))))
        }
    }
}

/// The task of a message; `None` for a sound task without an id.
fn check_message(
    message: &Message,
    queue: &QueueName,
    max_body: usize,
) -> Result<Option<Arc<TaskMessage>>, Refusal> {
    if wire::bundle::is_one(message) {
        // The local queue decodes sound bundles and passes on their tasks.
        let error = match wire::bundle::decode(message, queue) {
            Err(malformed) => malformed.to_string(),
            Ok(_) => "a bundle of tasks in place of a single task".to_owned(),
        };
        return Err(Refusal::malformed(error));
    }
    check_size(message.body.len(), max_body)?;
    let task = decode(message, queue).map_err(|error| Refusal::malformed(error.to_string()))?;
    if task.is_some() {
        CrashRecord::read(message).map_err(|error| Refusal::malformed(error.to_string()))?;
    }
    Ok(task.map(Arc::new))
}

/// The decoder of bundles checks the form of a task only.
fn check_bundled(task: &TaskMessage, max_body: usize) -> Result<(), Refusal> {
    check_size(task.args.bytes.len(), max_body)?;
    wire::task::check_args(&task.args).map_err(|error| Refusal::malformed(error.to_string()))
}

/// To be checked before parsing: a parsed value takes up to thirty times the memory of its text.
fn check_size(bytes: usize, max_body: usize) -> Result<(), Refusal> {
    if bytes <= max_body {
        return Ok(());
    }
    Err(Refusal::malformed(format!(
        "a body of {bytes} bytes is too large, more than the {max_body} of worker.max_body; raise it \
         on the workers of this queue, or send where the data is"
    )))
}

fn find_handler<H>(
    task: &TaskMessage,
    find: impl FnOnce(&TaskName) -> Option<H>,
    now: Timestamp,
) -> Result<H, Refusal> {
    if let Some(at) = task.options.expires_at.filter(|at| *at <= now) {
        let error = format!("it expired at {at} before it could start");
        return Err(Refusal { reason: DeadReason::Expired, error });
    }
    find(&task.name).ok_or_else(|| {
        let (name, queue) = (&task.name, &task.queue);
        let error = format!("no handler for {name} on this worker of queue {queue}");
        Refusal { reason: DeadReason::UnknownTask, error }
    })
}

fn decode(message: &Message, queue: &QueueName) -> Result<Option<TaskMessage>, Malformed> {
    #[cfg(feature = "failpoints")]
    if !Protection::IdBeforeRun.is_enabled() {
        return sabotage::decode_under_unconfirmed_id(message, queue);
    }
    wire::task::decode(message, queue)
}

/// Whether a bundle must be split before any of its tasks runs.
pub(crate) fn must_be_split(delivered_before: bool) -> bool {
    delivered_before && Protection::BundleSplit.is_enabled()
}

#[cfg(feature = "failpoints")]
mod sabotage {
    use super::*;

    /// Runs a task without an id under an id that no redelivery has.
    pub(super) fn decode_under_unconfirmed_id(
        message: &Message,
        queue: &QueueName,
    ) -> Result<Option<TaskMessage>, Malformed> {
        match wire::task::decode(message, queue) {
            Ok(None) => wire::task::decode(&wire::task::assign_id(message).1, queue),
            decoded => decoded,
        }
    }
}
