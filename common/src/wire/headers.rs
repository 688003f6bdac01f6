//! The headers that Garenne defines: their names, their types, and how they are read.
//!
//! The rule, which docs/protocol.md states under "Types of headers": a header that Garenne defines
//! has its documented type, or the message is malformed. Nothing is converted but a text of digits
//! where a number is expected, and an integer where a decimal number is expected. Headers that
//! Garenne does not define are not checked.

use std::time::Duration;

use super::malformed::Malformed;
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
/// The fingerprint of a task whose sender has chosen the id.
pub(super) const FINGERPRINT: &str = "x-garenne-fingerprint";
/// The fingerprints of the tasks of a bundle, separated by commas, empty for tasks without one.
pub(super) const FINGERPRINTS: &str = "x-garenne-fingerprints";
/// When the first attempt started; on retries only.
pub(super) const FIRST_ATTEMPT_AT: &str = "x-garenne-first-attempt-at-ms";
pub(super) const TRACEPARENT: &str = "traceparent";
/// Number of tasks in a bundle, for people who look at the management UI.
pub(super) const TASKS: &str = "x-garenne-tasks";
/// On a bundle that a worker has given back because it could not start it soon.
pub(super) const HANDED_ON: &str = "x-garenne-handed-on";
/// On a task split from a bundle that had been delivered before: it may have killed a worker.
pub(super) const RETURNED: &str = "x-garenne-returned";
pub(super) const DEAD_REASON: &str = "x-garenne-dead-reason";
pub(super) const DEAD_ERROR: &str = "x-garenne-dead-error";
pub(super) const DEAD_AT: &str = "x-garenne-dead-at-ms";
pub(super) const DEAD_BY: &str = "x-garenne-dead-by";
pub(super) const DEAD_QUEUE: &str = "x-garenne-dead-queue";
pub(super) const DEAD_STARTED_AT: &str = "x-garenne-dead-started-at-ms";
pub(super) const DEAD_REDELIVERED: &str = "x-garenne-dead-redelivered";
pub(super) const FENCE: &str = "x-garenne-fence";
/// How many executions of this attempt under a lease lapsed in a row.
pub(super) const LAPSES: &str = "x-garenne-lapses";
pub(super) const LEASE_EXECUTION: &str = "x-garenne-lease-execution";
pub(super) const LEASE_WORKER: &str = "x-garenne-lease-worker";
pub(super) const LEASE_QUEUE: &str = "x-garenne-lease-queue";
pub(super) const LEASE_TERM: &str = "x-garenne-lease-term-ms";
/// How often the message was returned to its queue. From RabbitMQ 4.3 on, only returns that count
/// against the delivery limit.
pub(super) const DELIVERY_COUNT: &str = "x-delivery-count";
/// From RabbitMQ 4.3 on: how often the message was delivered before.
pub(super) const ACQUIRED_COUNT: &str = "x-acquired-count";
/// How often a process died while it ran this task alone.
pub(super) const CRASHES: &str = "x-garenne-crashes";
/// One line for each of those crashes.
pub(super) const CRASH_LOG: &str = "x-garenne-crash-log";
/// The id of the dead task that this task is a replay of.
pub(super) const REPLAY_OF: &str = "x-garenne-replay-of";
/// How often this work was replayed.
pub(super) const REPLAYS: &str = "x-garenne-replays";
/// Set by RabbitMQ on what it dead-letters itself; `broker` adds it for versions before 3.13.
pub(super) const LAST_DEATH_REASON: &str = "x-last-death-reason";
/// Set by RabbitMQ on what it dead-letters itself; `broker` adds it for versions before 3.13.
pub(super) const LAST_DEATH_QUEUE: &str = "x-last-death-queue";

/// Prefix of the delay marks. They are dropped when a message is published again, since a stale
/// mark is an extra wait. No `x-` prefix: a headers exchange ignores such headers.
pub(crate) const DELAY_MARK: &str = "garenne-delay-";

/// The type that a header has by docs/protocol.md.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HeaderType {
    Text,
    /// A whole number from 0 on.
    Number,
    /// A finite number that need not be whole.
    Decimal,
    Flag,
}

impl HeaderType {
    /// The type of a header that Garenne reads; `None` for any other name.
    fn of(name: &str) -> Option<Self> {
        if name.starts_with(DELAY_MARK) {
            return Some(Self::Flag);
        }
        let is_ours = name.starts_with("x-garenne-");
        if !is_ours && ![TRACEPARENT, DELIVERY_COUNT, ACQUIRED_COUNT].contains(&name) {
            return None;
        }
        match name {
            BATCH | REPLY_FORMAT | FINGERPRINT | FINGERPRINTS | TRACEPARENT | DEAD_REASON
            | DEAD_ERROR | DEAD_BY | DEAD_QUEUE | LEASE_EXECUTION | LEASE_WORKER | LEASE_QUEUE
            | CRASH_LOG | REPLAY_OF => Some(Self::Text),
            ATTEMPT | MAX_ATTEMPTS | RETRY_BASE | RETRY_MAX | TIMEOUT | SOFT_TIMEOUT
            | EXPIRES_AT | SUBMITTED_AT | FIRST_ATTEMPT_AT | TASKS | DEAD_AT | DEAD_STARTED_AT
            | FENCE | LAPSES | LEASE_TERM | DELIVERY_COUNT | ACQUIRED_COUNT | CRASHES | REPLAYS => {
                Some(Self::Number)
            }
            RETRY_FACTOR => Some(Self::Decimal),
            HANDED_ON | RETURNED | DEAD_REDELIVERED => Some(Self::Flag),
            _ => None,
        }
    }
}

/// Whether Garenne reads a header of this name. Such a header is kept whatever its type, so that a
/// wrong type is refused and not taken for an absent header.
pub(crate) fn is_defined(name: &str) -> bool {
    HeaderType::of(name).is_some()
}

/// Refuses a message with a header that does not have its documented type, whether or not the
/// caller reads that header.
pub(super) fn check(message: &Message) -> Result<(), Malformed> {
    message.headers.iter().try_for_each(|(name, value)| match HeaderType::of(name) {
        None => Ok(()),
        Some(HeaderType::Text) => as_text(name, value).map(drop),
        Some(HeaderType::Number) => as_number(name, value).map(drop),
        Some(HeaderType::Decimal) => as_decimal(name, value).map(drop),
        Some(HeaderType::Flag) => as_flag(name, value).map(drop),
    })
}

/// Headers that a message must not carry when it is published again: RabbitMQ's record of
/// dead-lettering, by which it drops a message that seems to go in a circle, and the marks of a
/// delay or return that is over.
pub(super) fn is_spent(name: &str) -> bool {
    name == "x-death"
        || name == DELIVERY_COUNT
        || name == ACQUIRED_COUNT
        || name == RETURNED
        || name.starts_with("x-first-death-")
        || name.starts_with("x-last-death-")
        || name.starts_with(DELAY_MARK)
}

/// Removes the count of lapses: an execution has ended, so its worker is alive.
pub(super) fn clear_lapses(message: &mut Message) {
    message.headers.retain(|(name, _)| name != LAPSES);
}

/// A header that must be text.
pub(super) fn text<'a>(message: &'a Message, name: &str) -> Result<Option<&'a str>, Malformed> {
    message.header(name).map(|value| as_text(name, value)).transpose()
}

/// A header that must be a whole number from 0 on. A text of digits is accepted, since shells and
/// some client libraries can send nothing else.
pub(super) fn number(message: &Message, name: &str) -> Result<Option<u64>, Malformed> {
    message.header(name).map(|value| as_number(name, value)).transpose()
}

/// A header that must be a [`number`] of milliseconds.
pub(super) fn millis(message: &Message, name: &str) -> Result<Option<Duration>, Malformed> {
    Ok(number(message, name)?.map(Duration::from_millis))
}

/// A header that must be a finite number. An integer, or a text that is such a number, is accepted.
pub(super) fn decimal(message: &Message, name: &str) -> Result<Option<f64>, Malformed> {
    message.header(name).map(|value| as_decimal(name, value)).transpose()
}

/// A header that must be a boolean.
pub(super) fn flag(message: &Message, name: &str) -> Result<Option<bool>, Malformed> {
    message.header(name).map(|value| as_flag(name, value)).transpose()
}

fn as_text<'a>(name: &str, value: &'a HeaderValue) -> Result<&'a str, Malformed> {
    match value {
        HeaderValue::Text(text) => Ok(text),
        HeaderValue::Int(_)
        | HeaderValue::Float(_)
        | HeaderValue::Bool(_)
        | HeaderValue::Foreign(_) => Err(wrong(name, value, "text")),
    }
}

fn as_number(name: &str, value: &HeaderValue) -> Result<u64, Malformed> {
    let number = match value {
        HeaderValue::Int(number) => u64::try_from(*number).ok(),
        HeaderValue::Text(text) => text.trim().parse().ok(),
        HeaderValue::Float(_) | HeaderValue::Bool(_) | HeaderValue::Foreign(_) => None,
    };
    number.ok_or_else(|| wrong(name, value, "a whole number from 0 on"))
}

fn as_decimal(name: &str, value: &HeaderValue) -> Result<f64, Malformed> {
    let number = match value {
        // Every i32 is an f64. A larger integer might lose digits, and makes no sense as a factor.
        HeaderValue::Int(number) => i32::try_from(*number).ok().map(f64::from),
        HeaderValue::Float(number) => Some(*number),
        HeaderValue::Text(text) => text.trim().parse().ok(),
        HeaderValue::Bool(_) | HeaderValue::Foreign(_) => None,
    };
    let finite = number.filter(|number| number.is_finite());
    finite.ok_or_else(|| wrong(name, value, "a finite number"))
}

fn as_flag(name: &str, value: &HeaderValue) -> Result<bool, Malformed> {
    match value {
        HeaderValue::Bool(truth) => Ok(*truth),
        HeaderValue::Text(_)
        | HeaderValue::Int(_)
        | HeaderValue::Float(_)
        | HeaderValue::Foreign(_) => Err(wrong(name, value, "a boolean")),
    }
}

fn wrong(name: &str, value: &HeaderValue, expected: &str) -> Malformed {
    Malformed::new(format_args!("header {name} is {value}, expected {expected}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::ForeignValue;

    /// The names of this file, read from its source so that none is forgotten.
    fn names() -> Vec<&'static str> {
        let names = include_str!("headers.rs").lines().filter_map(|line| {
            let (_, value) = line.strip_prefix("pub(super) const ")?.split_once(": &str = \"")?;
            value.strip_suffix("\";")
        });
        // RabbitMQ writes those two, and a dead letter whose record cannot be read is kept as well.
        names.filter(|name| !name.starts_with("x-last-death-")).collect()
    }

    /// One value of each AMQP type, and the header types that accept it.
    fn values() -> Vec<(HeaderValue, &'static [HeaderType])> {
        use HeaderType::{Decimal, Flag, Number, Text};
        let foreign = |value| (HeaderValue::Foreign(value), &[] as &[_]);
        vec![
            (HeaderValue::Text("7".to_owned()), &[Text, Number, Decimal]),
            (HeaderValue::Text("x".to_owned()), &[Text]),
            (HeaderValue::Text("1.5".to_owned()), &[Text, Decimal]),
            (HeaderValue::Int(7), &[Number, Decimal]),
            (HeaderValue::Int(-7), &[Decimal]),
            (HeaderValue::Int(1 << 40), &[Number]),
            (HeaderValue::Float(7.0), &[Decimal]),
            (HeaderValue::Float(f64::NAN), &[]),
            (HeaderValue::Bool(true), &[Flag]),
            foreign(ForeignValue::Timestamp(1_795_422_431)),
            foreign(ForeignValue::Bytes(b"7".to_vec().into())),
            foreign(ForeignValue::Decimal { scale: 1, value: 70 }),
            foreign(ForeignValue::Nested),
        ]
    }

    #[test]
    fn every_defined_header_accepts_its_documented_types_only() {
        let names = names();
        assert!(names.len() > 30, "{names:?}");
        for name in names.into_iter().chain(["garenne-delay-03"]) {
            let header_type = HeaderType::of(name).unwrap_or_else(|| panic!("{name} has no type"));
            for (value, accepted_by) in values() {
                let mut message = Message::default();
                message.set_header(name, value.clone());
                let checked = check(&message);
                assert_eq!(checked.is_ok(), accepted_by.contains(&header_type), "{name}: {value}");
                if let Err(malformed) = checked {
                    assert!(malformed.0.contains(name), "{malformed}");
                }
            }
        }
    }

    #[test]
    fn headers_that_are_not_defined_may_have_any_type() {
        for (value, _) in values() {
            let mut message = Message::default();
            message.set_header("x-mine", value.clone());
            message.set_header("x-garenne-unheard-of", value);
            assert_eq!(check(&message), Ok(()));
        }
    }

    #[test]
    fn a_long_text_does_not_push_the_expected_type_out_of_the_error() {
        let mut message = Message::default();
        message.set_header(ATTEMPT, HeaderValue::Text("x".repeat(30_000)));
        let error = check(&message).unwrap_err();
        assert!(error.0.ends_with("expected a whole number from 0 on"), "{error}");
    }
}
