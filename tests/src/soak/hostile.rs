//! 50,000 messages of strangers among sound tasks: each ends in its place, in bounded memory (promises 6
//! and 9).

use super::{figure, size};
use crate::hostile;

const MESSAGES: usize = 50_000;

#[tokio::test(flavor = "multi_thread")]
async fn fifty_thousand_messages_of_strangers_end_in_their_places() {
    let figures = hostile::run(size(MESSAGES)).await;
    figure(
        "hostile",
        &[
            ("run", figures.runs.to_string()),
            ("dead", figures.dead.to_string()),
            ("publishing", format!("{:?}", figures.publishing)),
            ("rest", format!("{:?}", figures.rest)),
            ("worker_kib", figures.worker_kib.to_string()),
            ("collector_kib", figures.collector_kib.to_string()),
        ],
    );
}
