//! What every process of a schedule stands on: chance, the clock, the broker, the store, the books.

use std::sync::Arc;

use garenne_common::Timestamp;
use garenne_common::broker::Outgoing;
use garenne_common::topology::Topology;
use garenne_common::wire::Message;

use super::books::{Books, number};
use super::broker::{Arrived, Broker};
use super::channel::{Consumer, Publisher};
use super::ledger::Store;
use super::mutation::Mutation;

pub(super) struct Env {
    pub(super) random: fastrand::Rng,
    /// Milliseconds since 1970.
    pub(super) now: u64,
    pub(super) topology: Arc<Topology>,
    pub(super) broker: Broker,
    pub(super) store: Store,
    pub(super) books: Books,
    /// The mistake that is planted in this schedule.
    pub(super) mutation: Option<Mutation>,
    /// No more faults.
    pub(super) calm: bool,
    /// What happened, if somebody wants to read it.
    pub(super) trace: Option<Vec<String>>,
}

impl Env {
    pub(super) fn at(&self) -> Timestamp {
        Timestamp::from_millis(self.now)
    }

    pub(super) fn is(&self, mutation: Mutation) -> bool {
        self.mutation == Some(mutation)
    }

    /// One chance in so many, and none when it is calm.
    pub(super) fn unlucky(&mut self, one_in: u32) -> bool {
        !self.calm && self.random.u32(..one_in) == 0
    }

    pub(super) fn note(&mut self, what: impl FnOnce(&Self) -> String) {
        if self.trace.is_some() {
            let line = format!("{:>7} {}", self.now % 10_000_000, what(self));
            self.trace.iter_mut().for_each(|trace| trace.push(line.clone()));
        }
    }

    pub(super) fn consume(&mut self, queue: &str, prefetch: usize) -> usize {
        let queue = self.broker.layout.queue(queue);
        self.broker.consumers.push(Consumer::new(queue, prefetch));
        self.broker.consumers.len() - 1
    }

    pub(super) fn publisher(&mut self) -> usize {
        self.broker.publishers.push(Publisher::new());
        self.broker.publishers.len() - 1
    }

    pub(super) fn send(&mut self, publisher: usize, outgoing: Outgoing) -> u64 {
        self.broker.publishers[publisher].send(outgoing, true)
    }

    /// Sends what nobody waits for.
    pub(super) fn send_and_forget(&mut self, publisher: usize, outgoing: Outgoing) {
        self.broker.publishers[publisher].send(outgoing, false);
    }

    /// The broker's next step with a consumer: it delivers, or reads what the consumer settles.
    pub(super) fn serve_consumer(&mut self, index: usize) -> Result<bool, String> {
        if self.broker.consumers[index].has_outbound() && self.random.bool() {
            return self.read_settling(index);
        }
        if self.broker.deliver(index, &mut self.random) {
            return Ok(true);
        }
        if self.broker.consumers[index].has_outbound() {
            return self.read_settling(index);
        }
        if !self.broker.consumers[index].up && self.random.bool() {
            self.note(|_| format!("consumer {index} connects again"));
            self.broker.consumers[index].reconnect();
            return Ok(true);
        }
        Ok(false)
    }

    fn read_settling(&mut self, index: usize) -> Result<bool, String> {
        let (messages, back) = self.broker.settle(index)?;
        let queue = self.broker.consumers[index].queue;
        for message in &messages {
            if back {
                self.books.returned(message);
            } else {
                self.books.gone(self.broker.name(queue), message, &self.store)?;
            }
        }
        self.note(|env| {
            let labels: Vec<_> = messages.iter().map(|message| label(message)).collect();
            let fate = if back { "takes back" } else { "forgets" };
            format!("{} {fate} {}", env.broker.name(queue), labels.join(", "))
        });
        Ok(true)
    }

    /// The broker reads the next message of a publisher.
    pub(super) fn serve_publisher(&mut self, index: usize) -> Result<bool, String> {
        let publisher = &mut self.broker.publishers[index];
        if !publisher.up {
            if self.random.bool() {
                return Ok(false);
            }
            for message in publisher.reconnect() {
                self.books.may_double(message);
            }
            self.note(|_| format!("publisher {index} connects again"));
            return Ok(true);
        }
        if !publisher.has_wire() {
            return Ok(false);
        }
        let refuse = self.unlucky(8);
        if let Some(sent) = self.broker.publishers[index].read(refuse) {
            let arrived = self.broker.publish(&sent, self.now);
            self.arrived(arrived)?;
        }
        Ok(true)
    }

    pub(super) fn arrived(&mut self, arrived: Arrived) -> Result<(), String> {
        for (queue, message) in arrived {
            let name = self.broker.name(queue);
            self.books.durable(name, &message)?;
            if name == "listener" {
                self.books.notice(&message, &self.store)?;
            }
            self.note(|env| format!("{} has {}", env.broker.name(queue), label(&message)));
        }
        Ok(())
    }

    pub(super) fn confirm(&mut self, publisher: usize) -> Option<(u64, bool)> {
        self.broker.publishers[publisher].confirm(&mut self.random)
    }

    /// A consumer's channel ends; with its process, nothing of it is left.
    pub(super) fn lose_consumer(&mut self, index: usize, with_process: bool) {
        let held = self.broker.held_by(index);
        for message in &held {
            self.books.returned(message);
        }
        self.broker.lose_consumer(index, &mut self.random);
        if with_process {
            self.broker.consumers[index].inbound.clear();
            self.broker.consumers[index].cancelled = true;
        }
    }

    pub(super) fn lose_publisher(&mut self, index: usize) -> Result<(), String> {
        // Some of what was on the wire arrives, and its confirm does not.
        while self.broker.publishers[index].has_wire() && self.random.bool() {
            if let Some(sent) = self.broker.publishers[index].read(false) {
                let arrived = self.broker.publish(&sent, self.now);
                self.arrived(arrived)?;
            }
        }
        self.broker.publishers[index].lose();
        Ok(())
    }
}

/// What to call a message. Not by its id: those that workers give are new each time.
pub(super) fn label(message: &Message) -> String {
    let kind = message.properties.kind.as_deref().unwrap_or("something");
    match number(message) {
        Some(number) => format!("task {number}"),
        None => kind.to_owned(),
    }
}
