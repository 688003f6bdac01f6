//! Questions to the collector and its answers: JSON, so that any client can ask.
//!
//! A question goes to the queries queue with a `reply_to` and an `expiration`; whoever asks too late
//! asks in vain. Only `results` is answered in Garenne's own report bundle, because it carries outputs
//! that JSON cannot.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::control::CancelRequest;
use super::letters::{
    DeadCursor, DeadFilter, DeadSummary, Purged, ReplayItem, ReplayPlan, Replayed,
};
use super::message::{Message, Properties};
use super::notice::BatchSummary;
use super::report::RetryNote;
use super::stalled::Stalled;
use super::{Codec, MAX_BODY_BYTES, MAX_JSON_BYTES, Malformed, within};
use crate::fingerprint::Fingerprint;
use crate::names::{BatchId, TaskId};
use crate::outcome::{Status, TaskResult};
use crate::timestamp::Timestamp;

const QUERY_KIND: &str = "garenne.query";
const RESPONSE_KIND: &str = "garenne.response";

/// What a client may ask.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "query", rename_all = "snake_case")]
pub enum Query {
    /// How a task stands.
    Task {
        /// Which.
        id: TaskId,
    },
    /// The final results of these tasks, as far as they have ended; at most 1,000 ids.
    Results {
        /// The tasks.
        ids: Vec<TaskId>,
        /// Fingerprints of tasks whose ids their sender has chosen. A result with another fingerprint is
        /// not sent; the response contains a [`Report::Conflict`](super::Report::Conflict) instead.
        #[serde(skip_serializing_if = "BTreeMap::is_empty", default)]
        fingerprints: BTreeMap<TaskId, Fingerprint>,
    },
    /// How a batch stands.
    Batch {
        /// Which.
        id: BatchId,
    },
    /// Dead letters, the newest first.
    DeadList {
        /// At most so many, and at most 1,000.
        limit: u32,
        /// Which.
        #[serde(default)]
        filter: DeadFilter,
        /// Where the last page ended.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        from: Option<DeadCursor>,
        /// Whether to say how many match in all.
        #[serde(default)]
        count: bool,
        /// Whether to give whole messages.
        #[serde(default)]
        whole: bool,
    },
    /// One dead letter, late and replayed ones included.
    Dead {
        /// Which.
        id: TaskId,
    },
    /// A piece of the body of a dead letter, for bodies that fit into no other answer.
    DeadBody {
        /// Which.
        id: TaskId,
        /// From this byte on.
        offset: u64,
    },
    /// Replay these dead letters; at most 1,000.
    DeadReplay {
        /// Which.
        letters: Vec<ReplayItem>,
        /// How.
        #[serde(default)]
        plan: ReplayPlan,
    },
    /// Delete these dead letters; at most 1,000. Final records stay.
    DeadPurge {
        /// Which.
        ids: Vec<TaskId>,
    },
    /// How much the collector has seen.
    Totals,
    /// What waits for something that may never come.
    Stalled {
        /// Batches in which nothing has changed for so many milliseconds.
        quiet_ms: u64,
    },
    /// Cancels tasks, as far as they have not ended; at most 1,000 ids. Asking again changes nothing.
    Cancel {
        /// Which.
        ids: Vec<TaskId>,
        /// Why, for people.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        reason: Option<String>,
    },
    /// Cancels every task of a batch that has not ended, and those that are submitted later.
    CancelBatch {
        /// Which.
        id: BatchId,
        /// Why, for people.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        reason: Option<String>,
    },
    /// Ends a batch that is not over as abandoned, for members that will never end; the answer is how
    /// it stands then, as to [`Batch`](Self::Batch).
    AbandonBatch {
        /// Which.
        id: BatchId,
    },
    /// The cancel requests that have not taken effect; for workers.
    Cancels {
        /// Those with higher numbers than this.
        after: u64,
    },
}

/// What the collector answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "response", rename_all = "snake_case")]
pub enum Response {
    /// How a task stands.
    Task {
        /// Finished, retrying, or nothing known.
        #[serde(flatten)]
        state: TaskState,
        /// The task that its dead letter was replayed as.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        replayed_as: Option<TaskId>,
        /// The task that it is a replay of.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        replay_of: Option<TaskId>,
    },
    /// How a batch stands; `None` if nobody has heard of it.
    Batch {
        /// Its summary.
        batch: Option<BatchStatus>,
    },
    /// Dead letters, newest first.
    DeadList {
        /// The letters.
        letters: Vec<DeadSummary>,
        /// How many match in all; an older collector, which also knows no filters, does not say.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        total: Option<u64>,
        /// Whether there are more than `total` says.
        #[serde(skip_serializing_if = "std::ops::Not::not", default)]
        more_than_total: bool,
        /// Where the next page begins.
        #[serde(skip_serializing_if = "Option::is_none", default)]
        next: Option<DeadCursor>,
    },
    /// One dead letter; `None` if there is none of that id.
    Dead {
        /// The letter.
        letter: Option<DeadSummary>,
        /// The attempts that failed before the last one.
        #[serde(skip_serializing_if = "Vec::is_empty", default)]
        attempts: Vec<RetryNote>,
    },
    /// A piece of a body.
    DeadBody {
        /// The bytes in base64; empty at the end, and if there is no such letter.
        base64: String,
    },
    /// What became of each letter, in the order asked.
    DeadReplay {
        /// The letters.
        letters: Vec<Replayed>,
    },
    /// What was purged.
    DeadPurge {
        /// How much.
        #[serde(flatten)]
        purged: Purged,
    },
    /// Totals since the store was made.
    Totals {
        /// Final results in the store.
        results: u64,
        /// Results that came again and were dropped.
        repeats: u64,
        /// Dead letters in the store.
        dead: u64,
        /// Batches in the store.
        batches: u64,
    },
    /// What stands still, as far as the collector can tell.
    Stalled {
        /// What.
        #[serde(flatten)]
        stalled: Stalled,
    },
    /// What became of a request to cancel tasks, in the order of the query.
    Cancel {
        /// One for each task.
        tasks: Vec<Cancelled>,
    },
    /// What became of a request to cancel a batch.
    CancelBatch {
        /// `cancelled` is not among the answers: members end one by one, and the counts show it.
        state: CancelState,
        /// The counts at that moment; `None` if nobody has heard of the batch yet.
        batch: Option<BatchSummary>,
    },
    /// Cancel requests, the oldest first, as many as fit into one answer.
    Cancels {
        /// The cancel requests.
        requests: Vec<CancelRequest>,
        /// Whether there are more after the last of these.
        more: bool,
        /// The highest number given so far: what has a lower one and is not in the list is over.
        newest: u64,
    },
    /// The question could not be answered.
    Refused {
        /// Why.
        error: String,
    },
}

/// How far a cancel request has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CancelState {
    /// The task has ended as cancelled.
    Cancelled,
    /// It had ended otherwise before.
    TooLate,
    /// The cancel request is kept, and takes effect when a worker meets the task.
    Requested,
}

impl CancelState {
    /// The word that JSON and people use.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Cancelled => "cancelled",
            Self::TooLate => "too_late",
            Self::Requested => "requested",
        }
    }
}

/// What became of the request to cancel one task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cancelled {
    /// Which task.
    pub id: TaskId,
    /// How far it has come.
    pub state: CancelState,
    /// How the task ended, if it did.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub status: Option<Status>,
    /// When it ended, if it did.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub finished_at: Option<Timestamp>,
}

impl Cancelled {
    /// A cancel request that is kept.
    pub fn requested(id: TaskId) -> Self {
        Self { id, state: CancelState::Requested, status: None, finished_at: None }
    }

    /// A task that ended like this.
    pub fn ended(id: TaskId, status: Status, finished_at: Timestamp) -> Self {
        let state = match status {
            Status::Cancelled => CancelState::Cancelled,
            Status::Succeeded | Status::Failed => CancelState::TooLate,
        };
        Self { id, state, status: Some(status), finished_at: Some(finished_at) }
    }
}

/// What the collector knows of a task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum TaskState {
    /// It ended.
    Finished {
        /// How.
        result: TaskResult,
    },
    /// An attempt failed; the next one waits in the broker or runs.
    Retrying {
        /// The last failed attempt.
        last: RetryNote,
    },
    /// No worker on its queue knew its name; it is kept as a dead letter.
    Parked {
        /// The letter.
        letter: DeadSummary,
    },
    /// Not finished, or never submitted: the collector hears of a task only when an attempt ends.
    Unknown,
}

/// A batch and the members that failed last.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BatchStatus {
    /// The counts.
    #[serde(flatten)]
    pub summary: BatchSummary,
    /// Up to ten members that did not succeed, with their errors.
    pub failures: Vec<TaskResult>,
    /// When something of it was stored last, repeats included; an older collector does not say.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub changed_at: Option<Timestamp>,
    /// How many of those that have not ended are parked because no worker knows their name.
    #[serde(skip_serializing_if = "is_zero", default)]
    pub parked: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

impl Query {
    /// Writes it; `expiration_millis` is how long the asker waits.
    pub fn encode(&self, reply_to: &str, correlation_id: &str, expiration_millis: u64) -> Message {
        let mut message = json(self, QUERY_KIND, correlation_id);
        message.properties.reply_to = Some(reply_to.to_owned());
        message.properties.expiration = Some(expiration_millis.to_string());
        message
    }

    /// Reads one.
    pub fn decode(message: &Message) -> Result<Self, Malformed> {
        within("a question", &message.body, MAX_JSON_BYTES)?;
        serde_json::from_slice(&message.body).map_err(Malformed::new)
    }
}

impl Response {
    /// Writes it.
    pub fn encode(&self, correlation_id: &str) -> Message {
        json(self, RESPONSE_KIND, correlation_id)
    }

    /// Reads one.
    pub fn decode(message: &Message) -> Result<Self, Malformed> {
        within("a response", &message.body, MAX_BODY_BYTES)?;
        Self::from_json(&message.body).map_err(Malformed::new)
    }

    /// Responses that contain arguments or outputs are not read by their derived implementation: that
    /// buffers the fields of a tagged enum, and a buffered number is a float.
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
    fn a_question_is_plain_json() {
        let question = Query::Task { id: TaskId::new("t-1").unwrap() };
        let message = question.encode("r", "c", 500);
        assert_eq!(&message.body[..], br#"{"query":"task","id":"t-1"}"#);
        assert_eq!(message.properties.expiration.as_deref(), Some("500"));
        assert_eq!(Query::decode(&message), Ok(question));
    }

    #[test]
    fn questions_of_the_first_version_are_understood() {
        let old =
            Message { body: r#"{"query":"dead_list","limit":2}"#.into(), ..Message::default() };
        let Ok(Query::DeadList { limit, filter, from, .. }) = Query::decode(&old) else {
            panic!("not understood")
        };
        assert_eq!((limit, filter, from), (2, DeadFilter::default(), None));
    }

    #[test]
    fn a_wish_to_cancel_needs_no_reason() {
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
    fn answers_come_back_as_they_went() {
        let state = TaskState::Unknown;
        let answer = Response::Task { state, replayed_as: None, replay_of: None };
        let message = answer.encode("c");
        assert_eq!(&message.body[..], br#"{"response":"task","state":"unknown"}"#);
        assert_eq!(Response::decode(&message), Ok(answer));
    }
}
