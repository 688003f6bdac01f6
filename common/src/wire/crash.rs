//! What a task message knows of the processes that died while they ran it.
//!
//! The count and the log travel in headers of the task itself, so they reach whoever runs it next and
//! are the evidence in the dead letter. They belong to the task, not to an attempt: a retry keeps them.

use super::headers::{self, number, text};
use super::message::{HeaderValue, Message};
use super::{Malformed, lease, task};
use crate::timestamp::Timestamp;

/// How much of the log is kept, newest lines last; headers share a frame with others.
const MAX_LOG_BYTES: usize = 4_000;

/// The crashes charged to a task, and who saw them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CrashRecord {
    /// How often a process died while it ran this task and nothing else.
    pub count: u32,
    /// One line for each, oldest first; the oldest go when there are too many.
    pub log: String,
}

impl CrashRecord {
    /// What the headers of a task say.
    pub fn read(message: &Message) -> Result<Self, Malformed> {
        let count = number(message, headers::CRASHES)?.unwrap_or_default();
        let log = text(message, headers::CRASH_LOG)?.unwrap_or_default().to_owned();
        Ok(Self { count: u32::try_from(count).unwrap_or(u32::MAX), log })
    }

    /// One crash more: `how` the process of `worker` ended.
    pub fn charged(mut self, at: Timestamp, worker: &str, how: &str) -> Self {
        self.count = self.count.saturating_add(1);
        let line = format!("{at} {worker}: {how}");
        self.log = if self.log.is_empty() { line } else { format!("{}\n{line}", self.log) };
        while self.log.len() > MAX_LOG_BYTES {
            match self.log.split_once('\n') {
                Some((_, newer)) => self.log = newer.into(),
                // One line alone that long: a worker may have any name.
                None => self.log = self.log.chars().take(MAX_LOG_BYTES / 4).collect(),
            }
        }
        self
    }

    /// The same message, and attempt, with this record, ready to be published again.
    pub fn write(&self, message: &Message) -> Message {
        let mut message = task::for_republish(message);
        headers::clear_lapses(&mut message);
        message.set_header(headers::CRASHES, HeaderValue::Int(self.count.into()));
        message.set_header(headers::CRASH_LOG, HeaderValue::Text(self.log.clone()));
        message
    }
}

/// Whether a message bears a mark of earlier deliveries, crashes or a lapsed lease; a cheap look, without decoding.
pub fn is_marked(message: &Message) -> bool {
    message.header(headers::CRASHES).is_some()
        || is_returned(message)
        || lease::lapses(message) > 0
        || deliveries(message) > 0
}

/// Marks a task that leaves a bundle which was delivered before, as the broker marks what it delivers
/// again.
pub fn mark_returned(message: &mut Message) {
    message.set_header(headers::RETURNED, HeaderValue::Bool(true));
}

/// Whether a task left a bundle that was delivered before.
pub fn is_returned(message: &Message) -> bool {
    message.header(headers::RETURNED) == Some(&HeaderValue::Bool(true))
}

/// How often the broker has delivered this very message before.
///
/// Up to RabbitMQ 4.2 this also counts deliveries that a worker has returned, from 4.3 on only those
/// that came back with a lost connection. For decoded tasks: [`task::decode`] refuses a header of the
/// wrong type, which counts as 0 here.
pub fn deliveries(message: &Message) -> u64 {
    number(message, headers::DELIVERY_COUNT).ok().flatten().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_charge_travels_in_the_message_and_leaves_the_attempt_alone() {
        let mut message = Message::default();
        message.set_header(headers::ATTEMPT, HeaderValue::Int(2));
        message.set_header(headers::DELIVERY_COUNT, HeaderValue::Int(4));
        assert!(is_marked(&message));
        assert_eq!(deliveries(&message), 4);
        let at = Timestamp::from_millis(0);
        let record = CrashRecord::read(&message).unwrap().charged(at, "w1", "signal SIGABRT");
        let message = record.write(&message);
        let record = CrashRecord::read(&message).unwrap().charged(at, "w2", "exit code 3");
        assert_eq!(record.count, 2);
        let lines: Vec<_> = record.log.lines().collect();
        assert_eq!(
            lines,
            ["1970-01-01T00:00:00Z w1: signal SIGABRT", "1970-01-01T00:00:00Z w2: exit code 3"]
        );
        assert_eq!(message.header(headers::ATTEMPT), Some(&HeaderValue::Int(2)));
        assert_eq!(deliveries(&message), 0, "a republished message starts afresh");
        assert!(is_marked(&message));
    }

    #[test]
    fn the_log_is_bounded_and_keeps_the_newest() {
        let at = Timestamp::from_millis(0);
        let record = (0..1_000).fold(CrashRecord::default(), |record, n| {
            record.charged(at, "worker", &format!("exit code {n}"))
        });
        assert_eq!(record.count, 1_000);
        assert!(record.log.len() <= MAX_LOG_BYTES && record.log.ends_with("exit code 999"));
        let endless = record.charged(at, &"é".repeat(MAX_LOG_BYTES), "x");
        assert!(endless.log.len() <= MAX_LOG_BYTES);
    }

    #[test]
    fn a_count_that_is_not_a_number_is_malformed() {
        for value in [HeaderValue::Text("many".to_owned()), HeaderValue::Float(1.0)] {
            let mut message = Message::default();
            message.set_header(headers::CRASHES, value);
            assert!(CrashRecord::read(&message).unwrap_err().0.contains(headers::CRASHES));
        }
    }
}
