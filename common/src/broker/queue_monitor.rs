//! Whether deliveries can flow. An open socket does not prove it; a delivery does, and so does the
//! broker's status of the queue.
//!
//! Every heartbeat a quiet consumer queries, over its own channel, whether the queue exists, how
//! many consumers it has and how many messages are ready. If messages are ready, the prefetch has
//! room, and twice in a row nothing is delivered, the broker has lost track of the consumer, and a
//! new one is started.
//!
//! Up to a prefetch of messages may be lost in transit without such a sign, since the broker counts
//! them as unacknowledged. So a consumer that has nothing unsettled and receives nothing for a
//! quarter of the consumer timeout is restarted as well, which makes the broker requeue them.

use std::collections::BTreeSet;
use std::fmt;
use std::time::{Duration, Instant};

use lapin::Channel;

use super::admin::{self, QueueStatus};
use super::outage::OutageLog;
use super::{BrokerError, Link};
use crate::topology::Declaration;

/// A consumer ends after this many suspicious statuses in a row. One may be chance: a message on
/// its way to the consumer, or a queue that elects its leader.
const MAX_SUSPICIONS: u32 = 2;

/// The state of a consumer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// Deliveries can flow; how long ago a delivery or the status of the queue last proved it.
    Flowing(Duration),
    /// Deliveries cannot flow, and the reason, if it is known yet. The consumer reconnects in the
    /// background.
    Down(Option<BrokerError>),
}

impl Health {
    /// Whether deliveries can flow.
    pub const fn is_flowing(&self) -> bool {
        match self {
            Self::Flowing(_) => true,
            Self::Down(_) => false,
        }
    }
}

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flowing(since) => write!(f, "flowing, as seen {} s ago", since.as_secs()),
            Self::Down(None) => f.write_str("down"),
            Self::Down(Some(error)) => write!(f, "down: {error}"),
        }
    }
}

/// The deliveries of one channel: which are unsettled, and when the last one came.
pub(super) struct DeliveryFlow {
    unsettled: BTreeSet<u64>,
    prefetch: usize,
    proven_at: Instant,
    last_delivery: Instant,
}

impl DeliveryFlow {
    pub(super) fn new(prefetch: u16) -> Self {
        let (prefetch, now) = (usize::from(prefetch), Instant::now());
        Self { unsettled: BTreeSet::new(), prefetch, proven_at: now, last_delivery: now }
    }

    /// Notes a delivery; `settles` if it has to be acknowledged.
    pub(super) fn delivered(&mut self, number: u64, settles: bool) {
        self.proven_at = Instant::now();
        self.last_delivery = self.proven_at;
        if settles {
            self.unsettled.insert(number);
        }
    }

    /// Notes a settlement, or with `multiple` that of all earlier deliveries as well.
    pub(super) fn settled(&mut self, number: u64, multiple: bool) {
        if multiple {
            self.unsettled = self.unsettled.split_off(&number.saturating_add(1));
        } else {
            self.unsettled.remove(&number);
        }
    }

    pub(super) fn unsettled(&self) -> usize {
        self.unsettled.len()
    }

    /// Whether the broker may deliver more.
    pub(super) fn has_credit(&self) -> bool {
        self.unsettled.len() < self.prefetch
    }

    /// For how long nothing was delivered; `None` while deliveries are unsettled.
    pub(super) fn idle(&self) -> Option<Duration> {
        self.unsettled.is_empty().then(|| self.last_delivery.elapsed())
    }

    /// Notes that the status of the queue has proved that deliveries can flow.
    pub(super) fn prove(&mut self) {
        self.proven_at = Instant::now();
    }

    pub(super) fn proven_at(&self) -> Instant {
        self.proven_at
    }
}

/// Assesses one consumer by the statuses of its queue.
#[derive(Default)]
pub(super) struct QueueMonitor {
    suspicions: u32,
    redeclaring: OutageLog,
}

impl QueueMonitor {
    /// Logs, once until it succeeds, why broker objects cannot be declared again. Deliveries may
    /// flow all the same. Transient errors are not logged: the consumer reports a lost connection
    /// itself.
    pub(super) fn report_redeclared(&mut self, consumer: &str, result: Result<(), BrokerError>) {
        match result {
            Ok(()) => self.redeclaring.clear(),
            Err(error) if error.is_transient() || error == BrokerError::Closed => {}
            Err(error) => {
                if self.redeclaring.is_new(&error) {
                    tracing::warn!(consumer, "the broker objects are not as declared: {error}");
                }
            }
        }
    }

    /// Assesses a status that was queried at `queried_at`; fails if the consumer is to end.
    pub(super) fn assess(
        &mut self,
        flow: &mut DeliveryFlow,
        queried_at: Instant,
        status: QueueStatus,
    ) -> Result<(), BrokerError> {
        let delivered_meanwhile = flow.proven_at() > queried_at;
        let suspicious = status.consumers == 0 || (status.ready > 0 && flow.has_credit());
        if delivered_meanwhile || !suspicious {
            self.suspicions = 0;
            flow.prove();
            return Ok(());
        }
        self.suspicions += 1;
        if self.suspicions < MAX_SUSPICIONS {
            return Ok(());
        }
        let QueueStatus { ready, consumers } = status;
        Err(BrokerError::Lost(format!(
            "{ready} messages wait in the queue and none comes ({consumers} consumers there)"
        )))
    }
}

/// Queries the status of a queue, within `limit`. Over the consumer's own channel the response also
/// proves that this channel works.
pub(super) async fn query_status(
    channel: &Channel,
    queue: &str,
    limit: Duration,
) -> Result<QueueStatus, BrokerError> {
    match tokio::time::timeout(limit, admin::queue_status(channel, queue)).await {
        Ok(status) => status,
        Err(_) => Err(BrokerError::Lost("no response on the consumer's channel".to_owned())),
    }
}

/// Declares objects again whose loss gives no error, such as a deleted binding.
///
/// Over a channel of its own, which a refusal may end.
pub(super) async fn redeclare(
    link: &Link,
    declarations: &[Declaration],
) -> Result<(), BrokerError> {
    admin::declare(&link.channel().await?, declarations).await
}

/// Of `declarations`, those that messages need to reach `queue`: the queue, its bindings, their
/// exchanges.
pub(super) fn required_for(queue: &str, declarations: &[Declaration]) -> Vec<Declaration> {
    let bound = |exchange: &str| {
        declarations.iter().any(|other| match other {
            Declaration::Binding { exchange: from, queue: to, .. } => {
                from == exchange && to == queue
            }
            Declaration::Exchange { .. } | Declaration::Queue { .. } => false,
        })
    };
    let required = declarations.iter().filter(|declaration| match declaration {
        Declaration::Exchange { name, .. } => bound(name),
        Declaration::Queue { name, .. } | Declaration::Binding { queue: name, .. } => name == queue,
    });
    required.cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::{Namespace, QueueName};
    use crate::topology::Topology;

    fn status(ready: u32, consumers: u32) -> QueueStatus {
        QueueStatus { ready, consumers }
    }

    fn assessed(flow: &mut DeliveryFlow, statuses: &[QueueStatus]) -> Vec<bool> {
        let mut monitor = QueueMonitor::default();
        let mut assess = |status| monitor.assess(flow, Instant::now(), status).is_ok();
        statuses.iter().map(|status| assess(*status)).collect()
    }

    #[test]
    fn two_statuses_in_a_row_with_ready_messages_and_no_delivery_end_a_consumer() {
        let mut flow = DeliveryFlow::new(2);
        let ready = status(5, 1);
        assert_eq!(assessed(&mut flow, &[ready, ready]), [true, false]);
        assert_eq!(assessed(&mut flow, &[ready, status(0, 1), ready]), [true, true, true]);
        assert_eq!(assessed(&mut flow, &[status(0, 0), status(0, 0)]), [true, false]);
    }

    #[test]
    fn a_consumer_with_a_full_prefetch_is_not_suspicious() {
        let mut flow = DeliveryFlow::new(2);
        (1..=2).for_each(|number| flow.delivered(number, true));
        assert_eq!(assessed(&mut flow, &[status(5, 1); 3]), [true; 3]);
        flow.settled(2, true);
        assert!(flow.has_credit());
        assert_eq!(assessed(&mut flow, &[status(5, 1); 2]), [true, false]);
    }

    #[test]
    fn a_consumer_is_idle_while_nothing_is_unsettled_and_nothing_is_delivered() {
        let mut flow = DeliveryFlow::new(2);
        assert!(flow.idle().is_some());
        flow.delivered(1, true);
        assert_eq!(flow.idle(), None);
        flow.settled(1, false);
        // A status is no delivery.
        std::thread::sleep(Duration::from_millis(5));
        flow.prove();
        assert!(flow.idle().unwrap() >= Duration::from_millis(5));
    }

    #[test]
    fn a_queue_requires_its_exchange_itself_and_its_binding() {
        let topology = Topology::new(Namespace::new("g").unwrap());
        let queue = topology.task_queue(&QueueName::default());
        let required = required_for(&queue, &topology.core());
        let names: Vec<_> = required.iter().map(Declaration::name).collect();
        assert_eq!(names, ["g.tasks", "g.tasks.default", "g.tasks.default"]);
    }
}
