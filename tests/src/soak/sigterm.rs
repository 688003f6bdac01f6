//! Workers that are told to stop at random moments, again and again (promise 8, at length).

use std::time::Duration;

use super::{figure, size};
use crate::shutdown::terminate_often;

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_sigterms_lose_nothing_and_end_in_time() {
    let took = terminate_often(size(1_000)).await;
    let (slowest, log) = took.last().expect("at least one");
    let within = took.iter().filter(|(took, _)| *took <= Duration::from_secs(2)).count();
    figure(
        "sigterm",
        &[
            ("workers", took.len().to_string()),
            ("grace", "1s".to_owned()),
            ("within_2s", within.to_string()),
            ("median", format!("{:?}", took[took.len() / 2].0)),
            ("slowest", format!("{slowest:?}")),
            ("lost", "0".to_owned()),
        ],
    );
    assert_eq!(within, took.len(), "the slowest took {slowest:?}: {log}");
}
