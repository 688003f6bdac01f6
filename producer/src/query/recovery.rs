//! Queries the collector for results whose replies may be lost, so that no handle waits forever.
//!
//! Due ids come from the outstanding tasks; results in the response reach their handles like those
//! of any reply. One query is under way at a time, and each id is asked for at growing intervals:
//! however many handles wait, the collector looks up at most one slice at a time for this process.

use std::time::Duration;

use garenne_common::failpoints::Protection;
use garenne_common::wire::Query;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::client::{MAX_IDS, QUERY_TIMEOUT, QueryClient};

/// How often due ids are looked for.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// Runs until `stop`.
pub(crate) async fn run(client: QueryClient, stop: CancellationToken) {
    let mut tick = tokio::time::interval(POLL_INTERVAL);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let turn = async {
            tick.tick().await;
            query_due_results(&client).await;
        };
        if stop.run_until_cancelled(turn).await.is_none() {
            return;
        }
    }
}

async fn query_due_results(client: &QueryClient) {
    loop {
        let due = client.replies().due(MAX_IDS);
        if due.is_empty() || !Protection::RecoveryQueries.is_enabled() {
            return;
        }
        let count = due.len();
        let known = due.iter().filter_map(|(id, of)| Some((id.clone(), (*of)?)));
        let fingerprints = known.collect();
        let ids = due.into_iter().map(|(id, _)| id).collect();
        let query = Query::Results { ids, fingerprints };
        // The reply router gives the results in the response to their handles.
        if let Err(error) = client.send(&query, QUERY_TIMEOUT).await {
            // They are due again later. Without a collector, replies may still arrive.
            tracing::debug!(%error, count, "results query failed");
            return;
        }
    }
}
