//! `garenne cancel`: requests the cancellation of tasks or of a batch, and prints what became of
//! it.

use std::time::Duration;

use clap::Args;
use garenne_common::wire::{BatchSummary, CancelState, Cancelled};
use garenne_common::{BatchId, Status, TaskId};
use garenne_producer::{BatchCancelled, Producer};
use serde::Serialize;
use tokio::time::{Instant, sleep};

use crate::context::Context;
use crate::error::{CliError, Exit};
use crate::options;
use crate::output::Paint;

const EXAMPLES: &str = "\
Examples:
  garenne cancel 0192f0c1-7a55-7e22-9c53-1f8e3a1d4b6a
  garenne cancel order-17 order-18 --reason 'wrong month'
  garenne cancel --batch 0192f0c1-9c53-7e22-7a55-1f8e3a1d4b6a

Printed for each task:
  cancelled  the task ended as cancelled
  too late   the task had ended before; its result stays
  requested  the collector keeps the cancel request until a worker applies it:
             to a queued task when a worker takes it, to a delayed one when it
             is due, to a running one within worker.cancel_grace (5s)

A cancel request survives restarts of workers and the collector. A handler is
notified by ctx.cancelled(), a command by SIGTERM and later SIGKILL to its
process group. A task that succeeds before it reacts has succeeded. Repeating a
cancel request is harmless. One for a batch also covers tasks added later.

Exit codes: 0 every task is cancelled or will be; 1 it was too late for one.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct CancelArgs {
    /// The tasks' ids
    #[arg(value_name = "ID", required_unless_present = "batch", conflicts_with = "batch")]
    ids: Vec<TaskId>,
    /// Cancel all tasks of this batch instead
    #[arg(long, value_name = "ID")]
    batch: Option<BatchId>,
    /// The reason, which becomes the error of the results
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    /// Wait at most this long for running tasks to end
    #[arg(long, value_name = "TIME", default_value = "3s", value_parser = options::duration)]
    wait: Duration,
}

/// The JSON output for tasks.
#[derive(Serialize)]
struct CancelledTasks<'a> {
    cancelled: usize,
    too_late: usize,
    requested: usize,
    tasks: &'a [Cancelled],
}

/// The JSON output for a batch.
#[derive(Serialize)]
struct CancelledBatch<'a> {
    state: CancelState,
    batch: &'a BatchId,
    /// Tasks that have not ended yet; unknown until the batch is sealed.
    open: Option<u64>,
    summary: Option<&'a BatchSummary>,
}

pub(crate) async fn run(context: &Context, arguments: CancelArgs) -> Result<Exit, CliError> {
    context.or_interrupt(cancel(context, arguments)).await
}

async fn cancel(context: &Context, arguments: CancelArgs) -> Result<Exit, CliError> {
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
    arguments: &CancelArgs,
) -> Result<Exit, CliError> {
    let CancelArgs { ids, reason, wait, .. } = arguments;
    let tasks = producer.cancel_tasks(ids, reason.as_deref(), *wait).await?;
    let count = |state| tasks.iter().filter(|task| task.state == state).count();
    let shown = CancelledTasks {
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
            format!("{}  {id}  applied when a worker takes it", paint.yellow("requested"))
        }
    }
}

async fn batch(
    context: &Context,
    producer: &Producer,
    id: &BatchId,
    arguments: &CancelArgs,
) -> Result<Exit, CliError> {
    let BatchCancelled { state, mut batch } =
        producer.cancel_batch(id, arguments.reason.as_deref()).await?;
    let by = Instant::now() + arguments.wait;
    while batch.as_ref().is_some_and(|batch| open(batch) != Some(0)) && Instant::now() < by {
        sleep(Duration::from_millis(200)).await;
        batch = producer.batch_status(id).await?.map(|status| status.summary);
    }
    let open = batch.as_ref().and_then(open);
    let shown = CancelledBatch { state, batch: id, open, summary: batch.as_ref() };
    context.output.show(&shown, |paint| describe(&shown, paint))?;
    Ok(if state == CancelState::TooLate { Exit::Failed } else { Exit::Success })
}

/// The number of members that have not ended, if it is known.
fn open(batch: &BatchSummary) -> Option<u64> {
    Some(batch.total?.saturating_sub(batch.ended()))
}

fn describe(shown: &CancelledBatch<'_>, paint: Paint) -> String {
    let id = shown.batch;
    let counts = shown.summary.map_or_else(
        || "the collector does not know the batch yet".to_owned(),
        |batch| {
            let open = shown.open.map_or("more may be added".to_owned(), |open| {
                if open == 0 {
                    "all have ended".to_owned()
                } else {
                    format!("{open} not ended yet")
                }
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
    fn each_outcome_has_its_own_line() {
        let id = TaskId::new("t-1").unwrap();
        let requested = line(&Cancelled::requested(id.clone()), Paint::plain());
        assert!(requested.starts_with("requested  t-1  applied when"), "{requested}");
        let at = Timestamp::from_millis(0);
        let late = line(&Cancelled::ended(id.clone(), Status::Succeeded, at), Paint::plain());
        assert_eq!(late, "too late   t-1  it succeeded at 1970-01-01T00:00:00Z");
        let cancelled = line(&Cancelled::ended(id, Status::Cancelled, at), Paint::plain());
        assert_eq!(cancelled, "cancelled  t-1");
    }
}
