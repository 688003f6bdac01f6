//! Other collectors of the namespace, known by their heartbeats.
//!
//! Two collectors with different stores would share the results, and neither would know all members of a
//! batch. So the one with the younger store goes into standby until the other is gone. Collectors that share
//! a store work in parallel.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use garenne_common::ProcessHealth;
use garenne_common::broker::{Consumer, Pauser};
use garenne_common::wire::CollectorHeartbeat;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::store::StoreIdentity;

/// How often silent collectors are removed.
const POLL_INTERVAL: Duration = Duration::from_millis(500);
/// Maximum number of known collectors with other stores.
const MAX_PEERS: usize = 64;

/// The problem of a collector in standby.
const OTHER_STORE: &str = "other_store";

/// The other collectors and their stores. Pure: the time is a parameter.
#[derive(Debug)]
struct Peers {
    own: StoreIdentity,
    others: HashMap<String, Peer>,
}

#[derive(Debug)]
struct Peer {
    store: StoreIdentity,
    until: Instant,
}

impl Peers {
    fn new(own: StoreIdentity) -> Self {
        Self { own, others: HashMap::new() }
    }

    /// Records a heartbeat. Returns whether it is the first of a collector with another store.
    fn record(&mut self, heartbeat: CollectorHeartbeat, now: Instant) -> bool {
        if heartbeat.store == self.own.id {
            // Its store may have changed.
            self.others.remove(&heartbeat.collector);
            return false;
        }
        let until = now + heartbeat.holds_for();
        let CollectorHeartbeat { collector, store: id, store_created: created, .. } = heartbeat;
        if self.others.len() >= MAX_PEERS && !self.others.contains_key(&collector) {
            return false;
        }
        let store = StoreIdentity { created, id };
        self.others.insert(collector, Peer { store, until }).is_none()
    }

    fn prune(&mut self, now: Instant) {
        self.others.retain(|_, peer| peer.until > now);
    }

    /// The collector with the oldest store, if that is older than our own.
    fn older(&self) -> Option<(&str, &StoreIdentity)> {
        let older = self.others.iter().min_by_key(|(_, peer)| &peer.store)?;
        (older.1.store < self.own).then_some((older.0.as_str(), &older.1.store))
    }
}

/// Receives heartbeats of other collectors, and puts this one into standby or ends that.
pub(crate) struct PeerWatch {
    pub(crate) own: StoreIdentity,
    pub(crate) heartbeats: Consumer,
    /// The consumers of messages that belong to one store only.
    pub(crate) consumers: Vec<Pauser>,
    pub(crate) standby: watch::Sender<bool>,
    pub(crate) new_peer: Arc<Notify>,
    pub(crate) health: ProcessHealth,
    pub(crate) stop: CancellationToken,
}

impl PeerWatch {
    pub(crate) async fn run(self) {
        let stop = self.stop.clone();
        stop.run_until_cancelled(self.listen()).await;
    }

    async fn listen(mut self) {
        let mut peers = Peers::new(self.own.clone());
        let mut tick = tokio::time::interval(POLL_INTERVAL);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                heartbeat = self.heartbeats.next() => {
                    let Some(delivery) = heartbeat else { return };
                    if !CollectorHeartbeat::is_one(&delivery.message) {
                        continue;
                    }
                    match CollectorHeartbeat::decode(&delivery.message) {
                        Ok(heartbeat) => if peers.record(heartbeat, Instant::now()) {
                            self.new_peer.notify_one();
                        },
                        Err(error) => tracing::debug!(%error, "invalid heartbeat"),
                    }
                }
                _ = tick.tick() => peers.prune(Instant::now()),
            }
            self.update(&peers);
        }
    }

    fn update(&self, peers: &Peers) {
        let older = peers.older();
        let standby = older.is_some();
        self.health.set(
            OTHER_STORE,
            older.map(|(collector, store)| {
                format!(
                    "not consuming: the collector {collector:?} uses another, older store ({}, created \
                     {}); configure the same store for all collectors of a namespace, or stop one of them",
                    store.id, store.created
                )
            }),
        );
        for consumer in &self.consumers {
            consumer.pause(standby);
        }
        self.standby.send_if_modified(|before| std::mem::replace(before, standby) != standby);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use garenne_common::Timestamp;

    fn store(created: u64, id: &str) -> StoreIdentity {
        StoreIdentity { created: Timestamp::from_millis(created), id: id.to_owned() }
    }

    fn heartbeat(collector: &str, store: StoreIdentity) -> CollectorHeartbeat {
        CollectorHeartbeat {
            collector: collector.to_owned(),
            version: "1".to_owned(),
            store: store.id,
            store_created: store.created,
            consuming: true,
            uncommitted: 0,
            problems: vec![],
            every_ms: 2_000,
            at: Timestamp::from_millis(0),
        }
    }

    #[test]
    fn the_younger_store_is_in_standby_while_the_older_is_alive() {
        let (mut peers, now) = (Peers::new(store(5, "m")), Instant::now());
        assert!(!peers.record(heartbeat("self", store(5, "m")), now));
        assert!(peers.record(heartbeat("younger", store(6, "a")), now));
        assert_eq!(peers.older(), None);
        assert!(peers.record(heartbeat("older", store(4, "z")), now));
        assert!(!peers.record(heartbeat("older", store(4, "z")), now), "already known");
        assert_eq!(peers.older().unwrap().0, "older");
        peers.prune(now + Duration::from_secs(6));
        assert!(peers.older().is_some());
        peers.prune(now + Duration::from_secs(7));
        assert_eq!(peers.older(), None);
    }

    #[test]
    fn of_two_stores_of_the_same_age_exactly_one_is_in_standby() {
        let now = Instant::now();
        let is_standby = |own: &str, other: &str| {
            let mut peers = Peers::new(store(5, own));
            peers.record(heartbeat("other", store(5, other)), now);
            peers.older().is_some()
        };
        assert!(is_standby("b", "a"));
        assert!(!is_standby("a", "b"));
    }
}
