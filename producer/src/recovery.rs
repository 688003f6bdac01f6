//! Asks the collector for results whose replies may be lost, so that no handle hangs for that.
//!
//! One question at a time, and each id with growing pauses: however many handles wait, the collector
//! looks up at most one slice at once for this process.

use std::time::Duration;

use garenne_common::failpoints::Protection;
use garenne_common::wire::Query;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::ask::{ASK_DEADLINE, Asker, MOST_IDS};

/// How often somebody looks who is due.
const TICK: Duration = Duration::from_millis(500);

/// Runs until `stop`.
pub(crate) async fn run(asker: Asker, stop: CancellationToken) {
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let turn = async {
            tick.tick().await;
            ask_for_what_is_due(&asker).await;
        };
        if stop.run_until_cancelled(turn).await.is_none() {
            return;
        }
    }
}

async fn ask_for_what_is_due(asker: &Asker) {
    loop {
        let due = asker.replies().due(MOST_IDS);
        if due.is_empty() || !Protection::RecoveryQueries.is_enabled() {
            return;
        }
        let count = due.len();
        let known = due.iter().filter_map(|(id, of)| Some((id.clone(), (*of)?)));
        let fingerprints = known.collect();
        let ids = due.into_iter().map(|(id, _)| id).collect();
        // The results in the answer find their handles on the way in, as those of any reply do.
        if let Err(error) = asker.ask(&Query::Results { ids, fingerprints }, ASK_DEADLINE).await {
            // They are due again later. Replies may well come without a collector.
            tracing::debug!(%error, count, "asked in vain for results");
            return;
        }
    }
}
