//! The collector's own view: that it responds, parked tasks, and batches in which nothing changes.

use std::time::{Duration, Instant};

use garenne_common::Timestamp;
use garenne_common::wire::{ParkedKind, Query, QuietBatch, Response, Stalled};
use garenne_producer::Producer;

use super::check::{Check, Verdict};
use crate::context::Context;
use crate::error::CliError;
use crate::times::{age, span};

pub(super) async fn collected(context: &Context, idle: Duration) -> Vec<Check> {
    let producer = match context.producer("doctor").await {
        Ok(producer) => producer,
        Err(error) => return vec![Check::bad("collector", error)],
    };
    let queried = async {
        let mut checks = vec![Check::good("collector", totals(context, &producer).await?)];
        checks.extend(stalled(context, &producer, idle).await);
        Ok(checks)
    };
    let checks = queried.await;
    context.close(producer, &checks).await;
    checks.unwrap_or_else(|error| vec![Check::bad("collector", error)])
}

async fn totals(context: &Context, producer: &Producer) -> Result<String, CliError> {
    let started = Instant::now();
    let response = context.query(producer, Query::Totals).await?;
    let Response::Totals { results, dead, batches, .. } = response else {
        return Err(CliError::unexpected_response());
    };
    let took = span(started.elapsed());
    Ok(format!("answers ({took}): {results} results, {dead} dead letters, {batches} batches"))
}

async fn stalled(context: &Context, producer: &Producer, idle: Duration) -> Vec<Check> {
    let quiet_ms = u64::try_from(idle.as_millis()).unwrap_or(u64::MAX);
    match context.query(producer, Query::Stalled { quiet_ms }).await {
        Ok(Response::Stalled { stalled: Stalled { parked, batches } }) => {
            let now = Timestamp::now();
            let parked = parked.iter().map(|kind| parked_tasks(kind, now));
            parked.chain(batches.iter().map(|batch| quiet(batch, now))).collect()
        }
        Ok(_) => vec![Check::bad("stalled", CliError::unexpected_response())],
        Err(error) => {
            let detail = format!("parked tasks and quiet batches are unknown: {}", error.message);
            vec![
                Check::new("stalled", Verdict::Odd, detail)
                    .advice("a collector of an older version does not support this query"),
            ]
        }
    }
}

fn parked_tasks(kind: &ParkedKind, now: Timestamp) -> Check {
    let ParkedKind { queue, name, tasks, since } = kind;
    let (s, no) = if *tasks == 1 { ("", "waits") } else { ("s", "wait") };
    let age = age(*since, now);
    let detail = format!(
        "{tasks} task{s} {no} for a worker of the queue {queue} that knows {name}, for {age}"
    );
    Check::new("parked", Verdict::Bad, detail).advice(format!(
        "start such a worker, and they run; list them: garenne dead list --reason unknown_task \
         --task {name}"
    ))
}

fn quiet(batch: &QuietBatch, now: Timestamp) -> Check {
    let QuietBatch { summary, changed_at } = batch;
    let id = &summary.batch;
    let ended = summary.ended();
    let counts = summary.total.map_or_else(
        || format!("{ended} tasks have ended, and it is not sealed"),
        |total| format!("{ended} of {total} tasks have ended"),
    );
    let age = age(*changed_at, now);
    let detail = format!("{id}: {counts}; nothing has changed for {age}");
    Check::new("quiet batch", Verdict::Odd, detail).advice(format!(
        "normal while long tasks run; if the tasks were lost or purged: garenne batch abandon {id}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use garenne_common::wire::{BatchState, BatchSummary};
    use garenne_common::{BatchId, QueueName, TaskName};

    #[test]
    fn parked_tasks_are_a_problem_and_a_quiet_batch_is_a_warning() {
        let (start, now) = (Timestamp::from_millis(0), Timestamp::from_millis(90_000));
        let kind = ParkedKind {
            queue: QueueName::default(),
            name: TaskName::new("image.resize").unwrap(),
            tasks: 3,
            since: start,
        };
        let check = parked_tasks(&kind, now);
        assert_eq!(check.state, Verdict::Bad);
        assert!(check.detail.contains("3 tasks wait"), "{check:?}");
        assert!(check.detail.ends_with("knows image.resize, for 1m 30s"), "{check:?}");
        let summary = BatchSummary {
            batch: BatchId::new("b-1").unwrap(),
            state: BatchState::Sealed,
            total: Some(5),
            succeeded: 2,
            failed: 1,
            cancelled: 0,
            opened_at: start,
            finished_at: None,
        };
        let check = quiet(&QuietBatch { summary, changed_at: start }, now);
        assert_eq!(check.state, Verdict::Odd);
        assert!(check.detail.contains("3 of 5 tasks have ended"), "{check:?}");
        assert!(check.advice.unwrap().ends_with("garenne batch abandon b-1"));
    }
}
