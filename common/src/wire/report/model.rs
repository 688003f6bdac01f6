//! The reports themselves. Their serde form is that of the JSON array.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::super::lease::{Fence, LeaseNote};
use crate::fingerprint::Fingerprint;
use crate::names::{BatchId, TaskId, TaskName};
use crate::outcome::TaskResult;
use crate::timestamp::Timestamp;

/// One event that a worker or producer reports to the collector.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "report", rename_all = "snake_case")]
pub enum Report {
    /// A task has ended.
    Finished(TaskResult),
    /// An attempt failed, and the broker has confirmed the message of the next one.
    Retrying(RetryNote),
    /// A batch was opened; its members follow.
    BatchOpened {
        /// The id or key of the batch.
        batch: BatchId,
        /// When it was opened.
        at: Timestamp,
        /// When it ends as abandoned unless it is sealed before.
        deadline: Timestamp,
    },
    /// All members of a batch are submitted.
    BatchSealed {
        /// The id or key of the batch.
        batch: BatchId,
        /// Number of members.
        count: u64,
        /// When it was sealed.
        at: Timestamp,
    },
    /// A worker has renewed or released a lease.
    Lease(LeaseNote),
    /// Another task with the id has ended: its fingerprint is not the one in the query. Only in
    /// responses.
    Conflict {
        /// The id of the task.
        id: TaskId,
        /// The fingerprint in the query.
        queried: Fingerprint,
    },
    /// A task that ran under a lease has ended.
    FinishedUnderLease {
        /// The execution that ended it.
        fence: Fence,
        /// The final record.
        result: TaskResult,
    },
}

/// A failed attempt of a task that will be tried again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RetryNote {
    /// The id of the task.
    pub id: TaskId,
    /// The name of the task.
    pub name: TaskName,
    /// The batch of the task: its id or key.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub batch: Option<BatchId>,
    /// The number of the attempt that failed.
    pub attempt: u32,
    /// The error of that attempt.
    pub error: String,
    /// The earliest start of the next attempt.
    pub next_at: Timestamp,
    /// The name of the worker that ran it.
    pub worker: String,
    /// When the attempt failed.
    pub at: Timestamp,
}

impl RetryNote {
    /// The delay between this attempt and the next one.
    pub fn delay(&self) -> Duration {
        self.next_at.since(self.at)
    }
}
