//! The final status of a task, its final record, and the reasons for giving a task up.
//!
//! The outcome of a single attempt, and what follows from it, is defined by the worker
//! (`garenne_worker::outcome`); these types are what the rest of the system sees.

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
    /// The name of the status in JSON, tables and the store.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// Every status.
    pub const ALL: [Self; 3] = [Self::Succeeded, Self::Failed, Self::Cancelled];
}

/// Why a task was given up. Dead letters carry the code in `x-garenne-dead-reason`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeadReason {
    /// The handler failed in the last attempt.
    RetriesExhausted,
    /// The handler reported that a retry cannot help.
    Fatal,
    /// The last attempt exceeded its time limit.
    TimedOut,
    /// The last attempt panicked.
    Panicked,
    /// The process that ran the task died as often as the crash budget allows.
    Crashed,
    /// The task had not started by its expiry.
    Expired,
    /// The message is not a valid task: a property, a header or the body violates the protocol.
    Malformed,
    /// The worker has no handler for the task; parked without a final record until a worker that
    /// has one appears.
    UnknownTask,
    /// The queue did not exist when the broker accepted the message.
    Unrouted,
    /// The broker dead-lettered the message (delivery limit, length policy); the error states why.
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

    /// The code of the reason in headers, JSON and tables.
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

    /// Whether this reason ends the task. An unknown task has not ended: a worker that has a
    /// handler for it may still appear.
    pub const fn is_final(self) -> bool {
        !matches!(self, Self::UnknownTask)
    }
}

/// The final record of a task, which goes to the producer, the batch and the store.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TaskResult {
    /// The id of the task.
    pub id: TaskId,
    /// The name of the task.
    pub name: TaskName,
    /// The queue of the task.
    pub queue: QueueName,
    /// The batch of the task: its id, or its key on the way to the collector.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub batch: Option<BatchId>,
    /// The final status.
    pub status: Status,
    /// The output of the handler; present only if the task succeeded.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub output: Option<Payload>,
    /// The last error; present only if the task did not succeed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<String>,
    /// Why the task was given up; present only if it failed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reason: Option<DeadReason>,
    /// The number of the last attempt; the first is 1, and 0 means that none was made.
    pub attempt: u32,
    /// Whether the last delivery was a redelivery, after a lost worker or connection.
    pub redelivered: bool,
    /// The name of the worker that ran the task, or of the process that gave it up.
    pub worker: Arc<str>,
    /// When the last attempt started.
    pub started_at: Timestamp,
    /// When the task ended.
    pub finished_at: Timestamp,
    /// The fingerprint of the task, if its sender has chosen the id.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub fingerprint: Option<Fingerprint>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_equal_in_json_and_in_headers() {
        for reason in DeadReason::ALL {
            assert_eq!(serde_json::to_value(reason).unwrap(), reason.as_str());
            assert_eq!(DeadReason::from_code(reason.as_str()), Some(reason));
        }
        for status in Status::ALL {
            assert_eq!(serde_json::to_value(status).unwrap(), status.as_str());
        }
    }
}
