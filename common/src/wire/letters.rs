//! Dead letters in questions and answers: which ones, what is shown of them, what is to be done.
//!
//! Shapes only. How the message of a replay is made is in [`super::replay`]; everything that came
//! after the first version has a default, so that older clients and collectors go on talking.

use serde::{Deserialize, Serialize};

use super::codec::{Codec, Payload};
use super::headers;
use super::message::{ForeignValue, HeaderValue, Message, Properties};
use crate::names::{BatchId, QueueName, TaskId};
use crate::outcome::DeadReason;
use crate::timestamp::Timestamp;

/// The most letters that one question may name or list.
pub const MOST_LETTERS: usize = 1_000;
/// How often the same work may be replayed unless somebody insists.
pub const DEFAULT_MAX_REPLAYS: u32 = 3;

/// Which dead letters: everything that is given must hold; nothing given means all.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct DeadFilter {
    /// One of these tasks; at most 1,000.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ids: Vec<TaskId>,
    /// The task's name, whole or with `*` (any text) and `?` (any character).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The queue it was meant for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue: Option<String>,
    /// Given up for one of these reasons.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub reasons: Vec<DeadReason>,
    /// Given up at this moment or later.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<Timestamp>,
    /// Given up before this moment.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub until: Option<Timestamp>,
    /// Somewhere in the error, whatever the case of ASCII letters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The batch that its sender meant.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub batch: Option<BatchId>,
    /// Which of the three piles.
    #[serde(skip_serializing_if = "LetterState::is_dead")]
    pub state: LetterState,
}

impl DeadFilter {
    /// Whether it lets every dead letter pass.
    pub fn is_everything(&self) -> bool {
        *self == Self::default()
    }
}

/// What became of a dead letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LetterState {
    /// Nothing yet; somebody should look.
    #[default]
    Dead,
    /// Its task has succeeded or was cancelled after all (a repeated execution failed).
    Late,
    /// It was sent to the workers again.
    Replayed,
}

impl LetterState {
    /// For serde.
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands out references")]
    fn is_dead(&self) -> bool {
        *self == Self::Dead
    }
}

/// Where a list goes on, newest first. Only what an answer gave is good for the next question.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadCursor {
    /// When the last letter looked at was given up.
    pub at: u64,
    /// Its row.
    pub row: u64,
    /// The newest row when the list began: what came later is no part of it, so that whoever replays
    /// page after page does not meet what has failed again meanwhile.
    pub newest: u64,
}

/// A page of a list.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct DeadPage {
    /// The letters, newest first.
    pub letters: Vec<DeadSummary>,
    /// How many match in all, if that was asked.
    pub total: Option<u64>,
    /// Whether there are more than `total` says: counting stops after some ten thousand looks.
    pub more_than_total: bool,
    /// Where the next page begins; `None` at the end. A page may be empty and not the last one.
    pub next: Option<DeadCursor>,
}

/// A dead letter, for people.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeadSummary {
    /// The task's id, or one made up for a message without a valid one.
    pub id: TaskId,
    /// AMQP `type`: the task name, if it had one.
    pub name: Option<String>,
    /// The queue it was meant for.
    pub queue: String,
    /// Why it was given up.
    pub reason: DeadReason,
    /// The last error.
    pub error: String,
    /// Who gave it up.
    pub by: String,
    /// When.
    pub at: Timestamp,
    /// Size of the body in bytes.
    pub body_bytes: u64,
    /// The body as JSON where it is JSON, small enough, and nested at most
    /// [`MAX_DEPTH`](super::MAX_DEPTH) levels deep: one letter must not make a whole page unreadable.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub args: Option<Payload>,
    /// The batch that its sender meant.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub batch: Option<BatchId>,
    /// What became of it.
    #[serde(skip_serializing_if = "LetterState::is_dead", default)]
    pub state: LetterState,
    /// When its last attempt started, if one did.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub started_at: Option<Timestamp>,
    /// The task of which this one was a replay.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub replay_of: Option<TaskId>,
    /// How often this work had been replayed when the task began.
    #[serde(skip_serializing_if = "is_zero", default)]
    pub replays: u32,
    /// The task that it was replayed as.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub replayed_as: Option<TaskId>,
    /// When it was replayed.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub replayed_at: Option<Timestamp>,
    /// The whole message, where it was asked for.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub message: Option<Box<LetterMessage>>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde hands out references")]
fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// A message as JSON: what it was, to the byte, but for the key of its batch.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct LetterMessage {
    /// The properties it had, by their AMQP names.
    pub properties: serde_json::Map<String, serde_json::Value>,
    /// The headers it had.
    pub headers: serde_json::Map<String, serde_json::Value>,
    /// The body, if it is UTF-8 and within one answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body_text: Option<String>,
    /// The body in base64, if it is not UTF-8 and within one answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body_base64: Option<String>,
}

impl LetterMessage {
    /// Properties and headers of `message`, without its body.
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

/// The key of a batch is not to be seen by those who may look at dead letters.
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

/// How dead letters are to be replayed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ReplayPlan {
    /// To this queue instead of the one they died in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue: Option<QueueName>,
    /// JSON text that replaces the arguments.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub args: Option<String>,
    /// Keys of the arguments, a JSON object, that get another value: pairs of key and JSON text.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub set: Vec<(String, String)>,
    /// What was replayed so often already is refused.
    pub max_replays: u32,
    /// Also letters whose task succeeded or was cancelled after all.
    pub late: bool,
    /// Only say what would be done.
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

/// One letter to be replayed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplayItem {
    /// The dead task.
    pub id: TaskId,
    /// The id of the new one; one is made up if this is missing. Whoever names it may ask again
    /// without replaying twice.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub new_id: Option<TaskId>,
}

/// What became of one letter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replayed {
    /// The dead task.
    pub id: TaskId,
    /// What became of it.
    #[serde(flatten)]
    pub outcome: ReplayOutcome,
}

/// What became of a letter that was to be replayed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum ReplayOutcome {
    /// It goes to the workers, or would in a dry run.
    Replayed {
        /// As this task. An unknown task keeps its id, because it has not ended.
        new_id: TaskId,
        /// To this queue.
        queue: String,
    },
    /// It had been replayed before.
    Already {
        /// As this task.
        new_id: TaskId,
    },
    /// It cannot be replayed like this.
    Refused {
        /// Why, and what to do.
        error: String,
    },
    /// There is no dead letter of this id.
    NotFound,
}

/// What became of letters that were to be purged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Purged {
    /// Letters that are gone.
    pub purged: u64,
    /// Unknown tasks among them; they have ended as failed.
    pub ended: u64,
}

impl DeadSummary {
    /// Whether the body is in bincode, as the message says; for people.
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
    fn an_empty_filter_is_an_empty_object_and_back() {
        let filter = DeadFilter::default();
        assert_eq!(serde_json::to_string(&filter).unwrap(), "{}");
        assert_eq!(serde_json::from_str::<DeadFilter>("{}").unwrap(), filter);
        let plan: ReplayPlan = serde_json::from_str("{}").unwrap();
        assert_eq!(plan.max_replays, DEFAULT_MAX_REPLAYS);
    }

    #[test]
    fn a_letter_of_the_first_version_is_still_read() {
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
