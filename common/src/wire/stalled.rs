//! What a collector knows to wait for something that may never come: the body of one of its answers.

use serde::{Deserialize, Serialize};

use super::notice::BatchSummary;
use crate::names::{QueueName, TaskName};
use crate::timestamp::Timestamp;

/// What stands still in a store.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Stalled {
    /// Tasks that are parked, by what they wait for; those of which there are most.
    #[serde(default)]
    pub parked: Vec<ParkedKind>,
    /// Batches that are not over and have not changed for as long as was asked, the most quiet first.
    #[serde(default)]
    pub batches: Vec<QuietBatch>,
}

/// Tasks that wait for a worker that knows their name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ParkedKind {
    /// Their queue.
    pub queue: QueueName,
    /// The name that no worker of the queue knew.
    pub name: TaskName,
    /// How many.
    pub tasks: u64,
    /// When the first of them was parked, the last time that it was.
    pub since: Timestamp,
}

/// A batch that is not over, and how long nothing has changed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct QuietBatch {
    /// The counts.
    #[serde(flatten)]
    pub summary: BatchSummary,
    /// When something of it was stored last, repeats included.
    pub changed_at: Timestamp,
}
