//! The model broker: exchanges and queues as `Topology` declares them, channels that can be lost.
//!
//! It does what RabbitMQ may do and no more: a message is durable once it is in a queue, and its
//! confirm may be late, out of order or lost with the channel; what a lost channel had not settled goes
//! back to its queue, marked; a queue with a TTL dead-letters its head; a message that would go in a
//! circle is dropped. It models no clustering, no alarms and no connection set-up.

use std::collections::VecDeque;
use std::sync::Arc;

use garenne_common::broker::DeliveryTag;
use garenne_common::wire::{HeaderValue, Message};

use super::channel::{Consumer, Delivery, Publisher, Sent, Settle};
use super::layout::Layout;

/// A message in a queue.
#[derive(Clone)]
pub(super) struct Stored {
    message: Arc<Message>,
    routing_key: Arc<str>,
    deliveries: i64,
    expires: Option<u64>,
}

pub(super) struct Broker {
    pub(super) layout: Arc<Layout>,
    pub(super) queues: Vec<VecDeque<Stored>>,
    pub(super) consumers: Vec<Consumer>,
    pub(super) publishers: Vec<Publisher>,
}

/// Messages that a step made durable, with their queue, for the books of the world.
pub(super) type Arrived = Vec<(usize, Arc<Message>)>;

impl Broker {
    pub(super) fn new(layout: Arc<Layout>) -> Self {
        let queues = layout.queues.iter().map(|_| VecDeque::new()).collect();
        Self { layout, queues, consumers: vec![], publishers: vec![] }
    }

    pub(super) fn name(&self, queue: usize) -> &str {
        &self.layout.queues[queue].name
    }

    /// Routes a message; empty if nothing wants it, in which case it is gone.
    pub(super) fn publish(&mut self, sent: &Sent, now: u64) -> Arrived {
        self.enqueue(&sent.exchange, &sent.routing_key, &sent.message, now)
    }

    fn enqueue(
        &mut self,
        exchange: &str,
        key: &Arc<str>,
        message: &Arc<Message>,
        now: u64,
    ) -> Arrived {
        let mut arrived = vec![];
        for queue in self.layout.route(exchange, key, message) {
            let spec = &self.layout.queues[queue];
            // The broker's rule against circles, which a republish must not run into.
            if deaths(message).is_some_and(|deaths| deaths.split(',').any(|d| d == spec.name)) {
                continue;
            }
            let own = message.properties.expiration.as_deref().and_then(|text| text.parse().ok());
            let ttl = [spec.ttl, own].into_iter().flatten().min();
            arrived.push((queue, Arc::clone(message)));
            self.queues[queue].push_back(Stored {
                message: Arc::clone(message),
                routing_key: Arc::clone(key),
                deliveries: 0,
                expires: ttl.map(|ttl: u64| now + ttl),
            });
        }
        arrived
    }

    /// When the next head of a queue expires.
    pub(super) fn next_expiry(&self) -> Option<u64> {
        self.queues.iter().filter_map(|queue| queue.front()?.expires).min()
    }

    /// A queue whose head has expired.
    pub(super) fn expired(&self, now: u64) -> Option<usize> {
        let due = |queue: &VecDeque<Stored>| {
            queue.front().and_then(|head| head.expires).is_some_and(|at| at <= now)
        };
        self.queues.iter().position(due)
    }

    /// Dead-letters the head of a queue. `keep` leaves it there too, as when the broker dies in
    /// between; `drop` loses it, as the strategy at-most-once may.
    pub(super) fn expire(&mut self, queue: usize, now: u64, keep: bool, drop: bool) -> Arrived {
        let Some(head) = self.queues[queue].front().cloned() else { return vec![] };
        if !keep {
            self.queues[queue].pop_front();
        }
        let Some(exchange) = self.layout.queues[queue].dead_letters_to.clone().filter(|_| !drop)
        else {
            return vec![];
        };
        let (mut message, name) = ((*head.message).clone(), self.name(queue).to_owned());
        let before = deaths(&message).map_or(String::new(), |deaths| format!("{deaths},"));
        message.set_header("x-death", HeaderValue::Text(format!("{before}{name}")));
        message.set_header("x-last-death-reason", HeaderValue::Text("expired".to_owned()));
        message.set_header("x-last-death-queue", HeaderValue::Text(name));
        message.properties.expiration = None;
        self.enqueue(&exchange, &head.routing_key, &Arc::new(message), now)
    }

    /// Sends the next message of its queue to a consumer; takes one of the first few.
    pub(super) fn deliver(&mut self, consumer: usize, random: &mut fastrand::Rng) -> bool {
        let consumer = &mut self.consumers[consumer];
        let queue = &mut self.queues[consumer.queue];
        let full = consumer.unacked.len() >= consumer.prefetch;
        if !consumer.up || consumer.cancelled || full || queue.is_empty() {
            return false;
        }
        let place = if random.u8(..4) == 0 { random.usize(..queue.len().min(4)) } else { 0 };
        let Some(stored) = queue.remove(place) else { return false };
        consumer.next += 1;
        let mut message = Arc::clone(&stored.message);
        if stored.deliveries > 0 {
            Arc::make_mut(&mut message)
                .set_header("x-delivery-count", HeaderValue::Int(stored.deliveries));
        }
        let tag = DeliveryTag { epoch: consumer.epoch, number: consumer.next };
        consumer.inbound.push_back(Delivery {
            tag,
            routing_key: Arc::clone(&stored.routing_key),
            redelivered: stored.deliveries > 0,
            message,
        });
        consumer.unacked.insert(tag.number, stored);
        true
    }

    /// Takes the next settling of a consumer's channel: what it is about, and whether it goes back.
    pub(super) fn settle(&mut self, index: usize) -> Result<(Vec<Arc<Message>>, bool), String> {
        let consumer = &mut self.consumers[index];
        let Some(settle) = consumer.outbound.pop_front() else { return Ok((vec![], false)) };
        let Settle { number, multiple, requeue } = settle;
        if !consumer.unacked.contains_key(&number) {
            let queue = self.name(self.consumers[index].queue);
            return Err(format!("PRECONDITION_FAILED: unknown delivery tag {number} of {queue}"));
        }
        let first = if multiple { 0 } else { number };
        let numbers: Vec<_> = consumer.unacked.range(first..=number).map(|(n, _)| *n).collect();
        let taken = numbers.iter().filter_map(|n| consumer.unacked.remove(n));
        let taken: Vec<_> = taken.collect();
        let messages = taken.iter().map(|stored| Arc::clone(&stored.message)).collect();
        if requeue {
            self.take_back(index, taken);
        }
        Ok((messages, requeue))
    }

    fn take_back(&mut self, consumer: usize, taken: Vec<Stored>) {
        let queue = &mut self.queues[self.consumers[consumer].queue];
        for mut stored in taken.into_iter().rev() {
            stored.deliveries += 1;
            queue.push_front(stored);
        }
    }

    /// A consumer's channel ends: what it had not settled goes back. Some of what was on its way has
    /// reached the client and is looked at nevertheless.
    pub(super) fn lose_consumer(&mut self, index: usize, random: &mut fastrand::Rng) {
        let consumer = &mut self.consumers[index];
        let reached = random.usize(..=consumer.inbound.len());
        consumer.inbound.truncate(reached);
        consumer.outbound.clear();
        consumer.up = false;
        let unacked = std::mem::take(&mut consumer.unacked);
        self.take_back(index, unacked.into_values().collect());
    }

    /// What a consumer holds unsettled.
    pub(super) fn held_by(&self, consumer: usize) -> Vec<Arc<Message>> {
        let held = self.consumers[consumer].unacked.values();
        held.map(|stored| Arc::clone(&stored.message)).collect()
    }

    pub(super) fn depth(&self, queue: usize) -> usize {
        let held = self.consumers.iter().filter(|consumer| consumer.queue == queue);
        self.queues[queue].len() + held.map(|consumer| consumer.unacked.len()).sum::<usize>()
    }
}

fn deaths(message: &Message) -> Option<&str> {
    match message.header("x-death") {
        Some(HeaderValue::Text(deaths)) => Some(deaths),
        _ => None,
    }
}
