//! Lines on their way to the broker: what was read together shares messages.
//!
//! What fails for the moment goes again, each line by itself. Which lines go together, and what becomes
//! of their outcomes, is not decided here.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use garenne_common::TaskId;
use garenne_producer::{Batch, Handle, SubmitError};
use serde_json::Value;

use super::Arguments;
use super::input::Line;
use crate::submit::submission;

/// The pause before a submission that failed for the moment is tried again.
const AGAIN: Duration = Duration::from_millis(500);

/// What became of a line; no handle if nobody waits for its result.
pub(crate) type Outcome = Result<Option<Handle<Value>>, SubmitError>;

/// Submits lines in as few messages as are right for them; the outcomes are in their order.
pub(crate) async fn submit(batch: &Batch, arguments: &Arguments, lines: &[Line]) -> Vec<Outcome> {
    let started = Instant::now();
    let outcomes = together(batch, arguments, lines).await;
    let lines = lines.iter().zip(outcomes);
    join_all(lines.map(|(line, outcome)| insist(batch, arguments, line, started, outcome))).await
}

async fn together(batch: &Batch, arguments: &Arguments, lines: &[Line]) -> Vec<Outcome> {
    let submissions = lines.iter();
    let submissions =
        submissions.map(|line| submission(&arguments.task, &line.args, &arguments.options));
    let Ok(submissions) = submissions.collect::<Result<Vec<_>, _>>() else {
        // A line that makes no task has this outcome alone.
        return join_all(lines.iter().map(|line| alone(batch, arguments, line, None))).await;
    };
    if arguments.detach {
        let ids = batch.submit_many_detached(submissions).await;
        ids.into_iter().map(|id| id.map(|_| None)).collect()
    } else {
        let handles = batch.submit_many(submissions).await;
        handles.into_iter().map(|handle| handle.map(Some)).collect()
    }
}

/// Tries again while the broker is away or refuses, and patience lasts. An id that may have arrived is
/// used again, so that nothing is counted twice.
async fn insist(
    batch: &Batch,
    arguments: &Arguments,
    line: &Line,
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
                tokio::time::sleep(AGAIN).await;
                outcome = alone(batch, arguments, line, id.as_ref()).await;
            }
            done => return done,
        }
    }
}

async fn alone(batch: &Batch, arguments: &Arguments, line: &Line, id: Option<&TaskId>) -> Outcome {
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
