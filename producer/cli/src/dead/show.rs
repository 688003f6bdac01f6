//! `garenne dead show`: all the evidence there is of one letter, and what to do about it.

use garenne_common::wire::depth::is_too_deep;
use garenne_common::wire::{DeadSummary, LetterMessage, LetterState, Query, Response, RetryNote};
use garenne_common::{DeadReason, TaskId};
use serde::Serialize;
use serde_json::Value;

use crate::context::Context;
use crate::error::{CliError, Exit};
use crate::output::{Paint, facts};

pub(crate) const EXAMPLES: &str = "\
Examples:
  garenne dead show 0192f0c1-7a55-7e22-9c53-1f8e3a1d4b6a
  garenne dead show order-17 -o json | jq .message.headers

Exit code 3 if there is no dead letter of this id.";

/// Shown of a body that is no JSON.
const SHOWN_BODY: usize = 500;

#[derive(Serialize)]
struct Shown {
    #[serde(flatten)]
    letter: DeadSummary,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    attempts: Vec<RetryNote>,
}

pub(crate) async fn run(context: &Context, id: &TaskId) -> Result<Exit, CliError> {
    let producer = context.producer("dead show").await?;
    let answer = context.ask(&producer, Query::Dead { id: id.clone() }).await;
    context.close(producer, &answer).await;
    let Response::Dead { letter, attempts } = answer? else {
        return Err(CliError::unexpected_answer());
    };
    let Some(letter) = letter else {
        return Err(CliError::unusable(format!("there is no dead letter {id}"))
            .exit(Exit::NotYet)
            .help("`garenne dead list` shows those there are, `garenne task show` how the task stands"));
    };
    let shown = Shown { letter, attempts };
    context.output.show(&shown, |paint| describe(&shown, paint))?;
    Ok(Exit::Success)
}

fn describe(Shown { letter, attempts }: &Shown, paint: Paint) -> String {
    let started = letter.started_at.map_or("no attempt was made".to_owned(), |at| at.to_string());
    let replays = (letter.replays > 0).then(|| match &letter.replay_of {
        Some(old) => format!("replay of {old}, number {} of this work", letter.replays),
        None => format!("sent again {} times", letter.replays),
    });
    let header = |name: &str| letter.message.as_ref().and_then(|message| message.headers.get(name));
    let crashes = header("x-garenne-crashes").map(|count| {
        let log = header("x-garenne-crash-log").and_then(Value::as_str).unwrap_or_default();
        format!("{count}\n{log}").trim_end().to_owned()
    });
    facts(&[
        ("task", Some(letter.id.to_string())),
        ("name", letter.name.clone()),
        ("queue", Some(letter.queue.clone())),
        ("batch", letter.batch.as_ref().map(ToString::to_string)),
        ("reason", Some(paint.red(letter.reason.as_str()))),
        ("error", Some(letter.error.clone())),
        ("given up", Some(format!("{} by {}", letter.at, letter.by))),
        ("started", Some(started)),
        ("attempts", Some(attempts_log(attempts)).filter(|log| !log.is_empty())),
        ("crashes", crashes),
        ("replays", replays),
        ("headers", letter.message.as_deref().map(headers).filter(|headers| !headers.is_empty())),
        ("body", Some(body(letter))),
        ("next", Some(paint.cyan(&next(letter)))),
    ])
}

fn attempts_log(attempts: &[RetryNote]) -> String {
    let line = |note: &RetryNote| {
        format!("{}: {} on {}: {}", note.attempt, note.at, note.worker, note.error)
    };
    attempts.iter().map(line).collect::<Vec<_>>().join("\n")
}

fn headers(message: &LetterMessage) -> String {
    let shown = message.headers.iter().filter(|(name, _)| *name != "x-garenne-crash-log");
    let line = |(name, value): (&String, &Value)| match value {
        Value::String(text) => format!("{name} = {text}"),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => {
            format!("{name} = {value}")
        }
    };
    shown.map(line).collect::<Vec<_>>().join("\n")
}

fn body(letter: &DeadSummary) -> String {
    let args = letter.args.as_ref().and_then(|args| args.as_json());
    let as_written = args.map(|args| args.trim().to_owned());
    as_written.unwrap_or_else(|| {
        let bytes = letter.body_bytes;
        let text = letter.message.as_ref().and_then(|message| message.body_text.as_deref());
        let kind = if letter.is_bincode() {
            "bincode"
        } else if text.is_some_and(|text| is_too_deep(text.as_bytes())) {
            "nested too deeply to be shown as JSON"
        } else {
            "not JSON"
        };
        let start: String = text.unwrap_or_default().chars().take(SHOWN_BODY).collect();
        let start: String =
            start.chars().map(|c| if c.is_control() && c != '\n' { '·' } else { c }).collect();
        format!("{bytes} bytes, {kind}\n{start}").trim_end().to_owned()
    })
}

fn next(letter: &DeadSummary) -> String {
    let id = &letter.id;
    match (letter.state, &letter.replayed_as) {
        (_, Some(new)) => return format!("it was replayed: garenne task show {new}"),
        (LetterState::Late, _) => {
            return format!("nothing: its task has ended well, see garenne task show {id}");
        }
        (LetterState::Dead | LetterState::Replayed, None) => {}
    }
    match letter.reason {
        DeadReason::Malformed => {
            format!("mend the sender; with other arguments: garenne dead replay {id} --args 'JSON'")
        }
        DeadReason::UnknownTask => {
            format!("start a worker that knows this name: it runs then; or: garenne cancel {id}")
        }
        DeadReason::Unrouted => format!(
            "start a worker for queue {}, or: garenne dead replay {id} --to-queue QUEUE",
            letter.queue
        ),
        DeadReason::RetriesExhausted
        | DeadReason::Fatal
        | DeadReason::TimedOut
        | DeadReason::Panicked
        | DeadReason::Crashed
        | DeadReason::Expired
        | DeadReason::Broker => format!("mend the cause; then garenne dead replay {id}"),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use garenne_common::Timestamp;

    pub(crate) fn letter() -> DeadSummary {
        DeadSummary {
            id: TaskId::new("t-1").unwrap(),
            name: None,
            queue: "cpu".to_owned(),
            reason: DeadReason::Malformed,
            error: format!("{}\nsecond", "x".repeat(200)),
            by: "host:1".to_owned(),
            at: Timestamp::from_millis(0),
            body_bytes: 17,
            args: None,
            batch: None,
            state: LetterState::Dead,
            started_at: None,
            replay_of: None,
            replays: 0,
            replayed_as: None,
            replayed_at: None,
            message: None,
        }
    }

    #[test]
    fn a_letter_is_shown_whole_with_what_to_do() {
        let mut letter = letter();
        let mut message =
            LetterMessage { body_text: Some("{\u{7}\"".into()), ..LetterMessage::default() };
        message.headers.insert("x-mine".to_owned(), Value::from("yes"));
        letter.message = Some(Box::new(message));
        let text = describe(&Shown { letter, attempts: vec![] }, Paint::plain());
        for part in ["second", "17 bytes, not JSON", "{·\"", "x-mine = yes", "replay t-1 --args"] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn what_was_replayed_points_to_its_successor() {
        let mut letter = letter();
        letter.replayed_as = TaskId::new("t-2").ok();
        assert!(next(&letter).contains("garenne task show t-2"));
    }
}
