//! A thousand random configurations (`GARENNE_RANDOM_FROM` says from which seed on).

use std::time::Instant;

use super::{figure, size};
use crate::random_configurations::run_all;

#[tokio::test(flavor = "multi_thread")]
async fn every_task_ends_in_a_thousand_configurations() {
    let from = std::env::var("GARENNE_RANDOM_FROM").ok();
    let from = from.map_or(1_000, |text| text.parse::<u64>().expect("a whole number"));
    let (count, begun) = (size(1_000), Instant::now());
    run_all(from..from + count as u64).await;
    figure(
        "random_configurations",
        &[("seeds", format!("{from}+{count}")), ("seconds", begun.elapsed().as_secs().to_string())],
    );
}
