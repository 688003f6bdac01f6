//! Declares all broker objects of the namespace periodically, so that a delay queue or binding that was
//! deleted by mistake is restored even if its absence causes no error.

use std::time::Duration;

use garenne_common::broker::{Admin, BrokerError};
use garenne_common::failpoints::Protection;
use garenne_common::topology::Declaration;
use tokio_util::sync::CancellationToken;

/// The task that restores broker objects.
pub(crate) struct TopologyReconciler {
    pub(crate) admin: Admin,
    pub(crate) wanted: Vec<Declaration>,
    pub(crate) interval: Duration,
    pub(crate) stop: CancellationToken,
}

impl TopologyReconciler {
    /// Declares until `stop`.
    pub(crate) async fn run(self) {
        let mut last_error = None;
        loop {
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = tokio::time::sleep(self.interval) => {}
            }
            if !Protection::TopologyReconciled.is_enabled() {
                continue;
            }
            let declared = self.stop.run_until_cancelled(self.admin.declare(&self.wanted)).await;
            let Some(declared) = declared else { return };
            let failed = declared.err();
            // Consumers report lost connections. A conflict may cause no other error for days.
            if let Some(error) = failed.as_ref().filter(|error| !error.is_transient())
                && failed != last_error
                && *error != BrokerError::Closed
            {
                tracing::warn!("broker objects differ from what they should be: {error}");
            }
            last_error = failed;
        }
    }
}
