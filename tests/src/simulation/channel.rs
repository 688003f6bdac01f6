//! Channels of the model: what is between a client and the broker, and lost with the connection.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use garenne_common::broker::{DeliveryTag, Outgoing};
use garenne_common::wire::Message;

use super::broker::Stored;

/// A delivery on its way to a client, or in its hands.
pub(super) struct Delivery {
    pub(super) tag: DeliveryTag,
    pub(super) routing_key: Arc<str>,
    pub(super) redelivered: bool,
    pub(super) message: Arc<Message>,
}

/// What a client wants done with its deliveries.
pub(super) struct Settle {
    pub(super) number: u64,
    pub(super) multiple: bool,
    pub(super) requeue: bool,
}

/// A consumer: both ends of its channel and what is between them.
pub(super) struct Consumer {
    pub(super) queue: usize,
    pub(super) up: bool,
    pub(super) cancelled: bool,
    pub(super) inbound: VecDeque<Delivery>,
    pub(super) prefetch: usize,
    pub(super) epoch: u64,
    pub(super) next: u64,
    pub(super) unacked: BTreeMap<u64, Stored>,
    pub(super) outbound: VecDeque<Settle>,
}

impl Consumer {
    pub(super) fn new(queue: usize, prefetch: usize) -> Self {
        Self {
            queue,
            up: true,
            cancelled: false,
            inbound: VecDeque::new(),
            prefetch,
            epoch: 1,
            next: 0,
            unacked: BTreeMap::new(),
            outbound: VecDeque::new(),
        }
    }

    /// The client sends an acknowledgement, unless the channel of the delivery is gone.
    pub(super) fn ack(&mut self, tag: DeliveryTag, multiple: bool, check_epoch: bool) {
        if self.up && (tag.epoch == self.epoch || !check_epoch) {
            self.outbound.push_back(Settle { number: tag.number, multiple, requeue: false });
        }
    }

    /// The client hands a delivery back, unless its channel is gone.
    pub(super) fn requeue(&mut self, tag: DeliveryTag) {
        if self.up && tag.epoch == self.epoch {
            let number = tag.number;
            self.outbound.push_back(Settle { number, multiple: false, requeue: true });
        }
    }

    pub(super) fn reconnect(&mut self) {
        self.up = true;
        self.epoch += 1;
        self.next = 0;
    }

    pub(super) fn has_outbound(&self) -> bool {
        self.up && !self.outbound.is_empty()
    }

    pub(super) fn is_idle(&self) -> bool {
        self.inbound.is_empty() && self.outbound.is_empty()
    }
}

/// A message on its way to the broker.
#[derive(Clone)]
pub(super) struct Sent {
    pub(super) message: Arc<Message>,
    pub(super) exchange: Arc<str>,
    pub(super) routing_key: Arc<str>,
    /// Whether anybody waits for the confirm.
    waits: bool,
}

/// A publisher as `common::broker::Publisher` is one: what is not confirmed goes again over the next
/// channel, and what nobody waits for does not.
pub(super) struct Publisher {
    pub(super) up: bool,
    jobs: BTreeMap<u64, Sent>,
    last: u64,
    wire: VecDeque<u64>,
    confirms: Vec<u64>,
}

impl Publisher {
    pub(super) fn new() -> Self {
        let (jobs, wire, confirms) = (BTreeMap::new(), VecDeque::new(), vec![]);
        Self { up: true, jobs, last: 0, wire, confirms }
    }

    /// `waits`: whether anybody waits for the confirm.
    pub(super) fn send(&mut self, outgoing: Outgoing, waits: bool) -> u64 {
        let Outgoing { exchange, routing_key, message } = outgoing;
        let (exchange, routing_key) = (exchange.into(), routing_key.into());
        let message = Arc::new(message);
        self.last += 1;
        self.jobs.insert(self.last, Sent { message, exchange, routing_key, waits });
        if self.up {
            self.wire.push_back(self.last);
        }
        self.last
    }

    /// How many messages are not confirmed.
    pub(super) fn len(&self) -> usize {
        self.jobs.len()
    }

    /// Nobody waits any more; what is on the wire may arrive all the same.
    pub(super) fn withdraw(&mut self, number: u64) {
        if let Some(sent) = self.jobs.get_mut(&number) {
            sent.waits = false;
        }
    }

    /// The broker reads the next message; `refuse` makes it say no, and the client tries again.
    pub(super) fn read(&mut self, refuse: bool) -> Option<Sent> {
        let number = self.wire.pop_front()?;
        let sent = self.jobs.get(&number)?;
        if refuse && sent.waits {
            self.wire.push_back(number);
            return None;
        }
        self.confirms.push(number);
        Some(sent.clone())
    }

    /// A confirm reaches the client, whichever comes first: of which message, which also says whether
    /// anybody waits for it.
    pub(super) fn confirm(&mut self, random: &mut fastrand::Rng) -> Option<(u64, bool)> {
        if self.confirms.is_empty() {
            return None;
        }
        let number = self.confirms.swap_remove(random.usize(..self.confirms.len()));
        Some((number, self.jobs.remove(&number).is_some_and(|sent| sent.waits)))
    }

    pub(super) fn lose(&mut self) {
        self.up = false;
        self.wire.clear();
        self.confirms.clear();
        self.jobs.retain(|_, sent| sent.waits);
    }

    /// A new channel; what is sent over it again.
    pub(super) fn reconnect(&mut self) -> impl Iterator<Item = &Message> {
        self.up = true;
        self.wire = self.jobs.keys().copied().collect();
        self.jobs.values().map(|sent| &*sent.message)
    }

    pub(super) fn has_wire(&self) -> bool {
        !self.wire.is_empty()
    }
}
