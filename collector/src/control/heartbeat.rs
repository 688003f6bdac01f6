//! Publishes heartbeats: that the collector is alive, which store it uses, and its problems.
//!
//! Best effort, with a publisher of its own: heartbeats that the broker refuses close that channel and not
//! that of responses.

use std::sync::Arc;
use std::time::Duration;

use garenne_common::broker::{Outgoing, Publisher};
use garenne_common::wire::CollectorHeartbeat;
use garenne_common::{ProcessHealth, Timestamp, VERSION};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::ingest::IngestProgress;
use crate::store::StoreIdentity;

/// Interval of heartbeats.
pub(crate) const INTERVAL: Duration = Duration::from_secs(2);
/// Maximum number of unconfirmed heartbeats; further ones are skipped.
pub(crate) const WINDOW: usize = 4;

/// The task that publishes heartbeats.
pub(crate) struct HeartbeatTask {
    pub(crate) publisher: Publisher,
    pub(crate) exchange: String,
    pub(crate) collector: String,
    pub(crate) store: StoreIdentity,
    pub(crate) progress: Arc<IngestProgress>,
    pub(crate) health: ProcessHealth,
    /// Whether the collector is in standby because of an older store.
    pub(crate) standby: watch::Receiver<bool>,
    /// Another collector has appeared, which does not know this one.
    pub(crate) new_peer: Arc<Notify>,
    pub(crate) stop: CancellationToken,
}

impl HeartbeatTask {
    /// Publishes a heartbeat at once, then periodically, and after changes.
    pub(crate) async fn run(mut self) {
        let mut tick = tokio::time::interval(INTERVAL);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = self.stop.cancelled() => return,
                _ = tick.tick() => {}
                () = self.new_peer.notified() => {}
                changed = self.standby.changed() => if changed.is_err() { return },
            }
            let message = self.heartbeat().encode();
            let exchange = self.exchange.clone();
            let outgoing = Outgoing { exchange, routing_key: String::new(), message };
            if !self.publisher.offer(outgoing) {
                tracing::debug!("no room for a heartbeat");
            }
        }
    }

    fn heartbeat(&self) -> CollectorHeartbeat {
        CollectorHeartbeat {
            collector: self.collector.clone(),
            version: VERSION.to_owned(),
            store: self.store.id.clone(),
            store_created: self.store.created,
            consuming: !*self.standby.borrow(),
            uncommitted: self.progress.uncommitted().deliveries,
            problems: self.health.problems(),
            every_ms: u32::try_from(INTERVAL.as_millis()).unwrap_or(u32::MAX),
            at: Timestamp::now(),
        }
    }
}
