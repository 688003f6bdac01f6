//! What a collector does at the moment, as log lines: what is gathered, stored and still to be sent.

use std::sync::Arc;

use garenne_common::ProcessHealth;
use garenne_common::broker::Settler;
use garenne_common::service::telemetry;

use crate::outlets::Outlets;
use crate::pipeline::Progress;
use crate::store::{Backlog, Store, Waiting, WeakStore};

/// Reports the state of a running collector.
#[derive(Clone)]
pub struct CollectorState {
    /// Weak, since the last handle of a store closes it.
    pub(crate) store: WeakStore,
    pub(crate) outlets: Outlets,
    pub(crate) health: ProcessHealth,
    pub(crate) progress: Arc<Progress>,
    /// What is consumed, by name.
    pub(crate) settlers: Vec<(&'static str, Settler)>,
}

impl CollectorState {
    /// Logs the state: a line for the collector, one for each consumer, and one for the outboxes, for
    /// which the store is asked.
    pub async fn log(&self) {
        let (gathered, committed) = self.progress.groups();
        let last_commit = self.progress.last_commit().map(|at| at.to_string());
        let publishing = self.outlets.trouble().map(|trouble| trouble.to_string());
        tracing::info!(
            groups_gathered = gathered,
            groups_committed = committed,
            groups_waiting = gathered.saturating_sub(committed),
            last_commit,
            to_publish = self.outlets.queued(),
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
