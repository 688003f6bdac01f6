//! What the collector has at the end, by queries that any client can send.

use std::collections::HashMap;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use garenne_cli::error::CliError;
use garenne_common::TaskResult;
use garenne_common::wire::DeadSummary;
use garenne_producer::{Producer, QueryError, Totals};

use super::mix::Mix;

/// Number of ids in one query.
const PAGE: usize = 500;
/// Dead letters that are looked at one by one.
const LETTERS: usize = 1_000;
/// Concurrent queries.
const AT_ONCE: usize = 16;
/// How often a query without a response is repeated.
const TRIES: u32 = 5;

/// The final record of every task that has one, by number.
pub(super) async fn records(
    producer: &Producer,
    mix: Mix,
) -> Result<Vec<Option<TaskResult>>, CliError> {
    let mut records = vec![];
    let all: Vec<u64> = (0..mix.tasks).collect();
    for page in all.chunks(PAGE) {
        let mut found = HashMap::new();
        let mut missing = page.to_vec();
        // An answer holds as much as fits into a message; what is left is asked for again.
        while !missing.is_empty() {
            let ids = missing.iter().map(|n| mix.id(*n)).collect::<Result<Vec<_>, _>>()?;
            let answer = patiently(async || producer.results(&ids).await).await?;
            if answer.is_empty() {
                break;
            }
            let known = answer.into_iter();
            found.extend(known.filter_map(|r| Some((mix.index_of(r.id.as_str())?, r))));
            missing.retain(|n| !found.contains_key(n));
        }
        records.extend(page.iter().map(|n| found.remove(n)));
    }
    Ok(records)
}

/// The dead letters of tasks that were given up; of some of them, if there are very many.
pub(super) async fn letters(
    producer: &Producer,
    mix: Mix,
    records: &[Option<TaskResult>],
) -> Result<HashMap<u64, Option<DeadSummary>>, CliError> {
    let failed = (0..)
        .zip(records)
        .filter(|(_, record)| record.as_ref().is_some_and(|record| record.reason.is_some()));
    let asked = stream::iter(failed.take(LETTERS).map(|(n, _)| n)).map(async |n: u64| {
        let id = mix.id(n)?;
        Ok((n, patiently(async || producer.dead(&id).await).await?))
    });
    let answers: Vec<Result<_, CliError>> = asked.buffer_unordered(AT_ONCE).collect().await;
    answers.into_iter().collect()
}

pub(super) async fn totals(producer: &Producer) -> Result<Totals, CliError> {
    patiently(async || producer.totals().await).await
}

async fn patiently<T>(ask: impl AsyncFn() -> Result<T, QueryError>) -> Result<T, CliError> {
    let mut tries = 1;
    loop {
        match ask().await {
            Err(error) if error.is_transient() && tries < TRIES => {
                tries += 1;
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            done => return Ok(done?),
        }
    }
}
