//! Whatever the configuration and the work, every task ends (promises 3 and 10).
//!
//! A seed decides the configuration of every process (windows, concurrency, prefetch, groups, bundles, one
//! to three workers; extremes such as 1 included), what is submitted and how, and what breaks
//! meanwhile; not the machine's timing. [`draw`] decides, [`run`] does it with real processes.
//!
//! `GARENNE_RANDOM_SEED=7` runs one seed twenty times. `make soak` runs a thousand others.

mod draw;
mod run;

use futures_util::{StreamExt, stream};

use draw::Draw;

/// Seeds of the ordinary suite.
const SEEDS: u64 = 30;
/// Tests mostly wait; each run has some processes.
const AT_ONCE: usize = 3;
/// How often a seed that is named is repeated.
const REPEATS: usize = 20;

#[tokio::test(flavor = "multi_thread")]
async fn every_task_ends_whatever_the_configuration() {
    match std::env::var("GARENNE_RANDOM_SEED") {
        Ok(seed) => {
            let seed = seed.parse().expect("GARENNE_RANDOM_SEED is a whole number");
            run_all((0..REPEATS).map(|_| seed)).await;
        }
        Err(_) => run_all(0..SEEDS).await,
    }
}

/// Runs these seeds, some at a time; fails with all that did not end.
pub(crate) async fn run_all(seeds: impl IntoIterator<Item = u64>) {
    let runs = stream::iter(seeds).map(|seed| async move {
        let draw = Draw::of(seed);
        let ended = run::run(&draw).await;
        ended.err().map(|stall| format!("{draw:#?}\n{stall}\nGARENNE_RANDOM_SEED={seed}"))
    });
    let failed: Vec<String> =
        runs.buffer_unordered(AT_ONCE).filter_map(async |run| run).collect().await;
    assert!(failed.is_empty(), "{} configurations stalled:\n{}", failed.len(), failed.join("\n\n"));
}
