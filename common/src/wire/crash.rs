//! The record of processes that died while they ran a task, in headers of the task's message.
//!
//! The headers reach the worker that runs the task next, and are the evidence in its dead letter.
//! They belong to the task and not to an attempt: a retry keeps them. This file reads and writes
//! them; the worker decides what follows.

use super::headers::{self, number, text};
use super::malformed::Malformed;
use super::message::{HeaderValue, Message};
use super::{lease, task};
use crate::timestamp::Timestamp;

/// Largest crash log, in bytes. All headers share one frame.
const MAX_LOG_BYTES: usize = 4_000;

/// The crashes charged to a task.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CrashRecord {
    /// How often a process died while it ran this task and nothing else.
    pub count: u32,
    /// One line for each crash (time, worker, signal or exit code), the oldest first. The oldest
    /// lines are dropped when the log becomes too long.
    pub log: String,
}

impl CrashRecord {
    /// Reads the record from the headers of a task. An absent header means no crash; counts above
    /// [`u32::MAX`] count as that.
    pub fn read(message: &Message) -> Result<Self, Malformed> {
        let count = number(message, headers::CRASHES)?.unwrap_or_default();
        let log = text(message, headers::CRASH_LOG)?.unwrap_or_default().to_owned();
        Ok(Self { count: u32::try_from(count).unwrap_or(u32::MAX), log })
    }

    /// The record with one more crash; `how` describes the end of the process of `worker`.
    pub fn charged(mut self, at: Timestamp, worker: &str, how: &str) -> Self {
        self.count = self.count.saturating_add(1);
        let line = format!("{at} {worker}: {how}");
        self.log = if self.log.is_empty() { line } else { format!("{}\n{line}", self.log) };
        while self.log.len() > MAX_LOG_BYTES {
            match self.log.split_once('\n') {
                Some((_, newer)) => self.log = newer.into(),
                // A single line can be too long, since a worker may have any name.
                None => self.log = self.log.chars().take(MAX_LOG_BYTES / 4).collect(),
            }
        }
        self
    }

    /// The same message, at the same attempt, with this record, ready to be published again.
    pub fn write(&self, message: &Message) -> Message {
        let mut message = task::for_republish(message);
        headers::clear_lapses(&mut message);
        message.set_header(headers::CRASHES, HeaderValue::Int(self.count.into()));
        message.set_header(headers::CRASH_LOG, HeaderValue::Text(self.log.clone()));
        message
    }
}

/// Whether a message shows an earlier delivery, a crash or a lapsed lease. The message is not
/// decoded.
pub fn is_marked(message: &Message) -> bool {
    message.header(headers::CRASHES).is_some()
        || is_returned(message)
        || lease::lapses(message) > 0
        || deliveries(message) > 0
}

/// Marks a task that was split from a redelivered bundle, since the broker's redelivery flag was on
/// the bundle.
pub fn mark_returned(message: &mut Message) {
    message.set_header(headers::RETURNED, HeaderValue::Bool(true));
}

/// Whether a task was split from a redelivered bundle.
pub fn is_returned(message: &Message) -> bool {
    message.header(headers::RETURNED) == Some(&HeaderValue::Bool(true))
}

/// How often the broker has delivered this message before.
///
/// Up to RabbitMQ 4.2 this also counts deliveries that a worker has returned, from 4.3 on only
/// those that came back with a lost connection. For decoded tasks: [`task::decode`] refuses a
/// header of the wrong type, which counts as 0 here.
pub fn deliveries(message: &Message) -> u64 {
    number(message, headers::DELIVERY_COUNT).ok().flatten().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_charged_crash_is_written_to_the_message_and_keeps_the_attempt() {
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
        assert_eq!(deliveries(&message), 0, "the count starts at zero in a republished message");
        assert!(is_marked(&message));
    }

    #[test]
    fn the_log_is_bounded_and_keeps_the_newest_lines() {
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
