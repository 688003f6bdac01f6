//! Done notices: JSON on the notices exchange, with the routing key `task.<id>` or `batch.<id>`.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::codec::Codec;
use super::malformed::{MAX_JSON_BYTES, Malformed, within};
use super::message::{Message, Properties};
use crate::names::{BatchId, TaskId, TaskName};
use crate::outcome::{DeadReason, Status, TaskResult};
use crate::timestamp::Timestamp;

const KIND: &str = "garenne.notice";

/// The event that a task or a batch is done. The same notice may arrive twice, under the same
/// message id.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "subject", rename_all = "snake_case")]
pub enum Notice {
    /// A task outside any batch is done.
    Task(TaskSummary),
    /// A batch is done or abandoned.
    Batch(BatchSummary),
}

/// How a task ended, without its output.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TaskSummary {
    /// The id of the task.
    pub task: TaskId,
    /// The name of the task.
    pub name: TaskName,
    /// The final status.
    pub status: Status,
    /// Why the task was given up, if it failed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reason: Option<DeadReason>,
    /// The number of the last attempt; 0 if there was none.
    pub attempt: u32,
    /// The name of the worker that ran the task, or of the process that gave it up.
    pub worker: Arc<str>,
    /// When the task ended.
    pub finished_at: Timestamp,
}

/// The state and counts of a batch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BatchSummary {
    /// The id of the batch.
    pub batch: BatchId,
    /// The state of the batch.
    pub state: BatchState,
    /// Number of members by the count of its producer; `None` until the batch is sealed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub total: Option<u64>,
    /// Number of members that succeeded.
    pub succeeded: u64,
    /// Number of members that failed.
    pub failed: u64,
    /// Number of members that were cancelled.
    pub cancelled: u64,
    /// When the collector received the first report about the batch.
    pub opened_at: Timestamp,
    /// When the last member ended, or when the batch was abandoned.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub finished_at: Option<Timestamp>,
}

/// The state of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BatchState {
    /// Members may still be added.
    Open,
    /// The number of members is known, and some have not ended.
    Sealed,
    /// Every member has ended.
    Done,
    /// The batch was not sealed by its deadline, or was abandoned on request.
    Abandoned,
}

impl BatchState {
    /// The name of the state in JSON and tables.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Sealed => "sealed",
            Self::Done => "done",
            Self::Abandoned => "abandoned",
        }
    }

    /// Every state.
    pub const ALL: [Self; 4] = [Self::Open, Self::Sealed, Self::Done, Self::Abandoned];

    /// Whether the state can no longer change.
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Done | Self::Abandoned)
    }
}

impl BatchSummary {
    /// Number of members that have ended.
    pub const fn ended(&self) -> u64 {
        self.succeeded.saturating_add(self.failed).saturating_add(self.cancelled)
    }
}

impl Notice {
    /// The message id of the notice, which is also its routing key.
    pub fn key(&self) -> String {
        match self {
            Self::Task(task) => Self::task_key(&task.task),
            Self::Batch(batch) => Self::batch_key(&batch.batch),
        }
    }

    /// The routing key of the notice about a task.
    pub fn task_key(id: &TaskId) -> String {
        routing_key("task", id.as_str())
    }

    /// The routing key of the notice about a batch.
    pub fn batch_key(id: &BatchId) -> String {
        routing_key("batch", id.as_str())
    }

    /// The notice about a task outside any batch.
    pub fn of_task(result: &TaskResult) -> Self {
        Self::Task(TaskSummary {
            task: result.id.clone(),
            name: result.name.clone(),
            status: result.status,
            reason: result.reason,
            attempt: result.attempt,
            worker: result.worker.clone(),
            finished_at: result.finished_at,
        })
    }

    /// Encodes the notice. `app_id` is the name of the publishing process.
    pub fn encode(&self, app_id: &str) -> Message {
        let properties = Properties {
            content_type: Some(Codec::Json.content_type().to_owned()),
            kind: Some(KIND.to_owned()),
            message_id: Some(self.key()),
            app_id: Some(app_id.to_owned()),
            ..Properties::default()
        };
        let body = serde_json::to_vec(self).unwrap_or_else(|_| b"{}".to_vec());
        Message { properties, headers: vec![], body: body.into() }
    }

    /// Decodes a notice.
    pub fn decode(message: &Message) -> Result<Self, Malformed> {
        within("a notice", &message.body, MAX_JSON_BYTES)?;
        serde_json::from_slice(&message.body).map_err(Malformed::new)
    }
}

/// A routing key of at most 255 bytes, AMQP's limit; a long foreign id is cut.
fn routing_key(subject: &str, id: &str) -> String {
    let mut key = format!("{subject}.{id}");
    while key.len() > 255 {
        key.pop();
    }
    key
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_notice_is_flat_json() {
        let notice = Notice::Batch(BatchSummary {
            batch: BatchId::new("b-1").unwrap(),
            state: BatchState::Done,
            total: Some(2),
            succeeded: 1,
            failed: 1,
            cancelled: 0,
            opened_at: Timestamp::from_millis(0),
            finished_at: Some(Timestamp::from_millis(1500)),
        });
        let message = notice.encode("test");
        assert_eq!(
            std::str::from_utf8(&message.body).unwrap(),
            "{\"subject\":\"batch\",\"batch\":\"b-1\",\"state\":\"done\",\"total\":2,\
             \"succeeded\":1,\"failed\":1,\"cancelled\":0,\"opened_at\":\"1970-01-01T00:00:00Z\",\
             \"finished_at\":\"1970-01-01T00:00:01.5Z\"}"
        );
        assert_eq!(notice.key(), "batch.b-1");
        assert_eq!(Notice::decode(&message), Ok(notice));
    }
}
