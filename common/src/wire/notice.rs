//! Done notices: JSON, on the notices exchange, under `task.<id>` or `batch.<id>`.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::message::{Message, Properties};
use super::{Codec, MAX_JSON_BYTES, Malformed, within};
use crate::names::{BatchId, TaskId, TaskName};
use crate::outcome::{DeadReason, Status, TaskResult};
use crate::timestamp::Timestamp;

const KIND: &str = "garenne.notice";

/// A task or a batch is done. The same notice may arrive twice, always under the same id.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "subject", rename_all = "snake_case")]
pub enum Notice {
    /// A task that belongs to no batch.
    Task(TaskSummary),
    /// A batch.
    Batch(BatchSummary),
}

/// How a task ended, without its output.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TaskSummary {
    /// Which task.
    pub task: TaskId,
    /// What kind of task.
    pub name: TaskName,
    /// How it ended.
    pub status: Status,
    /// Why it was given up.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reason: Option<DeadReason>,
    /// The attempt that ended it.
    pub attempt: u32,
    /// Who ran it.
    pub worker: Arc<str>,
    /// When it ended.
    pub finished_at: Timestamp,
}

/// How a batch stands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BatchSummary {
    /// Which batch.
    pub batch: BatchId,
    /// Whether it is done.
    pub state: BatchState,
    /// How many tasks it has; unknown until it is sealed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub total: Option<u64>,
    /// Members that succeeded.
    pub succeeded: u64,
    /// Members that were given up.
    pub failed: u64,
    /// Members that were cancelled.
    pub cancelled: u64,
    /// When the collector first heard of it.
    pub opened_at: Timestamp,
    /// When its last member ended, or when it was abandoned.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub finished_at: Option<Timestamp>,
}

/// Where a batch is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BatchState {
    /// Members may still be added.
    Open,
    /// All members are known, some have not ended.
    Sealed,
    /// Every member ended.
    Done,
    /// It was not sealed by its deadline: its producer is gone.
    Abandoned,
}

impl BatchState {
    /// The word that JSON and tables use.
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

    /// Whether nothing will change any more.
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Done | Self::Abandoned)
    }
}

impl BatchSummary {
    /// Members that ended.
    pub const fn ended(&self) -> u64 {
        self.succeeded.saturating_add(self.failed).saturating_add(self.cancelled)
    }
}

impl Notice {
    /// The stable id, and at the same time the routing key on the notices exchange.
    pub fn key(&self) -> String {
        match self {
            Self::Task(task) => Self::task_key(&task.task),
            Self::Batch(batch) => Self::batch_key(&batch.batch),
        }
    }

    /// The key of a task's notice, for whoever listens for it.
    pub fn task_key(id: &TaskId) -> String {
        routing_key("task", id.as_str())
    }

    /// The key of a batch's notice, for whoever listens for it.
    pub fn batch_key(id: &BatchId) -> String {
        routing_key("batch", id.as_str())
    }

    /// The notice that a task without a batch is done.
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

    /// Writes it.
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

    /// Reads one.
    pub fn decode(message: &Message) -> Result<Self, Malformed> {
        within("a notice", &message.body, MAX_JSON_BYTES)?;
        serde_json::from_slice(&message.body).map_err(Malformed::new)
    }
}

/// A routing key has at most 255 bytes and an id too, so a long foreign id is cut.
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
            "{\"subject\":\"batch\",\"batch\":\"b-1\",\"state\":\"done\",\"total\":2,\"succeeded\":1,\
             \"failed\":1,\"cancelled\":0,\"opened_at\":\"1970-01-01T00:00:00Z\",\
             \"finished_at\":\"1970-01-01T00:00:01.5Z\"}"
        );
        assert_eq!(notice.key(), "batch.b-1");
        assert_eq!(Notice::decode(&message), Ok(notice));
    }
}
