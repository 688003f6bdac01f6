//! Dead letters in queries and responses: filters, pages, summaries, and the plan of a replay.
//!
//! Data types only; [`super::replay`] builds the message of a replay. Every field added after the
//! first version has a default, so that clients and collectors of different versions interoperate.

use serde::{Deserialize, Serialize};

use super::codec::{Codec, Payload};
use super::headers;
use super::message::{ForeignValue, HeaderValue, Message, Properties};
use crate::names::{BatchId, QueueName, TaskId};
use crate::outcome::DeadReason;
use crate::timestamp::Timestamp;

/// Most letters that one query may name or list.
pub const MOST_LETTERS: usize = 1_000;
/// How often the same work may be replayed by default.
pub const DEFAULT_MAX_REPLAYS: u32 = 3;

/// A filter for dead letters: those that meet every given condition; without conditions all.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct DeadFilter {
    /// The task is one of these, at most 1,000.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ids: Vec<TaskId>,
    /// The task has this name, which may contain `*` (any text) and `?` (any character).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The task was published to this queue.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue: Option<String>,
    /// The task was given up for one of these reasons.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub reasons: Vec<DeadReason>,
    /// The task was given up at this time or later.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<Timestamp>,
    /// The task was given up before this time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub until: Option<Timestamp>,
    /// The error contains this text; upper and lower case of ASCII letters are equal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The task belongs to this batch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch: Option<BatchId>,
    /// The letter is in this state.
    #[serde(skip_serializing_if = "LetterState::is_dead")]
    pub state: LetterState,
}

impl DeadFilter {
    /// Whether the filter has no conditions and matches every letter that is [`LetterState::Dead`].
    pub fn is_everything(&self) -> bool {
        *self == Self::default()
    }
}

/// The state of a dead letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LetterState {
    /// Unresolved.
    #[default]
    Dead,
    /// The task succeeded or was cancelled; the letter is of a repeated execution that failed.
    Late,
    /// The task was published again.
    Replayed,
}

impl LetterState {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
    fn is_dead(&self) -> bool {
        *self == Self::Dead
    }
}

/// The position behind a page. Clients pass the cursor of a response to the next query unchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadCursor {
    /// When the last examined letter was given up, in milliseconds since 1970.
    pub at: u64,
    /// The row of that letter.
    pub row: u64,
    /// The newest row when the first page was read. Later letters are not listed, so that replaying
    /// page after page does not replay again what has failed in the meantime.
    pub newest: u64,
}

/// A page of dead letters.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct DeadPage {
    /// The letters, the newest first.
    pub letters: Vec<DeadSummary>,
    /// Number of letters that match, if the query asks for it.
    pub total: Option<u64>,
    /// Whether more letters match than `total`: counting stops after examining some ten thousand.
    pub more_than_total: bool,
    /// Where the next page begins; `None` on the last page. An empty page need not be the last one.
    pub next: Option<DeadCursor>,
}

/// A dead letter as it is shown to people.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeadSummary {
    /// The id of the task, generated if the message had no valid one.
    pub id: TaskId,
    /// AMQP `type`, which is the name of the task; `None` if the message had none.
    pub name: Option<String>,
    /// The queue that the task was published to.
    pub queue: String,
    /// Why the task was given up.
    pub reason: DeadReason,
    /// The last error.
    pub error: String,
    /// The name of the process that gave the task up.
    pub by: String,
    /// When the task was given up.
    pub at: Timestamp,
    /// Size of the body in bytes.
    pub body_bytes: u64,
    /// The body, if it is JSON, small enough, and nested at most [`MAX_DEPTH`](super::MAX_DEPTH)
    /// levels deep, so that one letter cannot make a whole page unreadable.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub args: Option<Payload>,
    /// The batch of the task.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub batch: Option<BatchId>,
    /// The state of the letter.
    #[serde(skip_serializing_if = "LetterState::is_dead", default)]
    pub state: LetterState,
    /// When the last attempt started, if there was one.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub started_at: Option<Timestamp>,
    /// The task of which this one is a replay.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub replay_of: Option<TaskId>,
    /// How often this work had been replayed when the task was published.
    #[serde(skip_serializing_if = "is_zero", default)]
    pub replays: u32,
    /// The task that this one was replayed as.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub replayed_as: Option<TaskId>,
    /// When this task was replayed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub replayed_at: Option<Timestamp>,
    /// The whole message, if the query asks for it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub message: Option<Box<LetterMessage>>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// A message as JSON: complete except for the key of its batch, which is replaced by the id.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct LetterMessage {
    /// The properties, by their AMQP names.
    pub properties: serde_json::Map<String, serde_json::Value>,
    /// The headers. A value of a type that JSON lacks is an object with the name of the type.
    pub headers: serde_json::Map<String, serde_json::Value>,
    /// The body, if it is UTF-8 and fits into one response.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body_text: Option<String>,
    /// The body in base64, if it is not UTF-8 and fits into one response.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body_base64: Option<String>,
}

impl LetterMessage {
    /// The properties and headers of `message`, without its body.
    pub fn without_body(message: &Message) -> Self {
        Self {
            properties: properties(&message.properties),
            headers: message
                .headers
                .iter()
                .map(|(name, value)| (name.to_string(), shown(name, value)))
                .collect(),
            ..Self::default()
        }
    }
}

fn properties(properties: &Properties) -> serde_json::Map<String, serde_json::Value> {
    let Properties {
        content_type,
        content_encoding,
        kind,
        message_id,
        correlation_id,
        reply_to,
        app_id,
        timestamp,
        priority,
        expiration,
        user_id,
    } = properties.clone();
    let all = [
        ("type", kind.map(Into::into)),
        ("message_id", message_id.map(Into::into)),
        ("content_type", content_type.map(Into::into)),
        ("content_encoding", content_encoding.map(Into::into)),
        ("correlation_id", correlation_id.map(Into::into)),
        ("reply_to", reply_to.map(Into::into)),
        ("app_id", app_id.map(Into::into)),
        ("timestamp", timestamp.map(Into::into)),
        ("priority", priority.map(Into::into)),
        ("expiration", expiration.map(Into::into)),
        ("user_id", user_id.map(Into::into)),
    ];
    let present = all.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?)));
    present.collect()
}

/// A header as JSON, with the id of a batch instead of its key, which clients that list dead
/// letters must not see.
fn shown(name: &str, value: &HeaderValue) -> serde_json::Value {
    match value {
        HeaderValue::Text(batch) if name == headers::BATCH => match BatchId::new(batch) {
            Ok(batch) => batch.public().as_str().into(),
            Err(_) => json(value),
        },
        HeaderValue::Text(_)
        | HeaderValue::Int(_)
        | HeaderValue::Float(_)
        | HeaderValue::Bool(_)
        | HeaderValue::Foreign(_) => json(value),
    }
}

/// A header as JSON. Infinities become text, and a type that JSON lacks an object with its name.
fn json(value: &HeaderValue) -> serde_json::Value {
    match value {
        HeaderValue::Text(text) => text.clone().into(),
        HeaderValue::Int(number) => (*number).into(),
        HeaderValue::Float(number) if !number.is_finite() => number.to_string().into(),
        HeaderValue::Float(number) => (*number).into(),
        HeaderValue::Bool(truth) => (*truth).into(),
        HeaderValue::Foreign(foreign) => match foreign {
            ForeignValue::Timestamp(seconds) => serde_json::json!({ "timestamp": seconds }),
            ForeignValue::Bytes(bytes) => {
                let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
                serde_json::json!({ "bytes": hex })
            }
            ForeignValue::Decimal { scale, value } => {
                serde_json::json!({ "decimal": { "scale": scale, "value": value } })
            }
            ForeignValue::Nested => serde_json::json!({ "nested": null }),
        },
    }
}

/// How dead letters are replayed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ReplayPlan {
    /// The queue to publish to, instead of that of the letter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue: Option<QueueName>,
    /// JSON text that replaces the arguments.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub args: Option<String>,
    /// Keys of the arguments, which must be a JSON object, and their new values as JSON text.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub set: Vec<(String, String)>,
    /// A letter that was replayed this often is refused.
    pub max_replays: u32,
    /// Whether letters in the state [`LetterState::Late`] are replayed.
    pub late: bool,
    /// Whether to report the outcomes only, without publishing anything.
    pub dry_run: bool,
}

impl Default for ReplayPlan {
    fn default() -> Self {
        Self {
            queue: None,
            args: None,
            set: vec![],
            max_replays: DEFAULT_MAX_REPLAYS,
            late: false,
            dry_run: false,
        }
    }
}

/// A letter to replay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplayItem {
    /// The id of the dead task.
    pub id: TaskId,
    /// The id of the new task; generated if absent. With an id the query may be repeated without
    /// replaying the letter twice.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub new_id: Option<TaskId>,
}

/// The outcome of replaying one letter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replayed {
    /// The id of the dead task.
    pub id: TaskId,
    /// The outcome.
    #[serde(flatten)]
    pub outcome: ReplayOutcome,
}

/// What happened to a letter in a replay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum ReplayOutcome {
    /// The task is published again, or would be in a dry run.
    Replayed {
        /// The id of the new task. A parked task keeps its id, because it has not ended.
        new_id: TaskId,
        /// The queue of the new task.
        queue: String,
    },
    /// The letter had been replayed before.
    Already {
        /// The id of the task that it was replayed as.
        new_id: TaskId,
    },
    /// The letter cannot be replayed as planned.
    Refused {
        /// Why, and what to do about it.
        error: String,
    },
    /// There is no dead letter with this id.
    NotFound,
}

/// The outcome of a purge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Purged {
    /// Number of deleted letters.
    pub purged: u64,
    /// Number of parked tasks among them, which have ended as failed.
    pub ended: u64,
}

impl DeadSummary {
    /// Whether the body is bincode, by the `content_type` of [`message`](Self::message).
    pub fn is_bincode(&self) -> bool {
        let content_type = self.message.as_ref().and_then(|m| m.properties.get("content_type"));
        let content_type = content_type.and_then(serde_json::Value::as_str);
        content_type.and_then(Codec::from_content_type) == Some(Codec::Bincode)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_filter_is_an_empty_object() {
        let filter = DeadFilter::default();
        assert_eq!(serde_json::to_string(&filter).unwrap(), "{}");
        assert_eq!(serde_json::from_str::<DeadFilter>("{}").unwrap(), filter);
        let plan: ReplayPlan = serde_json::from_str("{}").unwrap();
        assert_eq!(plan.max_replays, DEFAULT_MAX_REPLAYS);
    }

    #[test]
    fn letters_of_the_first_version_are_understood() {
        let old = r#"{"id":"m-1","name":null,"queue":"q","reason":"fatal","error":"e","by":"b",
            "at":"2026-11-23T08:29:47.772Z","body_bytes":15}"#;
        let letter: DeadSummary = serde_json::from_str(old).unwrap();
        assert_eq!((letter.state, letter.replays), (LetterState::Dead, 0));
        assert!(!serde_json::to_string(&letter).unwrap().contains("state"));
    }

    #[test]
    fn a_message_is_shown_by_its_amqp_names() {
        let mut message = Message::default();
        message.properties.kind = Some("a.b".to_owned());
        message.set_header("f", HeaderValue::Float(f64::NAN));
        message.set_header("i", HeaderValue::Int(7));
        message.set_header("t", HeaderValue::Foreign(ForeignValue::Timestamp(8)));
        message.set_header("b", HeaderValue::Foreign(ForeignValue::Bytes(vec![255].into())));
        let shown = serde_json::to_value(LetterMessage::without_body(&message)).unwrap();
        let headers = serde_json::json!({
            "f": "NaN", "i": 7, "t": { "timestamp": 8 }, "b": { "bytes": "ff" }
        });
        let expected = serde_json::json!({ "properties": { "type": "a.b" }, "headers": headers });
        assert_eq!(shown, expected);
    }
}
