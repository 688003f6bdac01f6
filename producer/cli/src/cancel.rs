//! `garenne cancel`: ends tasks that are not needed any more, wherever they are.

use std::time::Duration;

use clap::Args;
use garenne_common::wire::{BatchSummary, CancelState, Cancelled};
use garenne_common::{BatchId, Status, TaskId};
use garenne_producer::{BatchCancelled, Producer};
use serde::Serialize;
use tokio::time::{Instant, sleep};

use super::context::Context;
use super::error::{CliError, Exit};
use super::options;
use super::output::Paint;

const EXAMPLES: &str = "\
Examples:
  garenne cancel 0192f0c1-7a55-7e22-9c53-1f8e3a1d4b6a
  garenne cancel order-17 order-18 --reason 'wrong month'
  garenne cancel --batch 0192f0c1-9c53-7e22-7a55-1f8e3a1d4b6a

What it answers for each task:
  cancelled  it ended as cancelled
  too late   it had ended before; its result stands
  requested  the collector keeps the wish, and whoever meets the task ends it:
             a queued task when a worker takes it, a delayed one when it is due,
             a running one after at most worker.cancel_grace (5s)

A wish survives restarts of workers and collector. A handler hears of it by
ctx.cancelled(), a command by SIGTERM and later SIGKILL to its process group.
A task that succeeds before it heeds the wish has succeeded. Asking again is
harmless. A batch's wish also covers tasks that are added to it later.

Exit code 0 if every task is cancelled or will be, 1 if it was too late for one.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Arguments {
    /// The tasks' ids
    #[arg(value_name = "ID", required_unless_present = "batch", conflicts_with = "batch")]
    ids: Vec<TaskId>,
    /// Cancel all tasks of this batch instead
    #[arg(long, value_name = "ID")]
    batch: Option<BatchId>,
    /// Why; the results carry it as their error
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    /// Wait at most so long for running tasks to end
    #[arg(long, value_name = "TIME", default_value = "3s", value_parser = options::duration)]
    wait: Duration,
}

/// What programs get to read.
#[derive(Serialize)]
struct Shown<'a> {
    cancelled: usize,
    too_late: usize,
    requested: usize,
    tasks: &'a [Cancelled],
}

#[derive(Serialize)]
struct ShownBatch<'a> {
    state: CancelState,
    batch: &'a BatchId,
    /// Tasks that have not ended yet; unknown before the batch is sealed.
    open: Option<u64>,
    summary: Option<&'a BatchSummary>,
}

pub(crate) async fn run(context: &Context, arguments: Arguments) -> Result<Exit, CliError> {
    let producer = context.producer("cancel").await?;
    let done = match &arguments.batch {
        Some(id) => batch(context, &producer, id, &arguments).await,
        None => tasks(context, &producer, &arguments).await,
    };
    context.close(producer, &done).await;
    done
}

async fn tasks(
    context: &Context,
    producer: &Producer,
    arguments: &Arguments,
) -> Result<Exit, CliError> {
    let Arguments { ids, reason, wait, .. } = arguments;
    let tasks = producer.cancel_tasks(ids, reason.as_deref(), *wait).await?;
    let count = |state| tasks.iter().filter(|task| task.state == state).count();
    let shown = Shown {
        cancelled: count(CancelState::Cancelled),
        too_late: count(CancelState::TooLate),
        requested: count(CancelState::Requested),
        tasks: &tasks,
    };
    context.output.show(&shown, |paint| {
        tasks.iter().map(|task| line(task, paint)).collect::<Vec<_>>().join("\n")
    })?;
    Ok(if shown.too_late > 0 { Exit::Failed } else { Exit::Success })
}

fn line(task: &Cancelled, paint: Paint) -> String {
    let id = &task.id;
    match task.state {
        CancelState::Cancelled => format!("{}  {id}", paint.green("cancelled")),
        CancelState::TooLate => {
            let how = task.status.map_or("ended", Status::as_str);
            let at = task.finished_at.map(|at| format!(" at {at}")).unwrap_or_default();
            format!("{}   {id}  it {how}{at}", paint.red("too late"))
        }
        CancelState::Requested => {
            format!("{}  {id}  takes effect when a worker meets it", paint.yellow("requested"))
        }
    }
}

async fn batch(
    context: &Context,
    producer: &Producer,
    id: &BatchId,
    arguments: &Arguments,
) -> Result<Exit, CliError> {
    let BatchCancelled { state, mut batch } =
        producer.cancel_batch(id, arguments.reason.as_deref()).await?;
    let by = Instant::now() + arguments.wait;
    while batch.as_ref().is_some_and(|batch| open(batch) != Some(0)) && Instant::now() < by {
        sleep(Duration::from_millis(200)).await;
        batch = producer.batch_status(id).await?.map(|status| status.summary);
    }
    let open = batch.as_ref().and_then(open);
    let shown = ShownBatch { state, batch: id, open, summary: batch.as_ref() };
    context.output.show(&shown, |paint| describe(&shown, paint))?;
    Ok(if state == CancelState::TooLate { Exit::Failed } else { Exit::Success })
}

/// How many members have not ended, if that can be known.
fn open(batch: &BatchSummary) -> Option<u64> {
    Some(batch.total?.saturating_sub(batch.ended()))
}

fn describe(shown: &ShownBatch<'_>, paint: Paint) -> String {
    let id = shown.batch;
    let counts = shown.summary.map_or_else(
        || "the collector has heard of no task of it yet".to_owned(),
        |batch| {
            let open = shown.open.map_or("others may follow".to_owned(), |open| {
                if open == 0 { "none is left".to_owned() } else { format!("{open} not ended yet") }
            });
            let BatchSummary { succeeded, failed, cancelled, .. } = batch;
            format!("{cancelled} cancelled, {succeeded} succeeded, {failed} failed, {open}")
        },
    );
    let word = match (shown.state, shown.open) {
        (CancelState::TooLate, _) => paint.red("too late"),
        (_, Some(0)) => paint.green("cancelled"),
        (CancelState::Requested | CancelState::Cancelled, _) => paint.yellow("requested"),
    };
    format!("{word}  batch {id}: {counts}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use garenne_common::Timestamp;

    #[test]
    fn each_answer_says_what_comes_of_it() {
        let id = TaskId::new("t-1").unwrap();
        let requested = line(&Cancelled::requested(id.clone()), Paint::plain());
        assert!(requested.starts_with("requested  t-1  takes effect"), "{requested}");
        let at = Timestamp::from_millis(0);
        let late = line(&Cancelled::ended(id.clone(), Status::Succeeded, at), Paint::plain());
        assert_eq!(late, "too late   t-1  it succeeded at 1970-01-01T00:00:00Z");
        let cancelled = line(&Cancelled::ended(id, Status::Cancelled, at), Paint::plain());
        assert_eq!(cancelled, "cancelled  t-1");
    }
}
