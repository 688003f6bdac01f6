//! `garenne batch`: shows a batch, waits for its end, or ends it as abandoned.

use std::convert::Infallible;
use std::time::Duration;

use clap::{Args, Subcommand};
use comfy_table::Color;
use garenne_common::wire::{BatchState, BatchStatus, BatchSummary, Query, Response};
use garenne_common::{BatchId, DeadReason, TaskResult, Timestamp};
use garenne_producer::Producer;

use crate::context::{Context, remark_still_running};
use crate::error::{CliError, Exit};
use crate::options;
use crate::output::{Paint, cell, facts, keep_whole, rendered, table};
use crate::times::{age, span};

/// When the first remark about a batch that is waited for is printed; the pauses between later ones
/// double.
const FIRST_REMARK: Duration = Duration::from_secs(5);
const LONGEST_PAUSE: Duration = Duration::from_mins(1);

const EXAMPLES: &str = "\
Examples:
  garenne batch show 0192f0c1-7a55-7e22-9c53-1f8e3a1d4b6a
  garenne batch wait 0192f0c1-7a55-7e22-9c53-1f8e3a1d4b6a --timeout 10m
  garenne batch abandon 0192f0c1-7a55-7e22-9c53-1f8e3a1d4b6a

A batch is open while its producer adds tasks, then sealed, then done when all
its tasks have ended. `abandon` ends a batch whose tasks will never end because
they were purged or lost with their queue; it exits with 1 if the batch was done
already. `show` and `abandon` exit with 3 if the collector does not know the
batch. `wait` exits with 0 when every task succeeded, with 1 when one did not or
the batch was abandoned, with 3 when --timeout passed first.";

#[derive(Debug, Subcommand)]
#[command(after_help = EXAMPLES)]
pub(crate) enum BatchCommand {
    /// Show the counts of a batch and the tasks that failed last
    #[command(after_help = EXAMPLES)]
    Show {
        /// The batch's id
        id: BatchId,
    },
    /// Wait until every task of a batch has ended
    #[command(after_help = EXAMPLES)]
    Wait(BatchWaitArgs),
    /// End a batch as abandoned because its tasks were purged or lost
    #[command(after_help = EXAMPLES)]
    Abandon {
        /// The batch's id
        id: BatchId,
    },
}

#[derive(Debug, Args)]
pub(crate) struct BatchWaitArgs {
    /// The batch's id
    id: BatchId,
    /// Wait at most this long [default: without limit]
    #[arg(long, value_name = "TIME", value_parser = options::duration)]
    timeout: Option<Duration>,
}

pub(crate) async fn run(context: &Context, command: BatchCommand) -> Result<Exit, CliError> {
    match command {
        BatchCommand::Show { id } => context.or_interrupt(show(context, &id)).await,
        BatchCommand::Abandon { id } => context.or_interrupt(abandon(context, &id)).await,
        BatchCommand::Wait(arguments) => wait(context, &arguments).await,
    }
}

async fn show(context: &Context, id: &BatchId) -> Result<Exit, CliError> {
    let status = status(context, "batch show", id, Query::Batch { id: id.clone() }).await?;
    context.output.show(&status, |paint| describe(&status, paint))?;
    Ok(Exit::Success)
}

/// The batch is named by its id, so no confirmation is asked for, as for single dead letters.
async fn abandon(context: &Context, id: &BatchId) -> Result<Exit, CliError> {
    let query = Query::AbandonBatch { id: id.clone() };
    let status = status(context, "batch abandon", id, query).await?;
    context.output.show(&status, |paint| describe(&status, paint))?;
    let abandoned = status.summary.state == BatchState::Abandoned;
    Ok(if abandoned { Exit::Success } else { Exit::Failed })
}

async fn status(
    context: &Context,
    command: &str,
    id: &BatchId,
    query: Query,
) -> Result<BatchStatus, CliError> {
    let producer = context.producer(command).await?;
    let response = context.query(&producer, query).await;
    context.close(producer, &response).await;
    let Response::Batch { batch } = response? else { return Err(CliError::unexpected_response()) };
    let Some(status) = batch else {
        return Err(CliError::unusable(format!("the collector does not know a batch {id}"))
            .exit(Exit::NotYet)
            .help(
                "check the id and --namespace; a collector that was just started may still be \
                   catching up",
            ));
    };
    Ok(status)
}

async fn wait(context: &Context, arguments: &BatchWaitArgs) -> Result<Exit, CliError> {
    let (id, output) = (&arguments.id, context.output);
    let producer = tokio::select! {
        producer = context.producer("batch wait") => producer?,
        exit = context.stop.requested() => return Ok(exit),
    };
    let done = async {
        match arguments.timeout {
            Some(limit) => producer.wait_batch_timeout(id, limit).await,
            None => producer.wait_batch(id).await,
        }
    };
    let summary = tokio::select! {
        done = done => done,
        never = remark_progress(context, &producer, id) => match never {},
        exit = context.stop.requested() => {
            remark_still_running(output, "batch", &format!("garenne batch show {id}"));
            return Ok(exit);
        }
    };
    let summary = summary.map_err(CliError::from);
    context.close(producer, &summary).await;
    let summary = summary?;
    output.show(&summary, |paint| counts(&summary, None, paint))?;
    Ok(if all_succeeded(&summary) { Exit::Success } else { Exit::Failed })
}

/// Prints remarks about what is waited for, at growing intervals.
async fn remark_progress(context: &Context, producer: &Producer, id: &BatchId) -> Infallible {
    let mut pause = FIRST_REMARK;
    loop {
        tokio::time::sleep(pause).await;
        pause = (2 * pause).min(LONGEST_PAUSE);
        // An error is not printed here: the wait for the batch reports it in the end.
        let response = context.query(producer, Query::Batch { id: id.clone() }).await;
        let Ok(Response::Batch { batch: status }) = response else { continue };
        if status.as_ref().is_none_or(|status| !status.summary.state.is_final()) {
            context.output.remark(progress(id, status.as_ref(), Timestamp::now()));
        }
    }
}

fn progress(id: &BatchId, status: Option<&BatchStatus>, now: Timestamp) -> String {
    let Some(BatchStatus { summary, changed_at, parked, .. }) = status else {
        return format!("waiting: the collector does not know the batch {id} yet");
    };
    let ended = summary.ended();
    let what = match (summary.state, summary.total) {
        (BatchState::Open, _) => {
            format!("waiting for the producer to seal the batch; {ended} tasks have ended so far")
        }
        (_, Some(total)) => {
            format!("waiting for {} of {total} tasks", total.saturating_sub(ended))
        }
        (_, None) => format!("waiting; {ended} tasks have ended"),
    };
    let quiet = changed_at
        .map_or(String::new(), |at| format!("; the last change was {} ago", age(at, now)));
    match parked {
        0 => format!("{what}{quiet}; if they were purged or lost: garenne batch abandon {id}"),
        _ => format!(
            "{what}{quiet}; {parked} of them are parked because no worker of their queue knows \
             their name: garenne dead list --batch {id}"
        ),
    }
}

/// Whether a batch is done and all its tasks have succeeded.
pub(crate) fn all_succeeded(summary: &BatchSummary) -> bool {
    summary.state == BatchState::Done && summary.failed == 0 && summary.cancelled == 0
}

fn describe(status: &BatchStatus, paint: Paint) -> String {
    let mut text = counts(&status.summary, status.changed_at, paint);
    if !status.failures.is_empty() {
        text.push_str("\n\n");
        text.push_str(&failures(&status.failures, paint));
    }
    text
}

fn counts(summary: &BatchSummary, changed_at: Option<Timestamp>, paint: Paint) -> String {
    let state = match summary.state {
        BatchState::Done if all_succeeded(summary) => paint.green("done"),
        BatchState::Done => paint.yellow("done"),
        BatchState::Open => "open: its producer may still add tasks".to_owned(),
        BatchState::Sealed => "sealed: all tasks are submitted".to_owned(),
        BatchState::Abandoned => paint.red("abandoned: not sealed in time, or by `batch abandon`"),
    };
    let total = summary.total.map_or("unknown until the batch is sealed".to_owned(), |total| {
        let missing = total.saturating_sub(summary.ended());
        if missing == 0 { total.to_string() } else { format!("{total}, {missing} not ended") }
    });
    let failed = summary.failed.to_string();
    let took = summary
        .finished_at
        .map(|at| format!("{at} ({} after it was opened)", span(at.since(summary.opened_at))));
    let changed = changed_at.filter(|_| !summary.state.is_final());
    let changed = changed.map(|at| format!("{at} ({} ago)", age(at, Timestamp::now())));
    facts(&[
        ("batch", Some(summary.batch.to_string())),
        ("state", Some(state)),
        ("members", Some(members(&summary.batch).to_owned())),
        ("tasks", Some(total)),
        ("succeeded", Some(summary.succeeded.to_string())),
        ("failed", Some(if summary.failed > 0 { paint.red(&failed) } else { failed })),
        ("cancelled", Some(summary.cancelled.to_string()).filter(|_| summary.cancelled > 0)),
        ("opened", Some(summary.opened_at.to_string())),
        ("changed", changed),
        ("ended", took),
    ])
}

/// Who can add members to a batch.
fn members(batch: &BatchId) -> &'static str {
    if batch.has_key() {
        "only from its producer, which has the key"
    } else {
        "from anyone who knows the id"
    }
}

fn failures(results: &[TaskResult], paint: Paint) -> String {
    let mut table = table(["TASK", "REASON", "ERROR"], paint);
    keep_whole(&mut table, 1);
    for result in results {
        let reason = result.reason.map_or(result.status.as_str(), DeadReason::as_str);
        table.add_row([
            cell(&result.id, None, paint),
            cell(reason, Some(Color::Yellow), paint),
            cell(result.error.as_deref().unwrap_or_default(), None, paint),
        ]);
    }
    rendered(&table)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(state: BatchState, total: Option<u64>, failed: u64) -> BatchSummary {
        BatchSummary {
            batch: BatchId::new("b").unwrap(),
            state,
            total,
            succeeded: 2,
            failed,
            cancelled: 0,
            opened_at: Timestamp::from_millis(0),
            finished_at: state.is_final().then(|| Timestamp::from_millis(90_000)),
        }
    }

    #[test]
    fn an_abandoned_batch_has_not_succeeded() {
        assert!(all_succeeded(&summary(BatchState::Done, Some(2), 0)));
        assert!(!all_succeeded(&summary(BatchState::Done, Some(3), 1)));
        assert!(!all_succeeded(&summary(BatchState::Abandoned, None, 0)));
    }

    #[test]
    fn a_remark_says_what_is_waited_for_and_how_to_end_the_batch() {
        let (id, now) = (BatchId::new("b").unwrap(), Timestamp::from_millis(130_000));
        let remark = |state, total, parked| {
            let (summary, at) = (summary(state, total, 1), Timestamp::from_millis(10_000));
            let changed_at = Some(at);
            let status = BatchStatus { summary, failures: vec![], changed_at, parked };
            progress(&id, Some(&status), now)
        };
        let sealed = remark(BatchState::Sealed, Some(10), 0);
        assert!(
            sealed.starts_with("waiting for 7 of 10 tasks; the last change was 2m"),
            "{sealed}"
        );
        assert!(sealed.ends_with("garenne batch abandon b"), "{sealed}");
        let open = remark(BatchState::Open, None, 0);
        assert!(open.contains("to seal the batch; 3 tasks have ended so far"), "{open}");
        let parked = remark(BatchState::Sealed, Some(10), 7);
        assert!(parked.contains("; 7 of them are parked"), "{parked}");
        assert!(progress(&id, None, now).contains("does not know the batch b yet"));
    }

    #[test]
    fn counts_include_missing_tasks_and_the_duration() {
        let text = counts(&summary(BatchState::Sealed, Some(10), 1), None, Paint::plain());
        assert!(text.contains("tasks      10, 7 not ended"), "{text}");
        let text = counts(&summary(BatchState::Done, Some(3), 1), None, Paint::plain());
        assert!(text.contains("tasks      3\n"), "{text}");
        assert!(text.contains("(1m 30s after it was opened)"), "{text}");
    }
}
