//! How a task ends: its final status, the record that carries it, and why a task was given up.
//!
//! What happened to one attempt, and what becomes of its message, is the worker's own vocabulary
//! (`garenne_worker::outcome`); this is what the rest of the system hears of it.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::fingerprint::Fingerprint;
use crate::names::{BatchId, QueueName, TaskId, TaskName};
use crate::timestamp::Timestamp;
use crate::wire::Payload;

/// The final status of a task. Every task reaches exactly one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// The handler returned an output.
    Succeeded,
    /// The task was given up and is kept as a dead letter; [`DeadReason`] says why.
    Failed,
    /// The task was cancelled before it ended.
    Cancelled,
}

impl Status {
    /// The word that JSON, tables and headers use.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// Every status; the store keeps the word and reads it back by this list.
    pub const ALL: [Self; 3] = [Self::Succeeded, Self::Failed, Self::Cancelled];
}

/// Why a task was given up. The code is what the dead letter carries in `x-garenne-dead-reason`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeadReason {
    /// The handler failed and no attempt was left.
    RetriesExhausted,
    /// The handler said that trying again cannot help.
    Fatal,
    /// The last attempt ran past its time limit.
    TimedOut,
    /// The last attempt panicked.
    Panicked,
    /// The process that ran it died, as often as its crash budget allows.
    Crashed,
    /// `expires` had passed before the task could start.
    Expired,
    /// The message is not a task: a property, a header or the body breaks the protocol.
    Malformed,
    /// No handler of that name; kept without a final record until a worker that knows it appears.
    UnknownTask,
    /// Its queue did not exist when the broker took the message.
    Unrouted,
    /// The broker itself gave it up (its delivery limit, a length policy); the error says which.
    Broker,
}

impl DeadReason {
    /// Every reason, in the order of the documentation.
    pub const ALL: [Self; 10] = [
        Self::RetriesExhausted,
        Self::Fatal,
        Self::TimedOut,
        Self::Panicked,
        Self::Crashed,
        Self::Expired,
        Self::Malformed,
        Self::UnknownTask,
        Self::Unrouted,
        Self::Broker,
    ];

    /// The word that headers, JSON and tables use.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::RetriesExhausted => "retries_exhausted",
            Self::Fatal => "fatal",
            Self::TimedOut => "timed_out",
            Self::Panicked => "panicked",
            Self::Crashed => "crashed",
            Self::Expired => "expired",
            Self::Malformed => "malformed",
            Self::UnknownTask => "unknown_task",
            Self::Unrouted => "unrouted",
            Self::Broker => "broker",
        }
    }

    /// The reason with this code, if there is one.
    pub fn from_code(code: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.as_str() == code)
    }

    /// Whether the task has ended. An unknown task has not: a worker that knows it may still come.
    pub const fn is_final(self) -> bool {
        !matches!(self, Self::UnknownTask)
    }
}

/// The final record of a task: what its waiting producer, its batch and the store hear.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TaskResult {
    /// Which task.
    pub id: TaskId,
    /// What kind of task.
    pub name: TaskName,
    /// The queue it was taken from.
    pub queue: QueueName,
    /// The batch it belongs to.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub batch: Option<BatchId>,
    /// How it ended.
    pub status: Status,
    /// What the handler returned; present exactly when it succeeded.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub output: Option<Payload>,
    /// What went wrong last; present exactly when it did not succeed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<String>,
    /// Why it was given up; present exactly when it failed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reason: Option<DeadReason>,
    /// The attempt that ended it; 1 is the first, 0 means that none was made.
    pub attempt: u32,
    /// Whether the broker had delivered this attempt before (a worker or connection was lost).
    pub redelivered: bool,
    /// Who ran it, or who gave it up.
    pub worker: Arc<str>,
    /// When the last attempt started.
    pub started_at: Timestamp,
    /// When it ended.
    pub finished_at: Timestamp,
    /// The fingerprint of the task, if its sender has chosen the id.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub fingerprint: Option<Fingerprint>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_the_same_in_json_and_in_headers() {
        for reason in DeadReason::ALL {
            assert_eq!(serde_json::to_value(reason).unwrap(), reason.as_str());
            assert_eq!(DeadReason::from_code(reason.as_str()), Some(reason));
        }
        for status in Status::ALL {
            assert_eq!(serde_json::to_value(status).unwrap(), status.as_str());
        }
    }
}
