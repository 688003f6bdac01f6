//! Says every few seconds that the collector is alive, whose store it fills, and what is wrong with it.
//! Best effort, over a publisher of its own: what the broker forbids or has lost of heartbeats ends
//! that channel and not the one that answers and notices take.

use std::sync::Arc;
use std::time::Duration;

use garenne_common::broker::{Outgoing, Publisher};
use garenne_common::wire::CollectorHeartbeat;
use garenne_common::{ProcessHealth, Timestamp, VERSION};
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::pipeline::Progress;
use crate::store::StoreIdentity;

/// How often, unless there is news.
pub(crate) const PERIOD: Duration = Duration::from_secs(2);
/// Heartbeats that wait for the broker; more are left out.
pub(crate) const WINDOW: usize = 4;

/// What a collector says of itself.
pub(crate) struct Beat {
    pub(crate) publisher: Publisher,
    pub(crate) exchange: String,
    pub(crate) collector: String,
    pub(crate) store: StoreIdentity,
    pub(crate) progress: Arc<Progress>,
    pub(crate) health: ProcessHealth,
    /// Whether the collector stands back for an older store.
    pub(crate) standby: watch::Receiver<bool>,
    /// Somebody who does not know us was heard.
    pub(crate) news: Arc<Notify>,
    pub(crate) stop: CancellationToken,
}

impl Beat {
    /// Says it at once, then again and again, and whenever there is news.
    pub(crate) async fn run(mut self) {
        let mut tick = tokio::time::interval(PERIOD);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = self.stop.cancelled() => return,
                _ = tick.tick() => {}
                () = self.news.notified() => {}
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
            every_ms: u32::try_from(PERIOD.as_millis()).unwrap_or(u32::MAX),
            at: Timestamp::now(),
        }
    }
}
