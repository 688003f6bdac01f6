//! `garenne submit`: one task, and its result if wanted.

use std::time::Duration;

use clap::Args;
use garenne_common::wire::{Query, Response, TaskState};
use garenne_common::{Payload, Status, TaskId, TaskName, TaskResult};
use garenne_producer::{Handle, OutputError, Producer, Submission, SubmitError};
use serde_json::Value;
use serde_json::value::RawValue;

use super::arguments;
use super::context::{Context, goes_on};
use super::error::{CliError, Exit};
use super::options::{self, TaskOptions};
use super::output::Format;
use super::task;

const EXAMPLES: &str = "\
Examples:
  garenne submit text.count_words '{\"text\":\"to be or not\"}' --wait
  garenne submit file.sha256 '{\"path\":\"/etc/hosts\"}' --queue cpu --retries 5
  garenne submit report.send @report.json --delay 2h --expires 6h
  jq -c .job queue.json | garenne submit job.run - --id order-17

Prints the task's id, or with --wait its output (the whole result with -o json).
Exit code 1 if the task failed or was cancelled, 3 if --wait=TIME passed first.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Arguments {
    /// The task's name
    #[arg(value_name = "TASK")]
    task: TaskName,
    /// Its arguments; - reads standard input, @FILE a file [default: {}]
    #[arg(value_name = "JSON", allow_negative_numbers = true)]
    json: Option<String>,
    /// Wait for the result, as long as it takes or at most TIME
    #[arg(long, value_name = "TIME", num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = "forever", value_parser = wait_time)]
    wait: Option<Wait>,
    #[command(flatten)]
    options: TaskOptions,
    /// The task's id [default: a new one]. The same id submitted twice may run twice and ends once
    #[arg(long, value_name = "ID", help_heading = "Task options")]
    id: Option<TaskId>,
}

/// After so long without a result a person wants to know what is going on.
const SILENCE: Duration = Duration::from_secs(10);

/// How long to wait for a result.
#[derive(Debug, Clone, Copy)]
enum Wait {
    Forever,
    AtMost(Duration),
}

fn wait_time(text: &str) -> Result<Wait, String> {
    if text == "forever" { Ok(Wait::Forever) } else { options::duration(text).map(Wait::AtMost) }
}

pub(crate) async fn run(context: &Context, arguments: Arguments) -> Result<Exit, CliError> {
    // Before anything is read: a signal must end even a read of standard input.
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
        None => context.or_interrupt(detached(context, &producer, submission)).await,
        Some(wait) => waited(context, &producer, submission, wait, delay).await,
    };
    context.close(producer, &exit).await;
    exit
}

async fn read_arguments(arguments: &Arguments) -> Result<Box<RawValue>, CliError> {
    let (task, json) = (arguments.task.clone(), arguments.json.clone());
    let read = tokio::task::spawn_blocking(move || arguments::read(&task, json.as_deref()));
    read.await.map_err(|error| CliError::unusable(format!("reading the arguments: {error}")))?
}

/// A task with the options of the command line.
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

async fn detached(
    context: &Context,
    producer: &Producer,
    submission: Submission<Value>,
) -> Result<Exit, CliError> {
    let id = producer.submit_detached(submission).await?;
    context.output.show(&serde_json::json!({ "id": id }), |_| id.to_string())?;
    Ok(Exit::Success)
}

async fn waited(
    context: &Context,
    producer: &Producer,
    submission: Submission<Value>,
    wait: Wait,
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
                goes_on(context.output, "task", &format!("garenne task show {id}"));
                return Ok(exit);
            }
            () = tokio::time::sleep(SILENCE + delay), if !hinted => {
                hinted = true;
                hint(context, producer, &id).await;
            }
        }
    };
    show(context, &result)
}

/// Says what is known of a task that takes its time.
async fn hint(context: &Context, producer: &Producer, id: &TaskId) {
    let known = match context.ask(producer, Query::Task { id: id.clone() }).await {
        Ok(Response::Task { state: TaskState::Parked { letter }, .. }) => {
            format!("task {id} is parked: {}; it runs when a worker knows it", letter.error)
        }
        Ok(Response::Task { state: TaskState::Retrying { last }, .. }) => {
            format!(
                "attempt {} of task {id} failed, it is tried again: {}",
                last.attempt, last.error
            )
        }
        Ok(_) | Err(_) => format!(
            "task {id} has no result yet; `garenne doctor` checks whether workers serve its queue"
        ),
    };
    context.output.remark(known);
}

async fn ended(handle: &mut Handle<Value>, wait: Wait) -> Result<TaskResult, OutputError> {
    match wait {
        Wait::Forever => handle.ended().await.cloned(),
        Wait::AtMost(limit) => handle.ended_within(limit).await.cloned(),
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
