//! The `x-garenne-*` headers: their names, and reading them from whatever type a client library sent.

use std::time::Duration;

use super::Malformed;
use super::message::{HeaderValue, Message};

pub(super) const ATTEMPT: &str = "x-garenne-attempt";
pub(super) const MAX_ATTEMPTS: &str = "x-garenne-max-attempts";
pub(super) const RETRY_BASE: &str = "x-garenne-retry-base-ms";
pub(super) const RETRY_FACTOR: &str = "x-garenne-retry-factor";
pub(super) const RETRY_MAX: &str = "x-garenne-retry-max-ms";
pub(super) const TIMEOUT: &str = "x-garenne-timeout-ms";
pub(super) const SOFT_TIMEOUT: &str = "x-garenne-soft-timeout-ms";
pub(super) const EXPIRES_AT: &str = "x-garenne-expires-at-ms";
pub(super) const BATCH: &str = "x-garenne-batch";
pub(super) const REPLY_FORMAT: &str = "x-garenne-reply-format";
pub(super) const SUBMITTED_AT: &str = "x-garenne-submitted-at-ms";
/// When the first attempt began; on retries only.
pub(super) const FIRST_ATTEMPT_AT: &str = "x-garenne-first-attempt-at-ms";
pub(super) const TRACEPARENT: &str = "traceparent";
/// The fingerprint of a task whose sender has chosen the id.
pub(super) const FINGERPRINT: &str = "x-garenne-fingerprint";
/// The fingerprints of the tasks of a bundle, separated by commas, empty for tasks without one.
pub(super) const FINGERPRINTS: &str = "x-garenne-fingerprints";
/// How many tasks a bundle has; for people, who see messages only.
pub(super) const TASKS: &str = "x-garenne-tasks";
/// A bundle that a worker passed on because it could not run it soon.
pub(super) const HANDED_ON: &str = "x-garenne-handed-on";
/// A task that left a bundle which had come before: one of its tasks may have killed a worker.
pub(super) const RETURNED: &str = "x-garenne-returned";
pub(super) const DEAD_REASON: &str = "x-garenne-dead-reason";
pub(super) const DEAD_ERROR: &str = "x-garenne-dead-error";
pub(super) const DEAD_AT: &str = "x-garenne-dead-at-ms";
pub(super) const DEAD_BY: &str = "x-garenne-dead-by";
pub(super) const DEAD_QUEUE: &str = "x-garenne-dead-queue";
pub(super) const DEAD_STARTED_AT: &str = "x-garenne-dead-started-at-ms";
pub(super) const DEAD_REDELIVERED: &str = "x-garenne-dead-redelivered";
pub(super) const FENCE: &str = "x-garenne-fence";
/// How often in a row an execution of this attempt under a lease fell silent.
pub(super) const LAPSES: &str = "x-garenne-lapses";
pub(super) const LEASE_EXECUTION: &str = "x-garenne-lease-execution";
pub(super) const LEASE_WORKER: &str = "x-garenne-lease-worker";
pub(super) const LEASE_QUEUE: &str = "x-garenne-lease-queue";
pub(super) const LEASE_TERM: &str = "x-garenne-lease-term-ms";
/// How often RabbitMQ took the message back; from 4.3 on only what it holds against it.
pub(super) const DELIVERY_COUNT: &str = "x-delivery-count";
/// From 4.3 on: how often RabbitMQ has handed the message out before.
pub(super) const ACQUIRED_COUNT: &str = "x-acquired-count";
/// How often its process died under this task.
pub(super) const CRASHES: &str = "x-garenne-crashes";
/// One line for each of those deaths.
pub(super) const CRASH_LOG: &str = "x-garenne-crash-log";
/// The dead task that this one is a replay of.
pub(super) const REPLAY_OF: &str = "x-garenne-replay-of";
/// How often this work was replayed.
pub(super) const REPLAYS: &str = "x-garenne-replays";
/// On what RabbitMQ dead-lettered itself; `broker` sees to it that old versions have it too.
pub(super) const LAST_DEATH_REASON: &str = "x-last-death-reason";
/// On what RabbitMQ dead-lettered itself; `broker` sees to it that old versions have it too.
pub(super) const LAST_DEATH_QUEUE: &str = "x-last-death-queue";

/// What the names of the marks of delay levels begin with. A republish drops them: a stale mark is an
/// extra wait. No `x-` prefix: a headers exchange leaves such headers out when it matches.
pub(crate) const DELAY_MARK: &str = "garenne-delay-";

/// Headers that a republished message must not carry: RabbitMQ's own account of dead-lettering, by
/// which it drops what seems to go in a circle, and the marks of a delay or a return that is over.
pub(super) fn is_spent(name: &str) -> bool {
    name == "x-death"
        || name == DELIVERY_COUNT
        || name == ACQUIRED_COUNT
        || name == RETURNED
        || name.starts_with("x-first-death-")
        || name.starts_with("x-last-death-")
        || name.starts_with(DELAY_MARK)
}

/// Forgets lapses: an execution has come to its end, and its worker is alive.
pub(super) fn clear_lapses(message: &mut Message) {
    message.headers.retain(|(name, _)| name != LAPSES);
}

pub(super) fn text<'a>(message: &'a Message, name: &str) -> Result<Option<&'a str>, Malformed> {
    match message.header(name) {
        None => Ok(None),
        Some(HeaderValue::Text(text)) => Ok(Some(text)),
        Some(other) => Err(wrong(name, other, "text")),
    }
}

/// A whole number from 0 on; text is taken too, since shells and some clients have nothing else.
pub(super) fn number(message: &Message, name: &str) -> Result<Option<u64>, Malformed> {
    let Some(value) = message.header(name) else { return Ok(None) };
    let number = match value {
        HeaderValue::Int(number) => u64::try_from(*number).ok(),
        HeaderValue::Text(text) => text.trim().parse().ok(),
        HeaderValue::Float(_) | HeaderValue::Bool(_) => None,
    };
    number.map(Some).ok_or_else(|| wrong(name, value, "a whole number from 0 on"))
}

pub(super) fn millis(message: &Message, name: &str) -> Result<Option<Duration>, Malformed> {
    Ok(number(message, name)?.map(Duration::from_millis))
}

pub(super) fn float(message: &Message, name: &str) -> Result<Option<f64>, Malformed> {
    let Some(value) = message.header(name) else { return Ok(None) };
    let number = match value {
        // A factor needs no 53 bits.
        HeaderValue::Int(number) => i32::try_from(*number).ok().map(f64::from),
        HeaderValue::Float(number) => Some(*number),
        HeaderValue::Text(text) => text.trim().parse().ok(),
        HeaderValue::Bool(_) => None,
    };
    let finite = number.filter(|number| number.is_finite());
    finite.map(Some).ok_or_else(|| wrong(name, value, "a number"))
}

fn wrong(name: &str, value: &HeaderValue, expected: &str) -> Malformed {
    Malformed::new(format_args!("header {name} is {value:?}, expected {expected}"))
}
