//! A task as an AMQP message, both ways.
//!
//! Only `type` and a JSON body are required; every other property and header has a default. A
//! property or header that is present must be valid: a number that does not parse makes the task
//! malformed, and is not treated as absent. Changing a message that is published again (its
//! attempt, its delay, its id) happens here too; publishing it does not.

use std::sync::Arc;
use std::time::Duration;

use super::codec::{Codec, Payload};
use super::depth::{MAX_DEPTH, is_too_deep};
use super::headers::{self, decimal, millis, number, text};
use super::malformed::{MAX_BODY_BYTES, MAX_HEADER_BYTES, Malformed};
use super::message::{HeaderName, HeaderValue, Message, Properties};
use crate::failpoints::Protection;
use crate::fingerprint::Fingerprint;
use crate::names::{BatchId, QueueName, TaskId, TaskName};
use crate::printable::is_printable;
use crate::retry::RetryPolicy;
use crate::task::{Options, ReplyFormat, ReplyTo, TaskMessage};
use crate::timestamp::Timestamp;

const BUNDLE: &str = "bundle";

/// Encodes a task. `app_id` is the name of the publishing process, shown in the management UI.
pub fn encode(task: &TaskMessage, app_id: &str) -> Message {
    let reply = task.reply.as_ref();
    let properties = Properties {
        content_type: Some(task.args.codec.content_type().to_owned()),
        kind: Some(task.name.to_string()),
        message_id: Some(task.id.to_string()),
        correlation_id: reply.and_then(|reply| reply.correlation_id.clone()),
        reply_to: reply.map(|reply| reply.queue.to_string()),
        app_id: Some(app_id.to_owned()),
        timestamp: task.submitted_at.map(|at| at.as_millis() / 1000),
        priority: task.options.priority,
        ..Properties::default()
    };
    Message { properties, headers: encode_headers(task), body: task.args.bytes.clone() }
}

fn encode_headers(task: &TaskMessage) -> Vec<(HeaderName, HeaderValue)> {
    let mut list = vec![int(headers::ATTEMPT, u64::from(task.attempt))];
    let (retry, default) = (task.options.retry, RetryPolicy::DEFAULT);
    if retry.max_attempts != default.max_attempts {
        list.push(int(headers::MAX_ATTEMPTS, u64::from(retry.max_attempts)));
    }
    if retry.base != default.base {
        list.push(span(headers::RETRY_BASE, retry.base));
    }
    if retry.factor.total_cmp(&default.factor).is_ne() {
        list.push((headers::RETRY_FACTOR.into(), HeaderValue::Float(retry.factor)));
    }
    if retry.max != default.max {
        list.push(span(headers::RETRY_MAX, retry.max));
    }
    if let Some(timeout) = task.options.timeout {
        list.push(span(headers::TIMEOUT, timeout));
    }
    if let Some(timeout) = task.options.soft_timeout {
        list.push(span(headers::SOFT_TIMEOUT, timeout));
    }
    if let Some(at) = task.options.expires_at {
        list.push(int(headers::EXPIRES_AT, at.as_millis()));
    }
    if let Some(batch) = &task.batch {
        list.push((headers::BATCH.into(), HeaderValue::Text(batch.to_string())));
    }
    if let Some(at) = task.submitted_at {
        list.push(int(headers::SUBMITTED_AT, at.as_millis()));
    }
    if let Some(parent) = &task.traceparent {
        list.push((headers::TRACEPARENT.into(), HeaderValue::Text(parent.to_string())));
    }
    if let Some(fingerprint) = task.fingerprint {
        list.push((headers::FINGERPRINT.into(), HeaderValue::Text(fingerprint.to_string())));
    }
    if task.reply.as_ref().is_some_and(|reply| reply.format == ReplyFormat::Bundle) {
        list.push((headers::REPLY_FORMAT.into(), HeaderValue::Text(BUNDLE.to_owned())));
    }
    list
}

/// Decodes a task that was delivered from `queue`.
///
/// `Ok(None)` is a valid task without an id. Before it runs it must be published again under an id,
/// and confirmed, because its redelivery would otherwise count as another task ([`assign_id`]).
pub fn decode(message: &Message, queue: &QueueName) -> Result<Option<TaskMessage>, Malformed> {
    let properties = &message.properties;
    let kind = properties.kind.as_deref();
    let name =
        kind.ok_or_else(|| Malformed::new("the property type (the task name) is missing"))?;
    let name = TaskName::new(name)?;
    let args = decode_args(message)?;
    headers::check(message)?;
    let attempt = number(message, headers::ATTEMPT)?.unwrap_or(1);
    let attempt = u32::try_from(attempt).unwrap_or(u32::MAX).max(1);
    let batch = text(message, headers::BATCH)?.map(BatchId::new).transpose()?;
    let submitted_at = match number(message, headers::SUBMITTED_AT)? {
        Some(millis) => Some(Timestamp::from_millis(millis)),
        None => properties.timestamp.map(|s| Timestamp::from_millis(s.saturating_mul(1000))),
    };
    let (reply, options) = (decode_reply(message)?, decode_options(message)?);
    let traceparent = text(message, headers::TRACEPARENT)?.map(Arc::from);
    let fingerprint = fingerprint(message)?;
    check_printable(message)?;
    let Some(id) = properties.message_id.as_deref() else { return Ok(None) };
    let id = TaskId::new(id)?;
    let queue = queue.clone();
    Ok(Some(TaskMessage {
        id,
        name,
        queue,
        args,
        attempt,
        batch,
        reply,
        options,
        submitted_at,
        traceparent,
        fingerprint,
    }))
}

pub(super) fn fingerprint(message: &Message) -> Result<Option<Fingerprint>, Malformed> {
    let text = text(message, headers::FINGERPRINT)?;
    text.map(str::parse).transpose().map_err(Malformed::new)
}

/// Refuses unprintable text in properties that are echoed, logged or used as an address. Names, ids
/// and types have rules of their own.
///
/// This also refuses the bytes that [`frames`](super::frames) substitutes for invalid UTF-8.
fn check_printable(message: &Message) -> Result<(), Malformed> {
    let Properties { correlation_id, reply_to, app_id, .. } = &message.properties;
    let known = [("correlation_id", correlation_id), ("reply_to", reply_to), ("app_id", app_id)];
    known.into_iter().try_for_each(|(name, text)| check_text(name, text.as_deref()))
}

pub(super) fn check_text(name: &str, text: Option<&str>) -> Result<(), Malformed> {
    match text.filter(|text| !text.chars().all(is_printable)) {
        None => Ok(()),
        Some(text) => Err(Malformed::new(format_args!(
            "property {name} is {text:?}, which has unprintable characters"
        ))),
    }
}

/// The same message under a new id, ready to be published again.
pub fn assign_id(message: &Message) -> (TaskId, Message) {
    let id = TaskId::generate();
    let mut message = for_republish(message);
    message.properties.message_id = Some(id.to_string());
    (id, message)
}

/// The message as it is published again: without `expiration`, and without the headers that the
/// broker has added.
pub fn for_republish(message: &Message) -> Message {
    let mut message = message.clone();
    if Protection::SpentHeaders.is_enabled() {
        message.headers.retain(|(name, _)| !headers::is_spent(name));
    }
    // The sender's TTL applied to the queue that it published to. It would end a delay too early,
    // and would delete a dead letter.
    message.properties.expiration = None;
    message
}

/// The same message with the attempt number `attempt`, and everything else as its sender wrote it.
pub fn next_attempt(message: &Message, attempt: u32) -> Message {
    let mut message = for_republish(message);
    headers::clear_lapses(&mut message);
    message.set_header(headers::ATTEMPT, HeaderValue::Int(attempt.into()));
    message
}

/// When the first attempt started, on the message of a later attempt. For decoded tasks: [`decode`]
/// refuses a header of the wrong type, which counts as absent here.
pub fn first_attempt_at(message: &Message) -> Option<Timestamp> {
    number(message, headers::FIRST_ATTEMPT_AT).ok().flatten().map(Timestamp::from_millis)
}

/// Records when an attempt started, unless an earlier start is recorded.
pub fn note_first_attempt(message: &mut Message, started: Timestamp) {
    let first = first_attempt_at(message).map_or(started, |first| first.min(started)).as_millis();
    let first = HeaderValue::Int(i64::try_from(first).unwrap_or(i64::MAX));
    message.set_header(headers::FIRST_ATTEMPT_AT, first);
}

/// The message with the marks of its delay levels set and older marks removed.
pub fn with_delay_marks(message: &Message, marks: &[String]) -> Message {
    let mut message = for_republish(message);
    let marks = marks.iter().map(|mark| (mark.clone().into(), HeaderValue::Bool(true)));
    message.headers.extend(marks);
    message
}

fn decode_args(message: &Message) -> Result<Payload, Malformed> {
    let properties = &message.properties;
    let header_bytes = message.header_bytes();
    if header_bytes > MAX_HEADER_BYTES {
        return Err(Malformed::new(format_args!("headers of {header_bytes} bytes are too large")));
    }
    if message.body.len() > MAX_BODY_BYTES {
        let length = message.body.len();
        return Err(Malformed::new(format_args!("a body of {length} bytes is too large")));
    }
    if let Some(encoding) = properties.content_encoding.as_deref() {
        // pika and other clients set "utf-8" here, which is not a compression.
        if !["", "utf-8", "identity"].contains(&encoding.to_ascii_lowercase().as_str()) {
            return Err(Malformed::new(format_args!(
                "content_encoding {encoding:?} is not supported; send the body uncompressed"
            )));
        }
    }
    let codec = match properties.content_type.as_deref() {
        None => Codec::Json,
        Some(content_type) => Codec::from_content_type(content_type).ok_or_else(|| {
            Malformed::new(format_args!(
                "content_type {content_type:?} is neither application/json \
                 nor application/x-bincode"
            ))
        })?,
    };
    let args = Payload { codec, bytes: message.body.clone() };
    check_args(&args)?;
    Ok(args)
}

/// Checks that arguments declared as JSON are valid JSON and not nested too deeply. Called once,
/// before a handler sees them, so that an invalid body is never charged to a handler.
pub fn check_args(args: &Payload) -> Result<(), Malformed> {
    match args.codec {
        Codec::Bincode => Ok(()),
        Codec::Json => {
            serde_json::from_slice::<&serde_json::value::RawValue>(&args.bytes)
                .map_err(|error| Malformed::new(format_args!("the body is not JSON: {error}")))?;
            if is_too_deep(&args.bytes) {
                return Err(Malformed::new(format_args!(
                    "the body is nested more than {MAX_DEPTH} levels deep"
                )));
            }
            Ok(())
        }
    }
}

/// Where the reply to this message goes, as far as it can be decoded. For messages that are not
/// valid tasks.
pub fn reply_of(message: &Message) -> Option<ReplyTo> {
    decode_reply(message).ok().flatten()
}

fn decode_reply(message: &Message) -> Result<Option<ReplyTo>, Malformed> {
    let format = match text(message, headers::REPLY_FORMAT)? {
        None => ReplyFormat::Plain,
        Some(BUNDLE) => ReplyFormat::Bundle,
        Some(other) => {
            return Err(Malformed::new(format_args!("unknown reply format {other:?}")));
        }
    };
    let properties = &message.properties;
    Ok(properties.reply_to.clone().filter(|queue| !queue.is_empty()).map(|queue| ReplyTo {
        queue: queue.into(),
        correlation_id: properties.correlation_id.clone(),
        format,
    }))
}

fn decode_options(message: &Message) -> Result<Options, Malformed> {
    let default = RetryPolicy::DEFAULT;
    let max_attempts = number(message, headers::MAX_ATTEMPTS)?;
    let max_attempts =
        max_attempts.map_or(default.max_attempts, |n| u32::try_from(n).unwrap_or(u32::MAX));
    let retry = RetryPolicy {
        max_attempts: max_attempts.max(1),
        base: millis(message, headers::RETRY_BASE)?.unwrap_or(default.base),
        factor: decimal(message, headers::RETRY_FACTOR)?.unwrap_or(default.factor),
        max: millis(message, headers::RETRY_MAX)?.unwrap_or(default.max),
    };
    Ok(Options {
        retry,
        timeout: millis(message, headers::TIMEOUT)?,
        soft_timeout: millis(message, headers::SOFT_TIMEOUT)?,
        expires_at: number(message, headers::EXPIRES_AT)?.map(Timestamp::from_millis),
        priority: message.properties.priority,
    })
}

fn int(name: &'static str, value: u64) -> (HeaderName, HeaderValue) {
    (name.into(), HeaderValue::Int(i64::try_from(value).unwrap_or(i64::MAX)))
}

fn span(name: &'static str, value: Duration) -> (HeaderName, HeaderValue) {
    int(name, as_millis(value))
}

pub(super) fn as_millis(value: Duration) -> u64 {
    u64::try_from(value.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{DeadLetter, ForeignValue};
    use proptest::prelude::*;

    fn minimal() -> Message {
        Message {
            properties: Properties {
                kind: Some("text.count_words".to_owned()),
                message_id: Some("t-1".to_owned()),
                ..Properties::default()
            },
            body: br#"{"text":"a b"}"#.to_vec().into(),
            ..Message::default()
        }
    }

    fn queue() -> QueueName {
        QueueName::default()
    }

    fn reason(message: &Message) -> String {
        decode(message, &queue()).unwrap_err().0
    }

    #[test]
    fn a_type_and_a_json_body_are_enough() {
        let mut message = minimal();
        message.properties.message_id = None;
        assert_eq!(decode(&message, &queue()), Ok(None));
        let (id, message) = assign_id(&message);
        let task = decode(&message, &queue()).unwrap().unwrap();
        assert_eq!(task.id, id);
        assert_eq!(task.attempt, 1);
        assert_eq!(task.options, Options::default());
        assert_eq!(task.reply, None);
    }

    #[test]
    fn each_violation_has_its_own_reason() {
        let mut no_type = minimal();
        no_type.properties.kind = None;
        assert!(reason(&no_type).contains("type"));

        let mut body = minimal();
        body.body = b"{\"text\":".to_vec().into();
        assert!(reason(&body).contains("not JSON"));
        body.body = Vec::new().into();
        assert!(reason(&body).contains("not JSON"));

        let mut content_type = minimal();
        content_type.properties.content_type = Some("text/plain".to_owned());
        assert!(reason(&content_type).contains("content_type"));

        let mut encoding = minimal();
        encoding.properties.content_encoding = Some("gzip".to_owned());
        assert!(reason(&encoding).contains("content_encoding"));

        let mut header = minimal();
        header.set_header(headers::TIMEOUT, HeaderValue::Text("soon".to_owned()));
        assert!(reason(&header).contains("x-garenne-timeout-ms"));
        header.set_header(headers::TIMEOUT, HeaderValue::Int(-1));
        assert!(reason(&header).contains("x-garenne-timeout-ms"));
    }

    /// A client that sends a date as AMQP's timestamp means seconds. Read as milliseconds, every
    /// such task would have expired in 1970.
    #[test]
    fn a_timestamp_in_place_of_milliseconds_is_malformed() {
        let mut message = minimal();
        let timestamp = HeaderValue::Foreign(ForeignValue::Timestamp(1_795_422_431));
        message.set_header(headers::EXPIRES_AT, timestamp);
        let expected = "header x-garenne-expires-at-ms is the timestamp 1795422431, \
                        expected a whole number from 0 on";
        assert_eq!(reason(&message), expected);
    }

    #[test]
    fn a_wrong_type_is_malformed_also_in_headers_that_workers_and_the_broker_write() {
        for name in [
            headers::FIRST_ATTEMPT_AT,
            headers::FENCE,
            headers::LAPSES,
            headers::CRASHES,
            headers::CRASH_LOG,
            headers::REPLAYS,
            headers::REPLAY_OF,
            headers::RETURNED,
            headers::DELIVERY_COUNT,
            "garenne-delay-03",
        ] {
            let mut message = minimal();
            message.set_header(name, HeaderValue::Float(1.0));
            assert!(reason(&message).contains(name), "{name}");
        }
    }

    #[test]
    fn foreign_headers_stay_unchanged_when_a_task_is_published_again() {
        let mut message = minimal();
        for (name, value) in [
            ("x-date", ForeignValue::Timestamp(7)),
            ("x-bytes", ForeignValue::Bytes(vec![0xff, 0x41].into())),
            ("x-price", ForeignValue::Decimal { scale: 2, value: 199 }),
        ] {
            message.set_header(name, HeaderValue::Foreign(value));
        }
        assert!(decode(&message, &queue()).is_ok());
        assert_eq!(for_republish(&message).headers, message.headers);
        let letter = DeadLetter::new(&message, "cpu", crate::DeadReason::Fatal, "failed", "w");
        assert_eq!(DeadLetter::decode(&letter.encode()).message.headers, message.headers);
    }

    #[test]
    fn numbers_may_come_as_text() {
        let mut message = minimal();
        message.set_header(headers::MAX_ATTEMPTS, HeaderValue::Text(" 7 ".to_owned()));
        let task = decode(&message, &queue()).unwrap().unwrap();
        assert_eq!(task.options.retry.max_attempts, 7);
    }

    #[test]
    fn a_deeply_nested_body_is_refused_without_a_stack_overflow() {
        let mut message = minimal();
        message.body = "[".repeat(200_000).into_bytes().into();
        assert!(reason(&message).contains("not JSON"));
    }

    #[test]
    fn a_republish_drops_the_headers_that_the_broker_has_added() {
        let mut message = minimal();
        for spent in ["x-death", "x-first-death-reason", "x-last-death-queue", "garenne-delay-03"] {
            message.set_header(spent, HeaderValue::Bool(true));
        }
        message.set_header("x-mine", HeaderValue::Bool(true));
        let names: Vec<_> = for_republish(&message).headers.into_iter().map(|(n, _)| n).collect();
        assert_eq!(names, ["x-mine"]);
    }

    fn any_task() -> impl Strategy<Value = TaskMessage> {
        let options = (1..=u32::MAX, 0..1_000_000_u64, 0.0..100.0_f64, any::<Option<u32>>());
        let identity = ("[a-z.]{1,20}", "[a-zA-Z0-9 é-]{1,40}", any::<Option<u32>>());
        (options, identity, any::<Vec<u8>>(), any::<(bool, bool, Option<u8>)>()).prop_map(
            |(
                (max_attempts, base, factor, at),
                (name, id, timeout),
                args,
                (reply, bundle, priority),
            )| {
                let format = if bundle { ReplyFormat::Bundle } else { ReplyFormat::Plain };
                let base = Duration::from_millis(base);
                let retry = RetryPolicy { max_attempts, base, factor, max: base * 2 };
                TaskMessage {
                    id: TaskId::new(&id).unwrap(),
                    name: TaskName::new(&name).unwrap(),
                    queue: queue(),
                    args: Payload { codec: Codec::Bincode, bytes: args.into() },
                    attempt: max_attempts,
                    batch: reply.then(BatchId::generate),
                    reply: reply.then(|| ReplyTo {
                        queue: id.as_str().into(),
                        correlation_id: bundle.then(|| name.clone()),
                        format,
                    }),
                    options: Options {
                        retry,
                        timeout: timeout.map(|ms| Duration::from_millis(ms.into())),
                        soft_timeout: at.map(|ms| Duration::from_millis(ms.into())),
                        expires_at: at.map(|ms| Timestamp::from_millis(ms.into())),
                        priority,
                    },
                    submitted_at: at.map(|ms| Timestamp::from_millis(ms.into())),
                    fingerprint: timeout.map(|number| Fingerprint::from_u64(number.into())),
                    traceparent: bundle.then(|| name.into()),
                }
            },
        )
    }

    fn any_header() -> impl Strategy<Value = HeaderValue> {
        prop_oneof![
            any::<String>().prop_map(HeaderValue::Text),
            any::<i64>().prop_map(HeaderValue::Int),
            any::<f64>().prop_map(HeaderValue::Float),
            any::<bool>().prop_map(HeaderValue::Bool),
            any::<u64>().prop_map(|at| HeaderValue::Foreign(ForeignValue::Timestamp(at))),
        ]
    }

    proptest! {
        #[test]
        fn encoded_tasks_decode(task in any_task()) {
            let message = encode(&task, "test");
            prop_assert_eq!(decode(&message, &queue()), Ok(Some(task)));
        }

        #[test]
        fn the_decoder_does_not_panic_on_any_message(
            kind in any::<Option<String>>(), id in any::<Option<String>>(),
            content_type in any::<Option<String>>(), body in any::<Vec<u8>>(),
            values in prop::collection::vec(any_header(), 12),
        ) {
            let names = [
                headers::ATTEMPT, headers::MAX_ATTEMPTS, headers::RETRY_BASE,
                headers::RETRY_FACTOR, headers::RETRY_MAX, headers::TIMEOUT, headers::EXPIRES_AT,
                headers::BATCH, headers::SUBMITTED_AT, headers::TRACEPARENT, headers::REPLY_FORMAT,
                headers::SOFT_TIMEOUT,
            ];
            let properties =
                Properties { kind, message_id: id, content_type, ..Properties::default() };
            let headers = names.into_iter().map(HeaderName::from).zip(values).collect();
            let message = Message { properties, headers, body: body.into() };
            drop(decode(&message, &queue()));
        }
    }
}
