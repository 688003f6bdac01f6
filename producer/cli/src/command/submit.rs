//! `garenne submit`: submits one task and, if asked to, prints its result.

use std::time::Duration;

use clap::Args;
use garenne_common::wire::{Query, Response, TaskState};
use garenne_common::{Payload, Status, TaskId, TaskName, TaskResult};
use garenne_producer::{Handle, OutputError, Producer, Submission, SubmitError};
use serde_json::Value;
use serde_json::value::RawValue;

use crate::json_input;

use super::task;
use crate::context::{Context, remark_still_running};
use crate::error::{CliError, Exit};
use crate::options::{self, TaskOptions};
use crate::output::Format;

const EXAMPLES: &str = "\
Examples:
  garenne submit text.count_words '{\"text\":\"to be or not\"}' --wait
  garenne submit file.sha256 '{\"path\":\"/etc/hosts\"}' --queue cpu --retries 5
  garenne submit report.send @report.json --delay 2h --expires 6h
  jq -c .job queue.json | garenne submit job.run - --id order-17

Prints the task's id, or with --wait its output (with -o json the whole result).
The arguments are any JSON value that the task's handler expects; numbers are
passed on as they are written.

Exit codes: 0 submitted, or with --wait succeeded; 1 the task failed or was
cancelled; 2 not submitted; 3 --wait=TIME passed before the task ended.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct SubmitArgs {
    /// The task's name, which selects its handler
    #[arg(value_name = "TASK")]
    task: TaskName,
    /// The task's arguments; - reads standard input, @FILE a file [default: {}]
    #[arg(value_name = "JSON", allow_negative_numbers = true)]
    json: Option<String>,
    /// Wait for the result, without limit or at most TIME
    #[arg(long, value_name = "TIME", num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = "forever", value_parser = wait_limit)]
    wait: Option<WaitLimit>,
    #[command(flatten)]
    options: TaskOptions,
    /// The task's id [default: a generated one]. A task that is submitted twice under one id may
    /// run twice, but only its first result counts
    #[arg(long, value_name = "ID", help_heading = "Task options")]
    id: Option<TaskId>,
}

/// After this time without a result, a remark says what is known about the task.
const HINT_AFTER: Duration = Duration::from_secs(10);

/// How long to wait for the result.
#[derive(Debug, Clone, Copy)]
enum WaitLimit {
    Forever,
    AtMost(Duration),
}

fn wait_limit(text: &str) -> Result<WaitLimit, String> {
    if text == "forever" {
        return Ok(WaitLimit::Forever);
    }
    options::duration(text).map(WaitLimit::AtMost)
}

pub(crate) async fn run(context: &Context, arguments: SubmitArgs) -> Result<Exit, CliError> {
    // Selected together with the signals, which must end even a read of standard input.
    let args = tokio::select! {
        args = read_arguments(&arguments) => args?,
        exit = context.stop.requested() => return Ok(exit),
    };
    let mut submission = submission(&arguments.task, &args, &arguments.options)?;
    if let Some(id) = &arguments.id {
        submission = submission.id(id.clone());
    }
    let delay = arguments.options.delay.unwrap_or_default();
    let producer = context.producer("submit").await?;
    let exit = match arguments.wait {
        None => context.or_interrupt(submit_detached(context, &producer, submission)).await,
        Some(wait) => submit_and_wait(context, &producer, submission, wait, delay).await,
    };
    context.close(producer, &exit).await;
    exit
}

async fn read_arguments(arguments: &SubmitArgs) -> Result<Box<RawValue>, CliError> {
    let (task, json) = (arguments.task.clone(), arguments.json.clone());
    let read = tokio::task::spawn_blocking(move || json_input::read(&task, json.as_deref()));
    let failed = |error| CliError::unusable(format!("cannot read the arguments: {error}"));
    read.await.map_err(failed)?
}

/// A submission with the options of the command line.
pub(crate) fn submission(
    task: &TaskName,
    args: &RawValue,
    options: &TaskOptions,
) -> Result<Submission<Value>, SubmitError> {
    let mut submission = Submission::dynamic(task.as_str(), args)?;
    if let Some(queue) = &options.queue {
        submission = submission.queue(queue)?;
    }
    if let Some(delay) = options.delay {
        submission = submission.delay(delay);
    }
    if let Some(retries) = options.retries {
        submission = submission.retries(retries);
    }
    if let Some(timeout) = options.timeout {
        submission = submission.timeout(timeout);
    }
    if let Some(timeout) = options.soft_timeout {
        submission = submission.soft_timeout(timeout);
    }
    if let Some(expires) = options.expires {
        submission = submission.expires_in(expires);
    }
    if let Some(priority) = options.priority {
        submission = submission.priority(priority);
    }
    Ok(submission)
}

async fn submit_detached(
    context: &Context,
    producer: &Producer,
    submission: Submission<Value>,
) -> Result<Exit, CliError> {
    let id = producer.submit_detached(submission).await?;
    context.output.show(&serde_json::json!({ "id": id }), |_| id.to_string())?;
    Ok(Exit::Success)
}

async fn submit_and_wait(
    context: &Context,
    producer: &Producer,
    submission: Submission<Value>,
    wait: WaitLimit,
    delay: Duration,
) -> Result<Exit, CliError> {
    let mut handle = tokio::select! {
        handle = producer.submit(submission) => handle?,
        exit = context.stop.requested() => return Ok(exit),
    };
    let id = handle.id().clone();
    let ended = ended(&mut handle, wait);
    tokio::pin!(ended);
    let mut hinted = false;
    let result = loop {
        tokio::select! {
            result = &mut ended => break result?,
            exit = context.stop.requested() => {
                remark_still_running(context.output, "task", &format!("garenne task show {id}"));
                return Ok(exit);
            }
            () = tokio::time::sleep(HINT_AFTER + delay), if !hinted => {
                hinted = true;
                hint(context, producer, &id).await;
            }
        }
    };
    show(context, &result)
}

/// Prints what is known about a task that has no result yet.
async fn hint(context: &Context, producer: &Producer, id: &TaskId) {
    let known = match context.query(producer, Query::Task { id: id.clone() }).await {
        Ok(Response::Task { state: TaskState::Parked { letter }, .. }) => {
            format!("task {id} is parked: {}; it runs when a worker knows its name", letter.error)
        }
        Ok(Response::Task { state: TaskState::Retrying { last }, .. }) => {
            format!(
                "attempt {} of task {id} failed and will be retried: {}",
                last.attempt, last.error
            )
        }
        Ok(_) | Err(_) => format!(
            "task {id} has no result yet; `garenne doctor` checks whether workers serve its queue"
        ),
    };
    context.output.remark(known);
}

async fn ended(handle: &mut Handle<Value>, wait: WaitLimit) -> Result<TaskResult, OutputError> {
    match wait {
        WaitLimit::Forever => handle.ended().await.cloned(),
        WaitLimit::AtMost(limit) => handle.ended_within(limit).await.cloned(),
    }
}

fn show(context: &Context, result: &TaskResult) -> Result<Exit, CliError> {
    if result.status == Status::Succeeded {
        let output = result.output.as_ref().map_or_else(|| "null".to_owned(), Payload::to_line);
        context.output.show(result, |_| output)?;
        return Ok(Exit::Success);
    }
    match context.output.format {
        Format::Text => Err(task::failure(result)),
        Format::Json => context.output.show(result, |_| String::new()).map(|()| Exit::Failed),
    }
}
