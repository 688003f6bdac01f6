//! The body of the response to the query `stalled`: parked tasks, and batches without progress.

use serde::{Deserialize, Serialize};

use super::notice::BatchSummary;
use crate::names::{QueueName, TaskName};
use crate::timestamp::Timestamp;

/// Parked tasks, and batches without progress, in a store.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Stalled {
    /// Parked tasks by queue and name, the most numerous first.
    #[serde(default)]
    pub parked: Vec<ParkedKind>,
    /// Batches that have neither ended nor changed for the time given in the query, the longest
    /// unchanged first.
    #[serde(default)]
    pub batches: Vec<QuietBatch>,
}

/// Tasks of one queue and name that are parked until a worker with a handler for them appears.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ParkedKind {
    /// The queue of the tasks.
    pub queue: QueueName,
    /// The name for which no worker of the queue has a handler.
    pub name: TaskName,
    /// Number of parked tasks.
    pub tasks: u64,
    /// When the first of them was parked; of a task that was parked repeatedly, the last time.
    pub since: Timestamp,
}

/// A batch that has not ended, and when it last changed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct QuietBatch {
    /// The state and counts of the batch.
    #[serde(flatten)]
    pub summary: BatchSummary,
    /// When a report about the batch was last stored, including repeated reports.
    pub changed_at: Timestamp,
}
