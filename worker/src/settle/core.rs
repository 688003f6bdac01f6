//! The state machine of settling. Settlements and confirms go in; messages to publish, acknowledgements
//! and requeues come out. No IO.
//!
//! Results are published in bundles. While one bundle waits for its confirm, the next one is filled. So an
//! idle worker publishes at once, and a busy one publishes many results per message, without a timer.
//!
//! Room at the publisher is an input ([`SettleCore::next_message`]): messages wait here, in order, until
//! there is room. The driver must not wait for room itself, since the confirms that make room would not be
//! processed meanwhile.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use garenne_common::broker::{BrokerError, Outgoing};
use garenne_common::topology::Topology;
use garenne_common::wire::{self, Message, Report};
use garenne_common::{ReplyFormat, ReplyTo};

use super::builder::SettlementBuilder;
use super::reports::{ReportBundle, equal_the_bundle, reports_of, split_by_size};
use super::settlement::{Reply, Settlement, Subject, Successor};
use crate::intake::queue::{DeliveryRef, QueueIndex};
use crate::intake::unacked::{Ack, UnackedDeliveries};
use crate::run::known_attempts::{Deliveries, KnownAttempts};

/// Maximum number of unconfirmed bundles of results. Two keep the broker busy while a third is filled.
const MAX_UNCONFIRMED_BUNDLES: usize = 2;
/// The same for full bundles, which gain nothing by waiting: a confirm takes as long as a disk sync, and a
/// worker may finish more tasks in that time than two bundles hold.
const MAX_UNCONFIRMED_FULL_BUNDLES: usize = 8;
/// Maximum number of incomplete settlements. Beyond it finished attempts keep their permits, so that a
/// broker that takes no results stops the worker instead of filling its memory.
const MAX_INCOMPLETE: usize = 8_192;
/// Maximum number of messages that wait for room at the publisher. Beyond it no more settlements are
/// accepted, for the same reason: replies are not counted as settlements.
const MAX_OUTBOUND: usize = 256;

/// Something for the driver to do at once, in the given order.
#[derive(Debug, Clone, Copy)]
pub enum Action {
    /// Send an acknowledgement.
    Acknowledge {
        /// The queue of the deliveries.
        queue: QueueIndex,
        /// The deliveries.
        ack: Ack,
    },
    /// Requeue a delivery.
    Requeue(DeliveryRef),
}

/// A message to publish, which needs room at the publisher.
#[derive(Debug)]
pub struct Outbound {
    /// Identifies a successor in [`SettleCore::confirm`]; `None` for a reply, whose confirm is ignored.
    pub ticket: Option<Ticket>,
    /// The message.
    pub outgoing: Outgoing,
}

/// Identifies a published successor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(u64);

/// A successor that waits for its confirm.
#[derive(Debug)]
struct Unconfirmed {
    subjects: Vec<Subject>,
    /// Published after the confirm: a note that a task continues must not get ahead of its message.
    notes: Vec<Report>,
    is_bundle: bool,
}

/// The state machine of settling.
#[derive(Debug)]
pub struct SettleCore {
    /// By [`QueueIndex`].
    unacked: Vec<Arc<UnackedDeliveries>>,
    known: Arc<KnownAttempts>,
    worker: Arc<str>,
    /// Exchange and routing key of bundles.
    results: String,
    /// The bundle that is being filled.
    filling: ReportBundle,
    /// Full bundles that wait to be published, the oldest first.
    full: VecDeque<ReportBundle>,
    unconfirmed: HashMap<Ticket, Unconfirmed>,
    last_ticket: u64,
    unconfirmed_bundles: usize,
    unconfirmed_subjects: usize,
    /// Messages that wait for room at the publisher, the oldest first.
    outbound: VecDeque<Outbound>,
    /// Number of complete settlements: acknowledged, requeued, or left to the broker.
    concluded: u64,
}

impl SettleCore {
    /// Nothing to settle yet. `unacked` contains the queues in the order of their indices.
    pub fn new(
        unacked: Vec<Arc<UnackedDeliveries>>,
        known: Arc<KnownAttempts>,
        settlements: &SettlementBuilder,
    ) -> Self {
        Self {
            unacked,
            known,
            worker: Arc::clone(&settlements.worker),
            results: Topology::results(&settlements.topology),
            filling: ReportBundle::default(),
            full: VecDeque::new(),
            unconfirmed: HashMap::new(),
            last_ticket: 0,
            unconfirmed_bundles: 0,
            unconfirmed_subjects: 0,
            outbound: VecDeque::new(),
            concluded: 0,
        }
    }

    /// Whether more settlements may be submitted.
    pub fn has_room(&self) -> bool {
        self.unconfirmed_subjects + self.filling.subjects.len() < MAX_INCOMPLETE
            && self.full.is_empty()
            && !self.filling.is_full()
            && self.outbound.len() < MAX_OUTBOUND
    }

    /// Whether messages wait for room at the publisher.
    pub fn wants_room(&self) -> bool {
        !self.outbound.is_empty()
    }

    /// Takes the next message, for which the publisher has room.
    pub fn next_message(&mut self) -> Option<Outbound> {
        self.outbound.pop_front()
    }

    /// Discards the waiting messages: the publisher has stopped. [`flush`](Self::flush) must follow.
    pub fn publisher_stopped(&mut self, actions: &mut Vec<Action>) {
        while let Some(Outbound { ticket, .. }) = self.outbound.pop_front() {
            if let Some(ticket) = ticket {
                self.confirm(ticket, &Err(BrokerError::Closed), actions);
            }
        }
    }

    /// Number of complete settlements since the start.
    pub fn concluded(&self) -> u64 {
        self.concluded
    }

    /// Whether all settlements are complete and all messages published.
    pub fn is_idle(&self) -> bool {
        self.unconfirmed.is_empty()
            && self.full.is_empty()
            && self.filling.is_empty()
            && self.outbound.is_empty()
    }

    /// Submits a settlement. [`flush`](Self::flush) must follow, after this one or after several.
    pub fn settle(&mut self, settlement: Settlement, actions: &mut Vec<Action>) {
        self.close_full();
        let Settlement { subject, successor, notes, reply } = settlement;
        match successor {
            Successor::Result(report) => {
                self.add(notes);
                self.result(report, reply);
                self.filling.subjects.push(subject);
                return;
            }
            Successor::Message(outgoing) => {
                let subjects = vec![subject];
                self.publish(*outgoing, Unconfirmed { subjects, notes, is_bundle: false });
            }
            Successor::Confirmed => {
                self.add(notes);
                self.concluded += 1;
                self.acknowledge([subject], actions);
            }
            Successor::Requeue => {
                self.concluded += 1;
                self.requeue(&subject, actions);
            }
        }
        if let Some(Reply { to, report: Some(report) }) = reply {
            self.reply(to, *report);
        }
    }

    /// Adds the result of a task, and its reply: our own producers read the bundle itself.
    fn result(&mut self, result: Report, reply: Option<Reply>) {
        match reply {
            Some(Reply { to, report: None }) if to.format == ReplyFormat::Bundle => {
                self.filling.add_with_reply(to.queue, result);
            }
            Some(Reply { to, report }) => {
                let report = report.map_or_else(|| result.clone(), |report| *report);
                self.reply(to, report);
                self.filling.add(result);
            }
            None => self.filling.add(result),
        }
    }

    /// Publishes bundles with their replies, as far as the limits of unconfirmed bundles allow.
    pub fn flush(&mut self, actions: &mut Vec<Action>) {
        self.close_full();
        loop {
            let limit = if self.full.is_empty() {
                MAX_UNCONFIRMED_BUNDLES
            } else {
                MAX_UNCONFIRMED_FULL_BUNDLES
            };
            if self.unconfirmed_bundles >= limit {
                return;
            }
            let full = self.full.pop_front();
            let bundle = full.unwrap_or_else(|| std::mem::take(&mut self.filling));
            if bundle.is_empty() {
                return;
            }
            self.publish_bundle(bundle, actions);
        }
    }

    fn publish_bundle(&mut self, bundle: ReportBundle, actions: &mut Vec<Action>) {
        let ReportBundle { subjects, reports, replies, .. } = bundle;
        let message = wire::report::encode(&reports, &self.worker);
        for (queue, replies) in replies {
            match &message {
                Ok(message) if equal_the_bundle(&replies, &reports) => {
                    self.outbound.push_back(reply_message(&queue, message.clone()));
                }
                Ok(_) | Err(_) => self.publish_replies(&queue, &reports_of(replies, &reports)),
            }
        }
        if reports.is_empty() {
            return;
        }
        match message {
            Ok(message) => {
                let (exchange, routing_key) = (self.results.clone(), self.results.clone());
                let outgoing = Outgoing { exchange, routing_key, message };
                self.publish(outgoing, Unconfirmed { subjects, notes: vec![], is_bundle: true });
            }
            // Reports can always be encoded. If not, the tasks are delivered again.
            Err(error) => {
                tracing::error!(%error, "results could not be encoded");
                self.concluded += subjects.len() as u64;
                for subject in &subjects {
                    self.requeue(subject, actions);
                }
            }
        }
    }

    fn publish_replies(&mut self, queue: &str, replies: &[Report]) {
        for part in split_by_size(replies) {
            match wire::report::encode(part, &self.worker) {
                Ok(message) => self.outbound.push_back(reply_message(queue, message)),
                Err(error) => tracing::error!(%error, "replies could not be encoded"),
            }
        }
    }

    /// Processes what became of a published successor. [`flush`](Self::flush) must follow.
    ///
    /// `Ok` is the broker's confirm. With [`BrokerError::Closed`] nobody knows; the broker delivers the
    /// tasks again. Any other error means that the broker will never take the successor.
    pub fn confirm(
        &mut self,
        ticket: Ticket,
        result: &Result<(), BrokerError>,
        actions: &mut Vec<Action>,
    ) {
        let Some(unconfirmed) = self.unconfirmed.remove(&ticket) else { return };
        let Unconfirmed { subjects, notes, is_bundle } = unconfirmed;
        self.unconfirmed_subjects -= subjects.len();
        self.concluded += subjects.len() as u64;
        self.unconfirmed_bundles -= usize::from(is_bundle);
        match result {
            Ok(()) => {
                self.add(notes);
                self.acknowledge(subjects, actions);
            }
            Err(BrokerError::Closed) => {}
            Err(_) => {
                for subject in &subjects {
                    self.requeue(subject, actions);
                }
            }
        }
    }

    /// Plain replies are messages of their own; replies to our own producers are published with the bundle.
    fn reply(&mut self, to: ReplyTo, report: Report) {
        match (to.format, report) {
            (ReplyFormat::Bundle, report) => {
                self.filling.add_reply(to.queue, report);
            }
            (ReplyFormat::Plain, Report::Finished(result)) => {
                let correlation_id = to.correlation_id.as_deref();
                let message = wire::report::encode_reply(&result, correlation_id, &self.worker);
                self.outbound.push_back(reply_message(&to.queue, message));
            }
            (
                ReplyFormat::Plain,
                Report::Retrying(_)
                | Report::BatchOpened { .. }
                | Report::BatchSealed { .. }
                | Report::Conflict { .. }
                | Report::Lease(_)
                | Report::FinishedUnderLease { .. },
            ) => {}
        }
    }

    fn add(&mut self, notes: Vec<Report>) {
        for note in notes {
            self.close_full();
            self.filling.add(note);
        }
    }

    /// A bundle must fit into a message, and several settlements may be submitted before a flush.
    fn close_full(&mut self) {
        if self.filling.is_full() {
            self.full.push_back(std::mem::take(&mut self.filling));
        }
    }

    /// Publishes a successor; its confirm settles the subjects.
    fn publish(&mut self, outgoing: Outgoing, unconfirmed: Unconfirmed) {
        self.last_ticket += 1;
        let ticket = Ticket(self.last_ticket);
        self.unconfirmed_subjects += unconfirmed.subjects.len();
        self.unconfirmed_bundles += usize::from(unconfirmed.is_bundle);
        self.unconfirmed.insert(ticket, unconfirmed);
        self.outbound.push_back(Outbound { ticket: Some(ticket), outgoing });
    }

    fn acknowledge(&self, subjects: impl IntoIterator<Item = Subject>, actions: &mut Vec<Action>) {
        for subject in subjects {
            let deliveries = match subject {
                Subject::Ended(key) => self.known.settle(&key),
                Subject::MayReturn(key) => self.known.forget(&key),
                Subject::Leased(key) => self.known.lease(&key),
                Subject::Tasks { delivery, count } => {
                    self.unacked[delivery.queue.0].settled(delivery.tag, count);
                    continue;
                }
                Subject::None => continue,
            };
            for delivery in deliveries {
                self.unacked[delivery.queue.0].settled(delivery.tag, 1);
            }
        }
        for (index, unacked) in self.unacked.iter().enumerate() {
            let (queue, acks) = (QueueIndex(index), unacked.take_acks().into_iter());
            actions.extend(acks.map(|ack| Action::Acknowledge { queue, ack }));
        }
    }

    fn requeue(&self, subject: &Subject, actions: &mut Vec<Action>) {
        let deliveries = match subject {
            Subject::Ended(key) | Subject::MayReturn(key) | Subject::Leased(key) => {
                self.known.forget(key)
            }
            Subject::Tasks { delivery, .. } => Deliveries::from(*delivery),
            Subject::None => Deliveries::default(),
        };
        for delivery in deliveries {
            if self.unacked[delivery.queue.0].requeued(delivery.tag) {
                actions.push(Action::Requeue(delivery));
            }
        }
    }
}

/// A reply goes through the default exchange, which routes by the name of the queue.
fn reply_message(queue: &str, message: Message) -> Outbound {
    let (exchange, routing_key) = (String::new(), queue.to_owned());
    Outbound { ticket: None, outgoing: Outgoing { exchange, routing_key, message } }
}

#[cfg(test)]
mod tests;
