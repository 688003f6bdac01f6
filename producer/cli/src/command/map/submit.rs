//! Submits lines: those that were read together share messages.
//!
//! A submission with a transient error is retried on its own. Which lines are submitted together,
//! and what happens to their outcomes, is not decided here.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use garenne_common::TaskId;
use garenne_producer::{Batch, Handle, SubmitError};
use serde_json::Value;

use super::args::MapArgs;
use super::input::NumberedLine;
use crate::command::submit::submission;

/// Pause before a submission with a transient error is retried.
const RETRY_PAUSE: Duration = Duration::from_millis(500);

/// The outcome of a line; without a handle if its result is not waited for.
pub(crate) type Outcome = Result<Option<Handle<Value>>, SubmitError>;

/// Submits lines in as few messages as suit them; the outcomes are in the order of the lines.
pub(crate) async fn submit(
    batch: &Batch,
    arguments: &MapArgs,
    lines: &[NumberedLine],
) -> Vec<Outcome> {
    let started = Instant::now();
    let outcomes = submit_together(batch, arguments, lines).await;
    let lines = lines.iter().zip(outcomes);
    join_all(lines.map(|(line, outcome)| retry(batch, arguments, line, started, outcome))).await
}

async fn submit_together(
    batch: &Batch,
    arguments: &MapArgs,
    lines: &[NumberedLine],
) -> Vec<Outcome> {
    let submissions = lines.iter();
    let submissions =
        submissions.map(|line| submission(&arguments.task, &line.args, &arguments.options));
    let Ok(submissions) = submissions.collect::<Result<Vec<_>, _>>() else {
        // Only the line that is not a valid task gets the error.
        return join_all(lines.iter().map(|line| submit_one(batch, arguments, line, None))).await;
    };
    if arguments.detach {
        let ids = batch.submit_many_detached(submissions).await;
        ids.into_iter().map(|id| id.map(|_| None)).collect()
    } else {
        let handles = batch.submit_many(submissions).await;
        handles.into_iter().map(|handle| handle.map(Some)).collect()
    }
}

/// Retries while the error is transient and `--patience` lasts. A task that may have arrived keeps
/// its id, so that it is not counted twice.
async fn retry(
    batch: &Batch,
    arguments: &MapArgs,
    line: &NumberedLine,
    started: Instant,
    mut outcome: Outcome,
) -> Outcome {
    let mut id = None;
    loop {
        match outcome {
            Err(error) if error.is_transient() && started.elapsed() < arguments.patience => {
                tracing::info!(line = line.number, "submitting again: {error}");
                if let SubmitError::Unconfirmed { id: uncertain, .. } = error {
                    id = Some(uncertain);
                }
                tokio::time::sleep(RETRY_PAUSE).await;
                outcome = submit_one(batch, arguments, line, id.as_ref()).await;
            }
            done => return done,
        }
    }
}

async fn submit_one(
    batch: &Batch,
    arguments: &MapArgs,
    line: &NumberedLine,
    id: Option<&TaskId>,
) -> Outcome {
    let mut submission = submission(&arguments.task, &line.args, &arguments.options)?;
    if let Some(id) = id {
        submission = submission.id(id.clone());
    }
    if arguments.detach {
        batch.submit_detached(submission).await.map(|_| None)
    } else {
        batch.submit(submission).await.map(Some)
    }
}
