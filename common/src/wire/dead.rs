//! Dead letters: messages that were given up, kept whole, with the reason in headers.
//!
//! Comes in: a message and why it was given up, or what arrived in the dead-letter queue. Goes out:
//! the message to publish there, or the record for the store. Decoding never fails.

use super::headers::{self, flag, number, text};
use super::malformed::{MAX_HEADER_BYTES, Malformed};
use super::message::{HeaderValue, Message, header_bytes};
use super::task;
use crate::names::{BatchId, QueueName, TaskId, TaskName};
use crate::outcome::{DeadReason, Status, TaskResult};
use crate::timestamp::Timestamp;

/// Longest error text in a header, in characters. All headers share one frame.
const MAX_ERROR_CHARS: usize = 4_000;
/// Prefix of the headers that describe why a message was given up.
const DEAD_PREFIX: &str = "x-garenne-dead-";
/// Longest name of a queue or a process, in characters. Any client can write these headers.
const MAX_NAME_CHARS: usize = 255;

/// A message that was given up.
#[derive(Debug, Clone, PartialEq)]
pub struct DeadLetter {
    /// The message as it was, with an id assigned if it had no valid one.
    pub message: Message,
    /// The id of the message.
    pub id: TaskId,
    /// The short name of the queue that it was published to. Foreign routing keys may be any text.
    pub queue: String,
    /// Why it was given up.
    pub reason: DeadReason,
    /// The text of the last error.
    pub error: String,
    /// The name of the process that gave it up.
    pub by: String,
    /// When the last attempt started, if there was one.
    pub started_at: Option<Timestamp>,
    /// When it was given up.
    pub at: Timestamp,
    /// Whether its last delivery was a redelivery.
    pub redelivered: bool,
}

impl DeadLetter {
    /// The dead letter of a message that is given up now.
    pub fn new(message: &Message, queue: &str, reason: DeadReason, error: &str, by: &str) -> Self {
        let mut message = task::for_republish(message);
        // Headers of an earlier dead letter, or forged ones, must not be read as part of this one.
        message.headers.retain(|(name, _)| !name.starts_with(DEAD_PREFIX));
        drop_oversize_headers(&mut message);
        let id = message.properties.message_id.as_deref().map(TaskId::new);
        let id = id.and_then(Result::ok).unwrap_or_else(TaskId::generate);
        message.properties.message_id = Some(id.to_string());
        Self {
            message,
            id,
            queue: queue.chars().take(MAX_NAME_CHARS).collect(),
            reason,
            error: error.chars().take(MAX_ERROR_CHARS).collect(),
            by: by.chars().take(MAX_NAME_CHARS).collect(),
            started_at: None,
            at: Timestamp::now(),
            redelivered: false,
        }
    }

    /// Encodes the dead letter: the message, and the reason in headers.
    pub fn encode(&self) -> Message {
        let mut message = self.message.clone();
        let millis =
            |at: Timestamp| HeaderValue::Int(i64::try_from(at.as_millis()).unwrap_or(i64::MAX));
        message
            .set_header(headers::DEAD_REASON, HeaderValue::Text(self.reason.as_str().to_owned()));
        message.set_header(headers::DEAD_ERROR, HeaderValue::Text(self.error.clone()));
        message.set_header(headers::DEAD_BY, HeaderValue::Text(self.by.clone()));
        message.set_header(headers::DEAD_QUEUE, HeaderValue::Text(self.queue.clone()));
        message.set_header(headers::DEAD_AT, millis(self.at));
        message.set_header(headers::DEAD_REDELIVERED, HeaderValue::Bool(self.redelivered));
        if let Some(at) = self.started_at {
            message.set_header(headers::DEAD_STARTED_AT, millis(at));
        }
        message
    }

    /// Whether a message is a dead letter of a worker, by the presence of its reason.
    pub fn is_one(message: &Message) -> bool {
        message.header(headers::DEAD_REASON).is_some()
    }

    /// Decodes what arrived in the dead-letter queue, published by a worker or dead-lettered by the
    /// broker.
    ///
    /// Nothing is refused here, since a dead letter that is refused would have no place left to go.
    /// A letter whose own headers (`x-garenne-dead-*`) have a wrong type or value gets the reason
    /// `malformed` and an error that names the header.
    pub fn decode(message: &Message) -> Self {
        if !Self::is_one(message) {
            return Self::from_broker(message);
        }
        Self::from_worker(message)
            .unwrap_or_else(|malformed| Self::of_malformed(message, &malformed))
    }

    fn from_worker(message: &Message) -> Result<Self, Malformed> {
        let word = |name| text(message, name).map(Option::unwrap_or_default);
        let time = |name| number(message, name).map(|at| at.map(Timestamp::from_millis));
        let code = word(headers::DEAD_REASON)?;
        let reason = DeadReason::from_code(code).ok_or_else(|| {
            Malformed::new(format_args!("header {} is {code:?}", headers::DEAD_REASON))
        })?;
        let (queue, error) = (word(headers::DEAD_QUEUE)?, word(headers::DEAD_ERROR)?);
        Ok(Self {
            started_at: time(headers::DEAD_STARTED_AT)?,
            at: time(headers::DEAD_AT)?.unwrap_or_else(Timestamp::now),
            redelivered: flag(message, headers::DEAD_REDELIVERED)?.unwrap_or(false),
            ..Self::new(message, queue, reason, error, word(headers::DEAD_BY)?)
        })
    }

    /// A letter whose own headers cannot be decoded. It keeps those that can.
    fn of_malformed(message: &Message, malformed: &Malformed) -> Self {
        let word = |name| text(message, name).ok().flatten().unwrap_or_default();
        let error = match word(headers::DEAD_ERROR) {
            "" => format!("invalid dead letter: {malformed}"),
            error => format!("invalid dead letter: {malformed}; its error: {error}"),
        };
        let (queue, by) = (word(headers::DEAD_QUEUE), word(headers::DEAD_BY));
        Self::new(message, queue, DeadReason::Malformed, &error, by)
    }

    /// The broker's record is in `x-last-death-*`: the full name of the queue, and why. What cannot
    /// be read there is left out.
    fn from_broker(message: &Message) -> Self {
        let why = text(message, headers::LAST_DEATH_REASON).ok().flatten().unwrap_or("unknown");
        let queue = text(message, headers::LAST_DEATH_QUEUE).ok().flatten().unwrap_or_default();
        let short = queue.split_once(".tasks.").map_or(queue, |(_, short)| short);
        let reason = if why == "expired" { DeadReason::Expired } else { DeadReason::Broker };
        let error = format!("given up by the broker: {why} (queue {queue})");
        Self::new(message, short, reason, &error, "rabbitmq")
    }

    /// The final record of the task, if the reason of this letter ends the task.
    pub fn to_result(&self) -> Option<TaskResult> {
        if !self.reason.is_final() {
            return None;
        }
        self.to_result_as(self.reason, &self.error)
    }

    /// The final record of the task with another reason and error, for a parked task that is ended.
    pub fn to_result_as(&self, reason: DeadReason, error: &str) -> Option<TaskResult> {
        self.record(Status::Failed, Some(reason), error)
    }

    /// The final record of the task if it is cancelled while it is parked. The error text of the
    /// letter becomes that of the record.
    pub fn to_cancelled(&self) -> Option<TaskResult> {
        self.record(Status::Cancelled, None, &self.error)
    }

    fn record(
        &self,
        status: Status,
        reason: Option<DeadReason>,
        error: &str,
    ) -> Option<TaskResult> {
        let name = self.message.properties.kind.as_deref().map(TaskName::new);
        let attempt = number(&self.message, headers::ATTEMPT).ok().flatten().unwrap_or(1);
        // The message has the number of the next attempt, which counts only if it was started.
        let attempt = if self.started_at.is_some() { attempt } else { attempt.saturating_sub(1) };
        Some(TaskResult {
            id: self.id.clone(),
            // An invalid name may be the very reason of the letter.
            name: name.and_then(Result::ok).or_else(|| TaskName::new("unknown").ok())?,
            queue: QueueName::new(&self.queue).unwrap_or_default(),
            batch: self.batch(),
            status,
            output: None,
            error: Some(error.to_owned()),
            reason,
            attempt: u32::try_from(attempt).unwrap_or(u32::MAX),
            redelivered: self.redelivered,
            worker: self.by.as_str().into(),
            started_at: self.started_at.unwrap_or(self.at),
            finished_at: self.at,
            // An invalid fingerprint, too, may be the reason of the letter.
            fingerprint: task::fingerprint(&self.message).unwrap_or_default(),
        })
    }

    /// The batch of the task, if its header is valid and its sender may add members to that batch.
    pub fn batch(&self) -> Option<BatchId> {
        let batch: Result<Option<&str>, Malformed> = text(&self.message, headers::BATCH);
        batch.ok().flatten().and_then(|id| BatchId::new(id).ok()?.membership())
    }
}

/// Drops the largest headers of a message until its reason fits into the same frame.
fn drop_oversize_headers(message: &mut Message) {
    let mut bytes = message.header_bytes();
    if bytes <= MAX_HEADER_BYTES {
        return;
    }
    // Sorted once: a frame holds about ten thousand headers, too many to search for each largest
    // one.
    let sizes = message.headers.iter().map(|(name, value)| header_bytes(name, value));
    let mut sizes: Vec<_> = sizes.enumerate().collect();
    sizes.sort_unstable_by_key(|(place, size)| (std::cmp::Reverse(*size), *place));
    let mut kept = vec![true; sizes.len()];
    for (place, size) in sizes {
        if bytes <= MAX_HEADER_BYTES {
            break;
        }
        kept[place] = false;
        bytes -= size;
    }
    let mut kept = kept.into_iter();
    message.headers.retain(|_| kept.next().unwrap_or(true));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{ForeignValue, Properties};

    fn message() -> Message {
        let properties = Properties {
            kind: Some("a.b".to_owned()),
            message_id: Some("t-1".to_owned()),
            ..Properties::default()
        };
        Message { properties, headers: vec![], body: b"{}".to_vec().into() }
    }

    #[test]
    fn a_dead_letter_keeps_the_whole_message() {
        let mut letter = DeadLetter::new(&message(), "cpu", DeadReason::Fatal, "no", "host:1");
        letter.started_at = Some(Timestamp::from_millis(7));
        letter.redelivered = true;
        let read = DeadLetter::decode(&letter.encode());
        assert_eq!(read, letter);
        assert_eq!(read.message, message());
        let result = read.to_result().unwrap();
        assert_eq!((result.attempt, result.reason), (1, Some(DeadReason::Fatal)));
    }

    #[test]
    fn a_dead_letter_of_the_broker_ends_its_task() {
        let mut dropped = message();
        dropped.set_header("x-last-death-reason", HeaderValue::Text("delivery_limit".to_owned()));
        dropped.set_header("x-last-death-queue", HeaderValue::Text("g.tasks.cpu".to_owned()));
        let letter = DeadLetter::decode(&dropped);
        assert_eq!((letter.reason, letter.queue.as_str()), (DeadReason::Broker, "cpu"));
        assert!(letter.error.contains("delivery_limit"));
        assert_eq!(letter.message, message());
        assert!(letter.to_result().is_some());
    }

    /// A timestamp that is read as milliseconds would put the letter into 1970, where retention
    /// deletes it.
    #[test]
    fn a_letter_whose_own_headers_are_wrong_is_kept_as_malformed() {
        for (name, value) in [
            (headers::DEAD_AT, HeaderValue::Foreign(ForeignValue::Timestamp(1_795_422_431))),
            (headers::DEAD_REDELIVERED, HeaderValue::Int(1)),
            (headers::DEAD_REASON, HeaderValue::Text("unheard_of".to_owned())),
            (headers::DEAD_REASON, HeaderValue::Foreign(ForeignValue::Nested)),
            (headers::DEAD_BY, HeaderValue::Foreign(ForeignValue::Bytes(vec![0xff].into()))),
        ] {
            let before = Timestamp::now();
            let mut encoded =
                DeadLetter::new(&message(), "cpu", DeadReason::Fatal, "no", "w").encode();
            encoded.set_header(name, value);
            let letter = DeadLetter::decode(&encoded);
            assert_eq!((letter.reason, &*letter.queue), (DeadReason::Malformed, "cpu"), "{name}");
            assert!(letter.error.contains(name), "{letter:?}");
            assert!(letter.error.ends_with("its error: no"), "{letter:?}");
            assert!(letter.at >= before && letter.to_result().is_some());
            assert_eq!(letter.message, message());
        }
    }

    #[test]
    fn an_empty_message_still_becomes_a_dead_letter() {
        let letter = DeadLetter::decode(&Message::default());
        assert_eq!(letter.message.properties.message_id.as_deref(), Some(letter.id.as_str()));
        assert_eq!(letter.to_result().unwrap().name.as_str(), "unknown");
    }

    #[test]
    fn headers_that_fill_a_frame_are_dropped_and_the_reason_stays() {
        let mut huge = message();
        huge.set_header("big", HeaderValue::Text("x".repeat(130_000)));
        huge.set_header("small", HeaderValue::Int(1));
        huge.properties.expiration = Some("100".to_owned());
        let letter = DeadLetter::new(&huge, "cpu", DeadReason::Malformed, "no", "w");
        let message = letter.encode();
        assert!(message.header_bytes() < MAX_HEADER_BYTES);
        assert!(message.header("big").is_none() && message.header("small").is_some());
        assert_eq!(message.properties.expiration, None, "a TTL would delete the dead letter");
    }

    #[test]
    fn thousands_of_headers_are_dropped_at_once() {
        let mut message = message();
        let flag = |number: u32| (format!("{number}").into(), HeaderValue::Bool(true));
        message.headers = (0..30_000).map(flag).collect();
        let begun = std::time::Instant::now();
        let letter = DeadLetter::new(&message, "cpu", DeadReason::Malformed, "no", "w");
        assert!(letter.message.header_bytes() <= MAX_HEADER_BYTES);
        assert!(letter.message.headers.len() > 1_000);
        // Searching for the largest header again for each removal takes seconds.
        assert!(begun.elapsed() < std::time::Duration::from_millis(500), "{:?}", begun.elapsed());
    }

    #[test]
    fn an_unknown_task_has_no_final_record() {
        let letter = DeadLetter::new(&message(), "cpu", DeadReason::UnknownTask, "no", "w");
        assert_eq!(letter.to_result(), None);
    }
}
