//! `garenne map`: one task per line, as one batch, results in the order of the lines.
//!
//! Streaming: a window of tasks is under way at once, and nothing but that window is held in memory.
//! How lines are read is in [`input`], how they reach the broker in [`submit`](mod@submit), how results
//! find their order in [`order`], what a person sees meanwhile in [`progress`], and the loop that holds
//! it together in [`pump`].

mod input;
mod order;
mod progress;
mod pump;
mod submit;

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use garenne_common::TaskName;
use garenne_producer::{Batch, Producer};
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;

use super::context::{Context, goes_on};
use super::error::{CliError, Exit};
use super::options::{self, TaskOptions};
use input::{AHEAD, Line, Receiver, Shape, Source};
use pump::{Halt, Pump};

const EXAMPLES: &str = "\
Examples:
  garenne map text.count_words --arg text < lines.txt
  find /srv/data -type f -print0 | garenne map file.sha256 --arg path --null
  garenne map job.run jobs.jsonl --retries 5 --timeout 2m --failures-only
  id=$(garenne map job.run jobs.jsonl --detach) && garenne batch wait \"$id\"

Prints one JSON object per line of input, in the order of the input:
  {\"line\":1,\"id\":\"0192…\",\"status\":\"succeeded\",\"output\":4}
  {\"line\":2,\"id\":\"0192…\",\"status\":\"failed\",\"error\":\"…\",\"reason\":\"fatal\",…}

File tasks need workers that may read there, such as garenne-worker
--file-root /srv/data.

Lines that are read together share messages; with producer.bundle_tasks = 1
each has its own.

Empty lines are skipped. Text is taken as it is; a line that is not UTF-8 or
ends as on Windows is refused. A file is checked whole before anything is
submitted.
Standard input is not: at a line that cannot be read no more is submitted, what
was submitted before is finished, and the exit code is 2. Otherwise exit code 0
means that all succeeded, 1 that some did not.

Ctrl-C stops submitting. What was submitted goes on, and `garenne batch show ID`
shows how it stands.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of the command line")]
pub(crate) struct Arguments {
    /// The name of the tasks
    #[arg(value_name = "TASK")]
    task: TaskName,
    /// One task per line, its arguments as JSON [default: standard input]
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
    /// Lines are plain text: each becomes the arguments {"NAME": line}
    #[arg(long, value_name = "NAME")]
    arg: Option<String>,
    /// Lines end with a zero byte and may hold line breaks: the names of `find -print0`
    #[arg(long, short = '0')]
    null: bool,
    /// Print results as they come, not in the order of the input
    #[arg(long)]
    unordered: bool,
    /// Print only what did not succeed
    #[arg(long)]
    failures_only: bool,
    /// Only submit, and print the batch's id
    #[arg(long, conflicts_with_all = ["unordered", "failures_only"])]
    detach: bool,
    /// How many tasks may be under way at once; bounds the memory
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..))]
    window: u64,
    /// How long to go on trying to submit when the broker is away
    #[arg(long, value_name = "TIME", default_value = "2m", value_parser = options::duration)]
    patience: Duration,
    #[command(flatten)]
    options: TaskOptions,
}

pub(crate) async fn run(context: &Context, arguments: Arguments) -> Result<Exit, CliError> {
    let reader = TaskTracker::new();
    let (total, producer, mut lines) = tokio::select! {
        prepared = prepare(context, &arguments, &reader) => prepared?,
        exit = context.stop.requested() => return Ok(exit),
    };
    // No tasks, no batch: so the first line comes first.
    let opened = async {
        let Some(first) = lines.recv().await.transpose()? else { return Ok(None) };
        Ok(Some((first, open(context, &producer).await?)))
    };
    let opened = tokio::select! {
        opened = opened => opened,
        exit = context.stop.requested() => return Ok(exit),
    };
    let exit = match opened {
        Ok(Some((first, batch))) => {
            let pump = Pump::new(context, &arguments, &producer, total);
            submit(context, &arguments, pump, batch, first, lines).await
        }
        Ok(None) => {
            context.output.remark("the input has no lines, so there are no tasks");
            Ok(Exit::Success)
        }
        Err(error) => Err(error),
    };
    context.close(producer, &exit).await;
    exit
}

/// Checks the input, connects, and starts reading.
async fn prepare(
    context: &Context,
    arguments: &Arguments,
    reader: &TaskTracker,
) -> Result<(Option<u64>, Producer, Receiver), CliError> {
    let shape = Shape { key: arguments.arg.clone(), null: arguments.null };
    let source = Source::new(arguments.file.clone());
    let total = source.check(&shape).await?;
    // A long job outlives a restart of the broker: what is under way then is sent again.
    let mut config = context.config.clone();
    config.broker.publish_timeout = arguments.patience;
    let producer = context.producer_with(&config, "map").await?;
    let (to, lines) = mpsc::channel(AHEAD);
    reader.spawn(source.open(shape).await?.feed(to));
    Ok((total, producer, lines))
}

/// Opens the batch. At this first contact nobody wants to be patient.
async fn open(context: &Context, producer: &Producer) -> Result<Batch, CliError> {
    match tokio::time::timeout(context.deadline, producer.batch()).await {
        Ok(batch) => Ok(batch?),
        Err(_) => Err(CliError::unusable(format!(
            "RabbitMQ did not take the first message within {:?}",
            context.deadline
        ))
        .help(
            "has it a memory or disk alarm? its management UI and log name it; `garenne doctor`",
        )),
    }
}

async fn submit(
    context: &Context,
    arguments: &Arguments,
    mut pump: Pump<'_>,
    batch: Batch,
    first: Line,
    lines: Receiver,
) -> Result<Exit, CliError> {
    let id = batch.id().clone();
    let fed = pump.feed(&batch, first, lines).await;
    // Sealed as soon as its members are known, not when they have ended: should this process be
    // killed while it waits, the batch is complete all the same.
    let limit = if fed.is_ok() { arguments.patience } else { context.deadline };
    let sealed = seal(context, batch, limit).await;
    let ended = match (fed, sealed) {
        (Ok(()), Ok(())) if arguments.detach => Ok(()),
        (Ok(()), Ok(())) => pump.drain().await,
        (Err(halt), _) => Err(halt),
        (Ok(()), Err(error)) => Err(Halt::Error(error)),
    };
    let look = format!("garenne batch show {id}");
    match ended {
        Ok(()) if arguments.detach => {
            pump.clear();
            context.output.show(&serde_json::json!({ "batch": id }), |_| id.to_string())?;
        }
        Ok(()) => pump.finish(id.as_str()),
        Err(halt) => {
            pump.abandon(id.as_str(), &halt);
            return match halt {
                Halt::Stop(exit) => {
                    goes_on(context.output, "batch", &look);
                    Ok(exit)
                }
                Halt::Error(error) if error.help.is_none() => {
                    Err(error.help(format!("what was submitted goes on: {look}")))
                }
                Halt::Error(error) => Err(error),
            };
        }
    }
    Ok(pump.verdict())
}

async fn seal(context: &Context, batch: Batch, limit: Duration) -> Result<(), CliError> {
    match tokio::time::timeout(limit, batch.seal()).await {
        Ok(sealed) => Ok(sealed.map(drop)?),
        Err(_) => Err(context.unreachable().into()),
    }
}
