//! Whether deliveries can flow: an open socket is no proof of it, a delivery is, and so is the broker's
//! own word on the queue.
//!
//! A consumer that hears nothing asks, every heartbeat, over its own channel: is the queue there, has
//! it consumers, does anything wait? If something waits, we could take it, and twice in a row nothing
//! comes, the broker has forgotten us, and the consumer is built anew.
//!
//! Up to a prefetch of messages may be lost between the broker and us without such a sign: the broker
//! counts them as delivered. So a consumer that has nothing and gets nothing for a quarter of the
//! broker's consumer timeout is built anew as well, which gives them back.

use std::collections::BTreeSet;
use std::fmt;
use std::time::{Duration, Instant};

use lapin::Channel;

use super::admin::{self, QueueStatus};
use super::{BrokerError, Link};
use crate::topology::Declaration;

/// So many suspicious answers in a row end a consumer. One may be chance: a message that is on its way
/// here, a queue that elects its leader.
const SUSPICIOUS: u32 = 2;

/// How a consumer stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// Deliveries can flow; shown so long ago by a delivery or by the broker's answer.
    Flowing(Duration),
    /// They cannot, and why, if that is known yet. It is being worked on.
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

/// What one channel has delivered and not yet seen settled.
pub(super) struct Flow {
    unsettled: BTreeSet<u64>,
    prefetch: usize,
    proven: Instant,
    last_delivery: Instant,
}

impl Flow {
    pub(super) fn new(prefetch: u16) -> Self {
        let (prefetch, now) = (usize::from(prefetch), Instant::now());
        Self { unsettled: BTreeSet::new(), prefetch, proven: now, last_delivery: now }
    }

    pub(super) fn delivered(&mut self, number: u64, settles: bool) {
        self.proven = Instant::now();
        self.last_delivery = self.proven;
        if settles {
            self.unsettled.insert(number);
        }
    }

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

    /// Whether the broker may send more.
    pub(super) fn has_credit(&self) -> bool {
        self.unsettled.len() < self.prefetch
    }

    /// For how long nothing has come; `None` while something is here.
    pub(super) fn idle(&self) -> Option<Duration> {
        self.unsettled.is_empty().then(|| self.last_delivery.elapsed())
    }

    pub(super) fn prove(&mut self) {
        self.proven = Instant::now();
    }

    pub(super) fn proven(&self) -> Instant {
        self.proven
    }
}

/// Judges one consumer by the broker's answers.
#[derive(Default)]
pub(super) struct Watch {
    suspicions: u32,
    /// Why the broker objects could not be declared again, the last time.
    unkept: Option<BrokerError>,
}

impl Watch {
    /// Says once what is wrong with the broker objects and does not keep deliveries from flowing.
    pub(super) fn kept(&mut self, consumer: &str, kept: Result<(), BrokerError>) {
        let unkept =
            kept.err().filter(|error| !error.is_transient() && *error != BrokerError::Closed);
        if let Some(error) = unkept.as_ref().filter(|_| unkept != self.unkept) {
            tracing::warn!(consumer, "the broker objects are not as they should be: {error}");
        }
        self.unkept = unkept;
    }

    /// What an answer means that was asked for at `asked`; an error ends the consumer.
    pub(super) fn judge(
        &mut self,
        flow: &mut Flow,
        asked: Instant,
        answer: QueueStatus,
    ) -> Result<(), BrokerError> {
        let delivered_meanwhile = flow.proven() > asked;
        let forgotten = answer.consumers == 0 || (answer.ready > 0 && flow.has_credit());
        if delivered_meanwhile || !forgotten {
            self.suspicions = 0;
            flow.prove();
            return Ok(());
        }
        self.suspicions += 1;
        if self.suspicions < SUSPICIOUS {
            return Ok(());
        }
        let QueueStatus { ready, consumers } = answer;
        Err(BrokerError::Lost(format!(
            "{ready} messages wait in the queue and none comes ({consumers} consumers there)"
        )))
    }
}

/// The broker's word on a queue, within `limit`; over the consumer's own channel, so that the answer
/// also shows that this channel is alive.
pub(super) async fn ask(
    channel: &Channel,
    queue: &str,
    limit: Duration,
) -> Result<QueueStatus, BrokerError> {
    match tokio::time::timeout(limit, admin::queue_status(channel, queue)).await {
        Ok(answer) => answer,
        Err(_) => Err(BrokerError::Lost("no answer on the consumer's channel".to_owned())),
    }
}

/// Declares again what would be missed without a sound: a binding that somebody deleted.
///
/// Over a channel of its own, which a refusal may end.
pub(super) async fn keep(link: &Link, wanted: &[Declaration]) -> Result<(), BrokerError> {
    admin::declare(&link.channel().await?, wanted).await
}

/// Of `declarations`, those that messages to `queue` need: the queue, its bindings, their exchanges.
pub(super) fn way_to(queue: &str, declarations: &[Declaration]) -> Vec<Declaration> {
    let bound = |exchange: &str| {
        declarations.iter().any(|other| match other {
            Declaration::Binding { exchange: from, queue: to, .. } => {
                from == exchange && to == queue
            }
            Declaration::Exchange { .. } | Declaration::Queue { .. } => false,
        })
    };
    let wanted = declarations.iter().filter(|declaration| match declaration {
        Declaration::Exchange { name, .. } => bound(name),
        Declaration::Queue { name, .. } | Declaration::Binding { queue: name, .. } => name == queue,
    });
    wanted.cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::{Namespace, QueueName};
    use crate::topology::Topology;

    fn status(ready: u32, consumers: u32) -> QueueStatus {
        QueueStatus { ready, consumers }
    }

    fn verdicts(flow: &mut Flow, answers: &[QueueStatus]) -> Vec<bool> {
        let mut watch = Watch::default();
        answers.iter().map(|answer| watch.judge(flow, Instant::now(), *answer).is_ok()).collect()
    }

    #[test]
    fn two_answers_in_a_row_that_something_waits_and_nothing_comes_end_a_consumer() {
        let mut flow = Flow::new(2);
        let waits = status(5, 1);
        assert_eq!(verdicts(&mut flow, &[waits, waits]), [true, false]);
        assert_eq!(verdicts(&mut flow, &[waits, status(0, 1), waits]), [true, true, true]);
        assert_eq!(verdicts(&mut flow, &[status(0, 0), status(0, 0)]), [true, false]);
    }

    #[test]
    fn a_full_worker_is_no_forgotten_one() {
        let mut flow = Flow::new(2);
        (1..=2).for_each(|number| flow.delivered(number, true));
        assert_eq!(verdicts(&mut flow, &[status(5, 1); 3]), [true; 3]);
        flow.settled(2, true);
        assert!(flow.has_credit());
        assert_eq!(verdicts(&mut flow, &[status(5, 1); 2]), [true, false]);
    }

    #[test]
    fn idle_is_who_has_nothing_and_gets_nothing() {
        let mut flow = Flow::new(2);
        assert!(flow.idle().is_some());
        flow.delivered(1, true);
        assert_eq!(flow.idle(), None);
        flow.settled(1, false);
        // The broker's word is no delivery.
        std::thread::sleep(Duration::from_millis(5));
        flow.prove();
        assert!(flow.idle().unwrap() >= Duration::from_millis(5));
    }

    #[test]
    fn the_way_to_a_queue_is_its_exchange_itself_and_its_binding() {
        let topology = Topology::new(Namespace::new("g").unwrap());
        let queue = topology.task_queue(&QueueName::default());
        let way = way_to(&queue, &topology.core());
        let names: Vec<_> = way.iter().map(Declaration::name).collect();
        assert_eq!(names, ["g.tasks", "g.tasks.default", "g.tasks.default"]);
    }
}
