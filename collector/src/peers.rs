//! Other collectors of the namespace, by their heartbeats. Two that fill two stores would share the
//! results between them, and neither would ever know all of a batch: the one with the younger store
//! stands back until the other is gone. Collectors that share a store get on well.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use garenne_common::ProcessHealth;
use garenne_common::broker::{Consumer, Pauser};
use garenne_common::wire::CollectorHeartbeat;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::store::StoreIdentity;

/// How often it looks who was not heard of for too long.
const LOOK: Duration = Duration::from_millis(500);
/// Collectors with other stores that are kept in mind.
const MOST: usize = 64;

/// The problem of a collector that stands back.
const OTHER_STORE: &str = "other_store";

/// Who else fills a store, and which store that is. Pure: the caller says how late it is.
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

    /// Takes a heartbeat in; whether it is the first of a collector with another store.
    fn hear(&mut self, heartbeat: CollectorHeartbeat, now: Instant) -> bool {
        if heartbeat.store == self.own.id {
            // It may have changed its store.
            self.others.remove(&heartbeat.collector);
            return false;
        }
        let until = now + heartbeat.holds_for();
        let CollectorHeartbeat { collector, store: id, store_created: created, .. } = heartbeat;
        if self.others.len() >= MOST && !self.others.contains_key(&collector) {
            return false;
        }
        let store = StoreIdentity { created, id };
        self.others.insert(collector, Peer { store, until }).is_none()
    }

    fn prune(&mut self, now: Instant) {
        self.others.retain(|_, peer| peer.until > now);
    }

    /// The collector with the oldest store, if that is older than ours.
    fn elder(&self) -> Option<(&str, &StoreIdentity)> {
        let elder = self.others.iter().min_by_key(|(_, peer)| &peer.store)?;
        (elder.1.store < self.own).then_some((elder.0.as_str(), &elder.1.store))
    }
}

/// Listens to the others and lets this collector stand back, or begin again.
pub(crate) struct Neighbours {
    pub(crate) own: StoreIdentity,
    pub(crate) heartbeats: Consumer,
    /// Consumers of what belongs to one store only.
    pub(crate) consumers: Vec<Pauser>,
    pub(crate) standby: watch::Sender<bool>,
    pub(crate) news: Arc<Notify>,
    pub(crate) health: ProcessHealth,
    pub(crate) stop: CancellationToken,
}

impl Neighbours {
    pub(crate) async fn run(self) {
        let stop = self.stop.clone();
        stop.run_until_cancelled(self.listen()).await;
    }

    async fn listen(mut self) {
        let mut peers = Peers::new(self.own.clone());
        let mut tick = tokio::time::interval(LOOK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                heartbeat = self.heartbeats.next() => {
                    let Some(delivery) = heartbeat else { return };
                    if !CollectorHeartbeat::is_one(&delivery.message) {
                        continue;
                    }
                    match CollectorHeartbeat::decode(&delivery.message) {
                        Ok(heartbeat) => if peers.hear(heartbeat, Instant::now()) {
                            self.news.notify_one();
                        },
                        Err(error) => tracing::debug!(%error, "a heartbeat cannot be read"),
                    }
                }
                _ = tick.tick() => peers.prune(Instant::now()),
            }
            self.judge(&peers);
        }
    }

    fn judge(&self, peers: &Peers) {
        let elder = peers.elder();
        let standby = elder.is_some();
        self.health.set(
            OTHER_STORE,
            elder.map(|(collector, store)| {
                format!(
                    "not consuming: the collector {collector:?} fills another, older store ({}, made \
                     {}); give all collectors of a namespace one store, or stop one of them",
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
    fn the_younger_store_stands_back_while_the_older_is_heard_of() {
        let (mut peers, now) = (Peers::new(store(5, "m")), Instant::now());
        assert!(!peers.hear(heartbeat("self", store(5, "m")), now));
        assert!(peers.hear(heartbeat("younger", store(6, "a")), now));
        assert_eq!(peers.elder(), None);
        assert!(peers.hear(heartbeat("older", store(4, "z")), now));
        assert!(!peers.hear(heartbeat("older", store(4, "z")), now), "known already");
        assert_eq!(peers.elder().unwrap().0, "older");
        peers.prune(now + Duration::from_secs(6));
        assert!(peers.elder().is_some());
        peers.prune(now + Duration::from_secs(7));
        assert_eq!(peers.elder(), None);
    }

    #[test]
    fn of_two_stores_of_one_moment_exactly_one_stands_back() {
        let now = Instant::now();
        let stands_back = |own: &str, other: &str| {
            let mut peers = Peers::new(store(5, own));
            peers.hear(heartbeat("other", store(5, other)), now);
            peers.elder().is_some()
        };
        assert!(stands_back("b", "a"));
        assert!(!stands_back("a", "b"));
    }
}
