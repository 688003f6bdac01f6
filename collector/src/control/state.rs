//! Logs the state of a collector: gathered groups, the last commit, messages to publish.

use std::sync::Arc;

use garenne_common::ProcessHealth;
use garenne_common::broker::Settler;
use garenne_common::service::telemetry;

use crate::ingest::IngestProgress;
use crate::outbox::publishers::Publishers;
use crate::store::{Backlog, Store, Waiting, WeakStore};

/// Logs the state of a running collector on request.
#[derive(Clone)]
pub struct CollectorState {
    /// Weak, since dropping the last handle closes the store.
    pub(crate) store: WeakStore,
    pub(crate) publishers: Publishers,
    pub(crate) health: ProcessHealth,
    pub(crate) progress: Arc<IngestProgress>,
    /// The settler of each consumer, with its name.
    pub(crate) settlers: Vec<(&'static str, Settler)>,
}

impl CollectorState {
    /// Logs one line for the collector, one for each problem and consumer, and one for the outboxes, which
    /// reads the store.
    pub async fn log(&self) {
        let (gathered, committed) = self.progress.groups();
        let last_commit = self.progress.last_commit().map(|at| at.to_string());
        let publishing = self.publishers.trouble().map(|trouble| trouble.to_string());
        tracing::info!(
            groups_gathered = gathered,
            groups_committed = committed,
            groups_waiting = gathered.saturating_sub(committed),
            last_commit,
            to_publish = self.publishers.queued(),
            not_publishing = publishing,
            lost_log_lines = telemetry::lost_lines(),
            "state of the collector"
        );
        for problem in self.health.problems() {
            tracing::info!(problem = problem.code, since = %problem.since, "state: {}", problem.detail);
        }
        for (consumer, settler) in &self.settlers {
            let (health, unsettled) = (settler.health(), settler.unsettled());
            tracing::info!(consumer, %health, unsettled, "state: consumer");
        }
        let Some(store) = self.store.upgrade() else { return };
        match store.backlog().await {
            Ok(Backlog { notices, resends }) => {
                let count = |waiting: Option<Waiting>| waiting.map_or(0, |waiting| waiting.count);
                let (notices, resends) = (count(notices), count(resends));
                tracing::info!(notices, resends, "state: outboxes");
            }
            Err(error) => tracing::warn!("state: the outboxes cannot be read: {error}"),
        }
    }
}
