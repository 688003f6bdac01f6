//! Builds the message of a replay from a dead letter.
//!
//! Comes in: a letter and a plan. Goes out: a valid message of a task, or why there is none. The
//! collector calls this in the transaction that marks the letter (docs/decisions/0010); nothing is
//! published here.

use std::collections::BTreeMap;

use serde_json::value::RawValue;

use super::codec::Codec;
use super::dead::DeadLetter;
use super::headers::{self, number};
use super::letters::ReplayPlan;
use super::malformed::{MAX_BODY_BYTES, Malformed};
use super::message::{HeaderValue, Message};
use super::task;
use crate::names::{QueueName, TaskId};
use crate::timestamp::Timestamp;

/// Why a letter cannot be replayed as planned, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CannotReplay {
    /// The letter has been replayed as often as the plan allows.
    #[error("it was replayed {replays} times already; allow more with --max-replays or --force")]
    TooOften {
        /// How often it was replayed.
        replays: u32,
    },
    /// The message is still not a valid task.
    #[error("a worker would refuse it again: {0}; change its arguments with --args or --set")]
    Malformed(String),
    /// The queue of the letter is not a valid queue name.
    #[error("{0:?} is not a valid queue name; choose a queue with --to-queue")]
    NoQueue(String),
    /// Only JSON arguments can be edited.
    #[error(
        "its arguments are {0}, and only JSON can be edited; \
         submit the task again from the program that has its type"
    )]
    NotJson(&'static str),
    /// The edit cannot be applied to the arguments.
    #[error("{0}")]
    Edit(String),
}

/// A task that is ready to be published again.
#[derive(Debug, Clone, PartialEq)]
pub struct Replay {
    /// The id of the task.
    pub id: TaskId,
    /// The queue of the task.
    pub queue: QueueName,
    /// The message of the task.
    pub message: Message,
}

/// How often the work in this message was replayed, for display: 0 if the header has a wrong type.
pub fn replays(message: &Message) -> u32 {
    count_replays(message).unwrap_or(0)
}

fn count_replays(message: &Message) -> Result<u32, Malformed> {
    let replays = number(message, headers::REPLAYS)?.unwrap_or(0);
    Ok(u32::try_from(replays).unwrap_or(u32::MAX))
}

/// The task that this message is a replay of, for display: `None` if the header is invalid.
pub fn replay_of(message: &Message) -> Option<TaskId> {
    let id = headers::text(message, headers::REPLAY_OF).ok().flatten()?;
    TaskId::new(id).ok()
}

/// Builds the task that a letter is replayed as.
///
/// A task that has ended starts again as `new_id`. A parked task has not ended: it keeps its id,
/// its batch and its reply queue.
pub fn replay(
    letter: &DeadLetter,
    plan: &ReplayPlan,
    new_id: TaskId,
) -> Result<Replay, CannotReplay> {
    // A header of a wrong type must not be replaced by a count from zero.
    let replays =
        count_replays(&letter.message).map_err(|malformed| CannotReplay::Malformed(malformed.0))?;
    if replays >= plan.max_replays {
        return Err(CannotReplay::TooOften { replays });
    }
    let queue = match &plan.queue {
        Some(queue) => queue.clone(),
        None => QueueName::new(&letter.queue)
            .map_err(|_| CannotReplay::NoQueue(letter.queue.clone()))?,
    };
    let mut message = task::for_republish(&letter.message);
    edit(&mut message, plan)?;
    let id = if letter.reason.is_final() {
        begin_anew(&mut message, &letter.id, &new_id);
        new_id
    } else {
        letter.id.clone()
    };
    message.set_header(headers::REPLAYS, HeaderValue::Int(i64::from(replays) + 1));
    task::decode(&message, &queue).map_err(|error| CannotReplay::Malformed(error.0))?;
    Ok(Replay { id, queue, message })
}

/// Removes what belonged to the ended task: its batch, which has counted it; its deadline, which
/// has usually passed; its crashes; and its reply queue, whose owner was told of the failure.
fn begin_anew(message: &mut Message, old: &TaskId, new: &TaskId) {
    let removed = [
        headers::BATCH,
        headers::EXPIRES_AT,
        headers::FIRST_ATTEMPT_AT,
        headers::CRASHES,
        headers::CRASH_LOG,
        headers::FENCE,
        headers::LAPSES,
        headers::LEASE_EXECUTION,
        headers::LEASE_WORKER,
        headers::LEASE_QUEUE,
        headers::LEASE_TERM,
        headers::REPLY_FORMAT,
        headers::FINGERPRINT,
    ];
    message.headers.retain(|(name, _)| !removed.contains(&name.as_ref()));
    let now = Timestamp::now().as_millis();
    let millis = HeaderValue::Int(i64::try_from(now).unwrap_or(i64::MAX));
    message.set_header(headers::ATTEMPT, HeaderValue::Int(1));
    message.set_header(headers::SUBMITTED_AT, millis);
    message.set_header(headers::REPLAY_OF, HeaderValue::Text(old.to_string()));
    message.properties.message_id = Some(new.to_string());
    message.properties.reply_to = None;
    message.properties.timestamp = Some(now / 1_000);
}

fn edit(message: &mut Message, plan: &ReplayPlan) -> Result<(), CannotReplay> {
    if plan.args.is_none() && plan.set.is_empty() {
        return Ok(());
    }
    let content_type = message.properties.content_type.as_deref();
    match content_type.map_or(Some(Codec::Json), Codec::from_content_type) {
        Some(Codec::Json) => {}
        Some(Codec::Bincode) => return Err(CannotReplay::NotJson("bincode")),
        None => return Err(CannotReplay::NotJson("of an unknown type")),
    }
    // The fingerprint is that of the old arguments.
    message.headers.retain(|(name, _)| name != headers::FINGERPRINT);
    if let Some(args) = &plan.args {
        message.body = args.clone().into_bytes().into();
    }
    if !plan.set.is_empty() {
        message.body = set(&message.body, &plan.set)?.into();
    }
    if message.body.len() > MAX_BODY_BYTES {
        return Err(CannotReplay::Edit(format!("{} bytes are too large", message.body.len())));
    }
    Ok(())
}

/// Replaces keys of a JSON object. Values stay text, so that the numbers of other keys lose no
/// digits.
fn set(body: &[u8], pairs: &[(String, String)]) -> Result<Vec<u8>, CannotReplay> {
    let object = serde_json::from_slice::<BTreeMap<String, Box<RawValue>>>(body);
    let mut object = object.map_err(|_| {
        CannotReplay::Edit(
            "its arguments are not a JSON object, so they have no keys to set".to_owned(),
        )
    })?;
    for (key, value) in pairs {
        let value = RawValue::from_string(value.clone());
        let value = value.map_err(|error| {
            CannotReplay::Edit(format!("the new value of {key:?} is not JSON: {error}"))
        })?;
        object.insert(key.clone(), value);
    }
    serde_json::to_vec(&object).map_err(|error| CannotReplay::Edit(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::DeadReason;
    use crate::wire::Properties;

    fn id(text: &str) -> TaskId {
        TaskId::new(text).unwrap()
    }

    fn letter(reason: DeadReason) -> DeadLetter {
        let properties = Properties {
            kind: Some("a.b".to_owned()),
            message_id: Some("old".to_owned()),
            reply_to: Some("r".to_owned()),
            expiration: Some("5".to_owned()),
            ..Properties::default()
        };
        let body = br#"{"n":12345678901234567890123,"s":"x"}"#.to_vec().into();
        let mut message = Message { properties, headers: vec![], body };
        message.set_header(headers::ATTEMPT, HeaderValue::Int(4));
        message.set_header(headers::BATCH, HeaderValue::Text("b-1".to_owned()));
        message.set_header(headers::EXPIRES_AT, HeaderValue::Int(1));
        task::note_first_attempt(&mut message, Timestamp::from_millis(1));
        message.set_header(headers::CRASHES, HeaderValue::Int(3));
        message.set_header("x-mine", HeaderValue::Bool(true));
        DeadLetter::new(&message, "cpu", reason, "no", "w")
    }

    fn plan() -> ReplayPlan {
        ReplayPlan::default()
    }

    #[test]
    fn an_ended_task_starts_again_under_another_id() {
        let replay = replay(&letter(DeadReason::Crashed), &plan(), id("new")).unwrap();
        assert_eq!((replay.id.as_str(), replay.queue.as_str()), ("new", "cpu"));
        let task = task::decode(&replay.message, &replay.queue).unwrap().unwrap();
        assert_eq!((task.id, task.attempt, task.batch), (id("new"), 1, None));
        assert_eq!((task.options.expires_at, task.reply), (None, None));
        assert_eq!(replay.message.header(headers::CRASHES), None);
        assert_eq!(task::first_attempt_at(&replay.message), None);
        assert_eq!(replay.message.header("x-mine"), Some(&HeaderValue::Bool(true)));
        assert_eq!(replay_of(&replay.message), Some(id("old")));
        assert_eq!(replays(&replay.message), 1);
    }

    #[test]
    fn a_parked_task_keeps_its_id_and_batch() {
        let replay = replay(&letter(DeadReason::UnknownTask), &plan(), id("new")).unwrap();
        let task = task::decode(&replay.message, &replay.queue).unwrap().unwrap();
        assert_eq!((task.id, task.attempt), (id("old"), 4));
        assert_eq!(task.batch.unwrap().as_str(), "b-1");
        assert_eq!(&*task.reply.unwrap().queue, "r");
        assert_eq!(replay_of(&replay.message), None);
        assert_eq!(replays(&replay.message), 1);
    }

    #[test]
    fn a_replay_count_of_the_wrong_type_is_not_reset_to_zero() {
        let mut letter = letter(DeadReason::Fatal);
        letter.message.set_header(headers::REPLAYS, HeaderValue::Float(3.0));
        let refused = replay(&letter, &plan(), id("new")).unwrap_err();
        assert!(refused.to_string().contains(headers::REPLAYS), "{refused}");
    }

    #[test]
    fn a_chain_of_replays_ends_at_the_limit() {
        let mut letter = letter(DeadReason::Fatal);
        letter.message.set_header(headers::REPLAYS, HeaderValue::Int(3));
        let refused = replay(&letter, &plan(), id("new")).unwrap_err();
        assert_eq!(refused, CannotReplay::TooOften { replays: 3 });
        let patient = ReplayPlan { max_replays: 4, ..plan() };
        assert_eq!(replays(&replay(&letter, &patient, id("new")).unwrap().message), 4);
    }

    #[test]
    fn arguments_are_replaced_and_edited_without_touching_the_rest() {
        let set = |key: &str, value: &str| ReplayPlan {
            set: vec![(key.to_owned(), value.to_owned())],
            ..plan()
        };
        let body = |plan: &ReplayPlan| {
            let replay = replay(&letter(DeadReason::Fatal), plan, id("new"));
            replay.map(|replay| String::from_utf8(replay.message.body.to_vec()).unwrap())
        };
        let edited = body(&set("s", "[1]")).unwrap();
        assert_eq!(edited, r#"{"n":12345678901234567890123,"s":[1]}"#);
        assert!(matches!(body(&set("s", "{")), Err(CannotReplay::Edit(_))));
        let args = ReplayPlan { args: Some("[1, 2]".to_owned()), ..plan() };
        assert_eq!(body(&args).unwrap(), "[1, 2]");
        let both = ReplayPlan { set: vec![("a".to_owned(), "1".to_owned())], ..args };
        assert!(matches!(body(&both), Err(CannotReplay::Edit(_))));
        let broken = ReplayPlan { args: Some("{".to_owned()), ..plan() };
        assert!(matches!(body(&broken), Err(CannotReplay::Malformed(_))));
    }

    #[test]
    fn invalid_tasks_are_refused_with_their_reason() {
        let refuse = |change: &dyn Fn(&mut DeadLetter)| {
            let mut letter = letter(DeadReason::Malformed);
            change(&mut letter);
            replay(&letter, &plan(), id("new")).unwrap_err()
        };
        let nameless = refuse(&|letter| letter.message.properties.kind = None);
        assert!(matches!(nameless, CannotReplay::Malformed(_)), "{nameless}");
        let nowhere = refuse(&|letter| letter.queue = "no such\n".to_owned());
        assert!(matches!(nowhere, CannotReplay::NoQueue(_)), "{nowhere}");
        let mut bincode = letter(DeadReason::Fatal);
        bincode.message.properties.content_type = Some("application/x-bincode".to_owned());
        let edit = ReplayPlan { args: Some("1".to_owned()), ..plan() };
        let refused = replay(&bincode, &edit, id("new")).unwrap_err();
        assert_eq!(refused, CannotReplay::NotJson("bincode"));
        assert!(replay(&bincode, &plan(), id("new")).is_ok());
    }
}
