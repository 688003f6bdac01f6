//! Queries to the collector and its responses, as JSON, so that any client can send them.
//!
//! A query goes to the queue `queries` with a `reply_to` and an `expiration`, after which the
//! broker drops it. The response to `results` is a report bundle instead of JSON, because it
//! carries outputs that JSON cannot.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::codec::Codec;
use super::control::CancelRequest;
use super::letters::{
    DeadCursor, DeadFilter, DeadSummary, Purged, ReplayItem, ReplayPlan, Replayed,
};
use super::malformed::{MAX_BODY_BYTES, MAX_JSON_BYTES, Malformed, within};
use super::message::{Message, Properties};
use super::notice::BatchSummary;
use super::report::RetryNote;
use super::stalled::Stalled;
use crate::fingerprint::Fingerprint;
use crate::names::{BatchId, TaskId};
use crate::outcome::{Status, TaskResult};
use crate::timestamp::Timestamp;

const QUERY_KIND: &str = "garenne.query";
const RESPONSE_KIND: &str = "garenne.response";

/// A query to the collector.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "query", rename_all = "snake_case")]
pub enum Query {
    /// The state of a task.
    Task {
        /// The id of the task.
        id: TaskId,
    },
    /// The final results of those of these tasks that have ended.
    Results {
        /// The ids of the tasks, at most 1,000.
        ids: Vec<TaskId>,
        /// Fingerprints of tasks with ids chosen by their sender. A result with another fingerprint
        /// is not sent; the response contains a [`Report::Conflict`](super::Report::Conflict)
        /// instead.
        #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
        fingerprints: BTreeMap<TaskId, Fingerprint>,
    },
    /// The state of a batch.
    Batch {
        /// The id of the batch.
        id: BatchId,
    },
    /// A page of dead letters, the newest first.
    DeadList {
        /// Most letters in the response; limited to 1,000.
        limit: u32,
        /// The letters to list.
        #[serde(default)]
        filter: DeadFilter,
        /// Where the last page ended; `None` for the first page.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        from: Option<DeadCursor>,
        /// Whether the response includes the number of letters that match.
        #[serde(default)]
        count: bool,
        /// Whether the response includes whole messages.
        #[serde(default)]
        whole: bool,
    },
    /// One dead letter, which may also be late or replayed.
    Dead {
        /// The id of the dead task.
        id: TaskId,
    },
    /// A piece of the body of a dead letter, for bodies that are too large for other responses.
    DeadBody {
        /// The id of the dead task.
        id: TaskId,
        /// Position of the first byte.
        offset: u64,
    },
    /// Replays dead letters.
    DeadReplay {
        /// The letters, at most 1,000.
        letters: Vec<ReplayItem>,
        /// How they are replayed.
        #[serde(default)]
        plan: ReplayPlan,
    },
    /// Deletes dead letters. The final records of their tasks are kept.
    DeadPurge {
        /// The ids of the dead tasks, at most 1,000.
        ids: Vec<TaskId>,
    },
    /// The numbers of records in the store.
    Totals,
    /// Parked tasks, and batches without progress.
    Stalled {
        /// A batch is listed if nothing has changed in it for this many milliseconds.
        quiet_ms: u64,
    },
    /// Cancels those of these tasks that have not ended. Repeating the query changes nothing.
    Cancel {
        /// The ids of the tasks, at most 1,000.
        ids: Vec<TaskId>,
        /// Why; becomes the error text of the cancelled tasks.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        reason: Option<String>,
    },
    /// Cancels every task of a batch that has not ended, including those that are submitted later.
    CancelBatch {
        /// The id of the batch.
        id: BatchId,
        /// Why; becomes the error text of the cancelled tasks.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        reason: Option<String>,
    },
    /// Ends an unfinished batch as abandoned, for members that will never end. The response is that
    /// to [`Batch`](Self::Batch).
    AbandonBatch {
        /// The id of the batch.
        id: BatchId,
    },
    /// The cancel requests that have not taken effect, for workers.
    Cancels {
        /// Only requests with a higher sequence number.
        after: u64,
    },
}

/// A response of the collector.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "response", rename_all = "snake_case")]
pub enum Response {
    /// The state of a task.
    Task {
        /// Finished, retrying, parked or unknown.
        #[serde(flatten)]
        state: TaskState,
        /// The task that its dead letter was replayed as.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        replayed_as: Option<TaskId>,
        /// The task that it is a replay of.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        replay_of: Option<TaskId>,
    },
    /// The state of a batch.
    Batch {
        /// The state and counts; `None` if the collector has no report about the batch.
        batch: Option<BatchStatus>,
    },
    /// A page of dead letters, the newest first.
    DeadList {
        /// The letters.
        letters: Vec<DeadSummary>,
        /// Number of letters that match. `None` unless the query asks for it, and from an older
        /// collector, which does not support filters either.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        total: Option<u64>,
        /// Whether more letters match than `total`, because the collector stopped counting.
        #[serde(skip_serializing_if = "std::ops::Not::not", default)]
        more_than_total: bool,
        /// Where the next page begins; `None` on the last page.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        next: Option<DeadCursor>,
    },
    /// One dead letter.
    Dead {
        /// The letter; `None` if there is none with that id.
        letter: Option<DeadSummary>,
        /// The failed attempts before the last one.
        #[serde(skip_serializing_if = "Vec::is_empty", default)]
        attempts: Vec<RetryNote>,
    },
    /// A piece of the body of a dead letter.
    DeadBody {
        /// The bytes in base64; empty behind the end of the body, and if there is no such letter.
        base64: String,
    },
    /// The outcomes of a replay.
    DeadReplay {
        /// One outcome for each letter, in the order of the query.
        letters: Vec<Replayed>,
    },
    /// The outcome of a purge.
    DeadPurge {
        /// The numbers of deleted letters.
        #[serde(flatten)]
        purged: Purged,
    },
    /// The numbers of records in the store.
    Totals {
        /// Number of final results in the store.
        results: u64,
        /// Number of repeated results that were dropped since the store was created.
        repeats: u64,
        /// Number of dead letters in the store.
        dead: u64,
        /// Number of batches in the store.
        batches: u64,
    },
    /// Parked tasks, and batches without progress.
    Stalled {
        /// The tasks and batches.
        #[serde(flatten)]
        stalled: Stalled,
    },
    /// The outcomes of a request to cancel tasks.
    Cancel {
        /// One outcome for each task, in the order of the query.
        tasks: Vec<Cancelled>,
    },
    /// The outcome of a request to cancel a batch.
    CancelBatch {
        /// Never [`CancelState::Cancelled`]: members end one by one, and the counts show it.
        state: CancelState,
        /// The counts at that moment; `None` if the collector has no report about the batch.
        batch: Option<BatchSummary>,
    },
    /// Cancel requests, the oldest first, as many as fit into one response.
    Cancels {
        /// The requests.
        requests: Vec<CancelRequest>,
        /// Whether there are more requests after the last of these.
        more: bool,
        /// The highest sequence number assigned so far. A request with a lower number that is not
        /// in the list is no longer in effect.
        newest: u64,
    },
    /// The collector refuses the query.
    Refused {
        /// Why.
        error: String,
    },
}

/// The progress of a cancel request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CancelState {
    /// The task has ended as cancelled.
    Cancelled,
    /// The task had ended in another way before.
    TooLate,
    /// The request is kept, and takes effect when a worker receives or runs the task.
    Requested,
}

impl CancelState {
    /// The name of the state in JSON and tables.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Cancelled => "cancelled",
            Self::TooLate => "too_late",
            Self::Requested => "requested",
        }
    }
}

/// The outcome of a request to cancel one task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cancelled {
    /// The id of the task.
    pub id: TaskId,
    /// The progress of the request.
    pub state: CancelState,
    /// The final status of the task, if it has ended.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub status: Option<Status>,
    /// When the task ended, if it has.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub finished_at: Option<Timestamp>,
}

impl Cancelled {
    /// The outcome for a task that has not ended: the request is kept.
    pub fn requested(id: TaskId) -> Self {
        Self { id, state: CancelState::Requested, status: None, finished_at: None }
    }

    /// The outcome for a task that has ended.
    pub fn ended(id: TaskId, status: Status, finished_at: Timestamp) -> Self {
        let state = match status {
            Status::Cancelled => CancelState::Cancelled,
            Status::Succeeded | Status::Failed => CancelState::TooLate,
        };
        Self { id, state, status: Some(status), finished_at: Some(finished_at) }
    }
}

/// The state of a task, as far as the collector knows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum TaskState {
    /// The task has ended.
    Finished {
        /// The final record.
        result: TaskResult,
    },
    /// An attempt failed; the next one is delayed in the broker, queued or running.
    Retrying {
        /// The last failed attempt.
        last: RetryNote,
    },
    /// No worker of its queue has a handler for it; it is kept as a dead letter.
    Parked {
        /// The letter.
        letter: DeadSummary,
    },
    /// Not finished, or never submitted: the collector receives the first report about a task when
    /// an attempt ends.
    Unknown,
}

/// The state of a batch, with some members that failed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BatchStatus {
    /// The state and counts of the batch.
    #[serde(flatten)]
    pub summary: BatchSummary,
    /// Up to ten members that did not succeed, with their errors.
    pub failures: Vec<TaskResult>,
    /// When a report about the batch was last stored, including repeated reports. `None` from an
    /// older collector.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub changed_at: Option<Timestamp>,
    /// Number of members that are parked because no worker has a handler for them.
    #[serde(skip_serializing_if = "is_zero", default)]
    pub parked: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

impl Query {
    /// Encodes the query. The broker drops it after `expiration_millis`, which is how long its
    /// sender waits for the response.
    pub fn encode(&self, reply_to: &str, correlation_id: &str, expiration_millis: u64) -> Message {
        let mut message = json(self, QUERY_KIND, correlation_id);
        message.properties.reply_to = Some(reply_to.to_owned());
        message.properties.expiration = Some(expiration_millis.to_string());
        message
    }

    /// Decodes a query.
    pub fn decode(message: &Message) -> Result<Self, Malformed> {
        within("a query", &message.body, MAX_JSON_BYTES)?;
        serde_json::from_slice(&message.body).map_err(Malformed::new)
    }
}

impl Response {
    /// Encodes the response to the query with this `correlation_id`.
    pub fn encode(&self, correlation_id: &str) -> Message {
        json(self, RESPONSE_KIND, correlation_id)
    }

    /// Decodes a response.
    pub fn decode(message: &Message) -> Result<Self, Malformed> {
        within("a response", &message.body, MAX_BODY_BYTES)?;
        Self::from_json(&message.body).map_err(Malformed::new)
    }

    /// Responses that contain arguments or outputs are not decoded by their derived implementation:
    /// that buffers the fields of a tagged enum, and a buffered number becomes a float.
    fn from_json(json: &[u8]) -> Result<Self, serde_json::Error> {
        let ResponseTag { response } = serde_json::from_slice(json)?;
        Ok(match &*response {
            "task" => {
                let TaskLinks { replayed_as, replay_of } = serde_json::from_slice(json)?;
                Self::Task { state: TaskState::from_json(json)?, replayed_as, replay_of }
            }
            "batch" => {
                let BatchBody { batch } = serde_json::from_slice(json)?;
                Self::Batch { batch }
            }
            "dead" => {
                let DeadBody { letter, attempts } = serde_json::from_slice(json)?;
                Self::Dead { letter, attempts }
            }
            "dead_list" => {
                let DeadListBody { letters, total, more_than_total, next } =
                    serde_json::from_slice(json)?;
                Self::DeadList { letters, total, more_than_total, next }
            }
            _ => serde_json::from_slice(json)?,
        })
    }
}

impl TaskState {
    fn from_json(json: &[u8]) -> Result<Self, serde_json::Error> {
        let StateTag { state } = serde_json::from_slice(json)?;
        Ok(match &*state {
            "finished" => {
                let FinishedBody { result } = serde_json::from_slice(json)?;
                Self::Finished { result }
            }
            "parked" => {
                let ParkedBody { letter } = serde_json::from_slice(json)?;
                Self::Parked { letter }
            }
            _ => serde_json::from_slice(json)?,
        })
    }
}

#[derive(Deserialize)]
struct ResponseTag<'a> {
    #[serde(borrow)]
    response: Cow<'a, str>,
}

#[derive(Deserialize)]
struct StateTag<'a> {
    #[serde(borrow)]
    state: Cow<'a, str>,
}

#[derive(Deserialize)]
struct TaskLinks {
    replayed_as: Option<TaskId>,
    replay_of: Option<TaskId>,
}

#[derive(Deserialize)]
struct BatchBody {
    batch: Option<BatchStatus>,
}

#[derive(Deserialize)]
struct DeadBody {
    letter: Option<DeadSummary>,
    #[serde(default)]
    attempts: Vec<RetryNote>,
}

#[derive(Deserialize)]
struct DeadListBody {
    letters: Vec<DeadSummary>,
    total: Option<u64>,
    #[serde(default)]
    more_than_total: bool,
    next: Option<DeadCursor>,
}

#[derive(Deserialize)]
struct FinishedBody {
    result: TaskResult,
}

#[derive(Deserialize)]
struct ParkedBody {
    letter: DeadSummary,
}

fn json(value: &impl Serialize, kind: &str, correlation_id: &str) -> Message {
    let properties = Properties {
        content_type: Some(Codec::Json.content_type().to_owned()),
        kind: Some(kind.to_owned()),
        correlation_id: Some(correlation_id.to_owned()),
        ..Properties::default()
    };
    let body = serde_json::to_vec(value).unwrap_or_else(|_| b"{}".to_vec());
    Message { properties, headers: vec![], body: body.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_plain_json() {
        let query = Query::Task { id: TaskId::new("t-1").unwrap() };
        let message = query.encode("r", "c", 500);
        assert_eq!(&message.body[..], br#"{"query":"task","id":"t-1"}"#);
        assert_eq!(message.properties.expiration.as_deref(), Some("500"));
        assert_eq!(Query::decode(&message), Ok(query));
    }

    #[test]
    fn queries_of_the_first_version_are_understood() {
        let old =
            Message { body: r#"{"query":"dead_list","limit":2}"#.into(), ..Message::default() };
        let Ok(Query::DeadList { limit, filter, from, .. }) = Query::decode(&old) else {
            panic!("not understood")
        };
        assert_eq!((limit, filter, from), (2, DeadFilter::default(), None));
    }

    #[test]
    fn a_cancel_request_needs_no_reason() {
        let body = br#"{"query":"cancel","ids":["t-1"]}"#;
        let message = Message { body: body.to_vec().into(), ..Message::default() };
        let ids = vec![TaskId::new("t-1").unwrap()];
        assert_eq!(Query::decode(&message), Ok(Query::Cancel { ids, reason: None }));
    }

    #[test]
    fn numbers_are_read_as_they_were_written() {
        let numbers = r#"{"a":18446744073709551616,"b":[1.10,1e400,-0.0]}"#;
        let result = format!(
            r#"{{"id":"t","name":"a.b","queue":"default","status":"succeeded","output":{numbers},"attempt":1,"redelivered":false,"worker":"w","started_at":"1970-01-01T00:00:00Z","finished_at":"1970-01-01T00:00:00Z"}}"#
        );
        let letter = format!(
            r#"{{"id":"t","name":"a.b","queue":"default","reason":"fatal","error":"e","by":"w","at":"1970-01-01T00:00:00Z","body_bytes":1,"args":{numbers}}}"#
        );
        for body in [
            format!(r#"{{"response":"task","state":"finished","result":{result}}}"#),
            format!(r#"{{"response":"task","state":"parked","letter":{letter}}}"#),
            format!(r#"{{"response":"dead","letter":{letter}}}"#),
            format!(r#"{{"response":"dead_list","letters":[{letter}],"total":1}}"#),
        ] {
            let message = Message { body: body.clone().into(), ..Message::default() };
            let response = Response::decode(&message).unwrap();
            let written = serde_json::to_string(&response).unwrap();
            assert!(written.contains(numbers), "{written}");
        }
    }

    #[test]
    fn responses_survive_a_round_trip() {
        let state = TaskState::Unknown;
        let response = Response::Task { state, replayed_as: None, replay_of: None };
        let message = response.encode("c");
        assert_eq!(&message.body[..], br#"{"response":"task","state":"unknown"}"#);
        assert_eq!(Response::decode(&message), Ok(response));
    }
}
