//! `garenne task`: shows what the collector knows about one task.

use clap::Subcommand;
use garenne_common::wire::{DeadSummary, Query, Response, RetryNote, TaskState};
use garenne_common::{DeadReason, Payload, Status, TaskId, TaskResult, Timestamp};
use serde::Serialize;

use crate::context::Context;
use crate::error::{CliError, Exit};
use crate::output::{Paint, facts};
use crate::times::span;

const EXAMPLES: &str = "\
Examples:
  garenne task show 0192f0c1-7a55-7e22-9c53-1f8e3a1d4b6a
  garenne task show order-17 --output json | jq .result.output

Exit codes: 0 the collector knows the task; 3 it does not know it (yet). The
collector learns of a task only when an attempt ends, so a task that is queued
or runs for the first time is not known to it.";

#[derive(Debug, Subcommand)]
#[command(after_help = EXAMPLES)]
pub(crate) enum TaskCommand {
    /// Show the state of a task: its output, its error, its next attempt
    #[command(after_help = EXAMPLES)]
    Show {
        /// The task's id
        id: TaskId,
    },
}

pub(crate) async fn run(context: &Context, command: TaskCommand) -> Result<Exit, CliError> {
    let TaskCommand::Show { id } = command;
    context.or_interrupt(show(context, &id)).await
}

async fn show(context: &Context, id: &TaskId) -> Result<Exit, CliError> {
    let producer = context.producer("task show").await?;
    let response = context.query(&producer, Query::Task { id: id.clone() }).await;
    context.close(producer, &response).await;
    let Response::Task { state, replayed_as, replay_of } = response? else {
        return Err(CliError::unexpected_response());
    };
    let known = state != TaskState::Unknown || replay_of.is_some();
    let shown = ShownTask { state, replayed_as, replay_of };
    context.output.show(&shown, |paint| shown.describe(id, paint))?;
    Ok(if known { Exit::Success } else { Exit::NotYet })
}

/// A task's state and its links to replays.
#[derive(Serialize)]
struct ShownTask {
    #[serde(flatten)]
    state: TaskState,
    #[serde(skip_serializing_if = "Option::is_none")]
    replayed_as: Option<TaskId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    replay_of: Option<TaskId>,
}

impl ShownTask {
    fn describe(&self, id: &TaskId, paint: Paint) -> String {
        let replays = [("replay of", &self.replay_of), ("replayed as", &self.replayed_as)];
        let replays =
            replays.iter().filter_map(|(what, id)| Some(format!("{what} {}", (*id).as_ref()?)));
        let lines = [describe(id, &self.state, paint)].into_iter().chain(replays);
        lines.collect::<Vec<_>>().join("\n")
    }
}

/// The error of a command that waited for a task that did not succeed.
pub(crate) fn failure(result: &TaskResult) -> CliError {
    let error = result.error.as_deref().unwrap_or("no error was given");
    if result.status == Status::Cancelled {
        let message = format!("task {} was cancelled: {error}", result.id);
        return CliError::unusable(message).exit(Exit::Failed);
    }
    let how = match result.status {
        Status::Succeeded => "succeeded without an output",
        Status::Failed => "failed",
        Status::Cancelled => "was cancelled",
    };
    let attempts = attempts(result.attempt);
    let reason = result.reason.map_or("no reason given", DeadReason::as_str);
    let by = &result.worker;
    let message = format!("task {} {how} after {attempts} ({reason}, {by}): {error}", result.id);
    CliError::unusable(message)
        .exit(Exit::Failed)
        .help(format!("the task is kept as a dead letter: garenne dead show {}", result.id))
}

fn attempts(count: u32) -> String {
    match count {
        0 => "no attempt".to_owned(),
        1 => "1 attempt".to_owned(),
        more => format!("{more} attempts"),
    }
}

fn describe(id: &TaskId, state: &TaskState, paint: Paint) -> String {
    match state {
        TaskState::Finished { result } => finished(result, paint),
        TaskState::Retrying { last } => retrying(last, paint),
        TaskState::Parked { letter } => parked(letter, paint),
        TaskState::Unknown => facts(&[
            ("task", Some(id.to_string())),
            ("state", Some(paint.yellow("not finished, or never submitted"))),
            ("", Some("the collector learns of a task when an attempt ends".to_owned())),
        ]),
    }
}

/// A final record, one fact per line.
pub(crate) fn finished(result: &TaskResult, paint: Paint) -> String {
    let state = match result.status {
        Status::Succeeded => paint.green(result.status.as_str()),
        Status::Failed => paint.red(result.status.as_str()),
        Status::Cancelled => paint.yellow(result.status.as_str()),
    };
    let again = if result.redelivered { ", redelivered after a lost connection" } else { "" };
    // A task that was cancelled before its first attempt has no start.
    let took = if result.attempt > 0 {
        let took = span(result.finished_at.since(result.started_at));
        format!(" ({took} after its last start)")
    } else {
        String::new()
    };
    facts(&[
        ("task", Some(format!("{}  {}", result.id, paint.dim(result.name.as_str())))),
        ("state", Some(state)),
        ("output", result.output.as_ref().map(Payload::to_line)),
        ("error", result.error.clone()),
        ("reason", result.reason.map(|reason| reason.as_str().to_owned())),
        ("attempts", Some(format!("{}{again}", result.attempt))),
        ("queue", Some(result.queue.to_string())),
        ("batch", result.batch.as_ref().map(ToString::to_string)),
        ("worker", Some(result.worker.to_string())),
        ("finished", Some(format!("{}{took}", result.finished_at))),
    ])
}

fn retrying(last: &RetryNote, paint: Paint) -> String {
    let wait = last.next_at.since(Timestamp::now());
    let next = if wait.is_zero() { "now".to_owned() } else { format!("in {}", span(wait)) };
    facts(&[
        ("task", Some(format!("{}  {}", last.id, paint.dim(last.name.as_str())))),
        ("state", Some(paint.yellow("retrying"))),
        ("attempts", Some(format!("{} failed, the next may start {next}", last.attempt))),
        ("error", Some(last.error.clone())),
        ("batch", last.batch.as_ref().map(ToString::to_string)),
        ("worker", Some(last.worker.clone())),
    ])
}

fn parked(letter: &DeadSummary, paint: Paint) -> String {
    let name = letter.name.as_deref().unwrap_or("(no name)");
    facts(&[
        ("task", Some(format!("{}  {}", letter.id, paint.dim(name)))),
        ("state", Some(paint.yellow("parked: no worker on its queue knows a task of this name"))),
        ("queue", Some(letter.queue.clone())),
        ("waits for", Some(format!("a worker of the queue {} that knows {name}", letter.queue))),
        ("", Some("it returns to its queue as soon as such a worker runs".to_owned())),
        ("error", Some(letter.error.clone())),
        ("since", Some(letter.at.to_string())),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use garenne_common::{QueueName, TaskName};

    fn failed() -> TaskResult {
        TaskResult {
            id: TaskId::new("t-1").unwrap(),
            name: TaskName::new("a.b").unwrap(),
            queue: QueueName::default(),
            batch: None,
            status: Status::Failed,
            output: None,
            error: Some("no such file\nand more".to_owned()),
            reason: Some(DeadReason::RetriesExhausted),
            attempt: 4,
            redelivered: false,
            worker: "host:7".into(),
            started_at: Timestamp::from_millis(1_000),
            finished_at: Timestamp::from_millis(2_500),
            fingerprint: None,
        }
    }

    #[test]
    fn the_error_of_a_failed_task_names_reason_attempts_and_worker() {
        let error = failure(&failed());
        for part in ["t-1", "4 attempts", "retries_exhausted", "host:7", "no such file"] {
            assert!(error.message.contains(part), "{part}: {}", error.message);
        }
        assert_eq!(error.exit, Exit::Failed);
    }

    #[test]
    fn a_record_is_printed_one_fact_per_line() {
        let text = finished(&failed(), Paint::plain());
        assert!(text.contains("\nerror     no such file\n          and more\n"), "{text}");
        assert!(text.ends_with("1970-01-01T00:00:02.5Z (1s 500ms after its last start)"), "{text}");
        assert!(!text.contains("output"), "{text}");
    }

    #[test]
    fn a_task_without_an_attempt_has_no_last_start() {
        let text = finished(&TaskResult { attempt: 0, ..failed() }, Paint::plain());
        assert!(text.ends_with("1970-01-01T00:00:02.5Z"), "{text}");
    }
}
