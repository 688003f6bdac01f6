//! Declares all broker objects of the namespace again and again, so that what somebody deleted by
//! mistake is back soon even if nobody stumbles over its absence: a delay queue, a binding.

use std::time::Duration;

use garenne_common::broker::{Admin, BrokerError};
use garenne_common::failpoints::Protection;
use garenne_common::topology::Declaration;
use tokio_util::sync::CancellationToken;

pub(crate) struct Keeper {
    pub(crate) admin: Admin,
    pub(crate) wanted: Vec<Declaration>,
    pub(crate) every: Duration,
    pub(crate) stop: CancellationToken,
}

impl Keeper {
    /// Keeps until it is told to stop.
    pub(crate) async fn run(self) {
        let mut trouble = None;
        loop {
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = tokio::time::sleep(self.every) => {}
            }
            if !Protection::TopologyReconciled.is_enabled() {
                continue;
            }
            let declared = self.stop.run_until_cancelled(self.admin.declare(&self.wanted)).await;
            let Some(declared) = declared else { return };
            let failed = declared.err();
            // A lost connection is its consumers' to tell; a conflict nobody else may meet for days.
            if let Some(error) = failed.as_ref().filter(|error| !error.is_transient())
                && failed != trouble
                && *error != BrokerError::Closed
            {
                tracing::warn!("the broker objects are not as they should be: {error}");
            }
            trouble = failed;
        }
    }
}
