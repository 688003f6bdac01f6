//! What may happen when, without doing it: settlements and the broker's answers in, actions out.
//!
//! Results travel in bundles: while one bundle waits for its confirm the next one fills, so an idle
//! worker sends at once and a busy one sends many results per message without any timer.
//!
//! Room at the publisher is an input like any other ([`SettleCore::room`]): what is to be published
//! waits here, in order, until there is some. The driver therefore never waits for room while it
//! leaves confirms and acknowledgements unattended, which is what would have to happen first.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use garenne_common::broker::Outgoing;
use garenne_common::topology::Topology;
use garenne_common::wire::{self, Message, Report};
use garenne_common::{ReplyFormat, ReplyTo};

use super::bundle::{Bundle, are_the_same, parts, spelt_out};
use super::lane::Lane;
use super::order::{Claim, Reply, Settlement, Subject, Successor, Then};
use super::signature::Signature;
use crate::acks::Ack;
use crate::inflight::{Deliveries, DeliveryRef, Inflight};

/// Bundles of results that wait for their confirm at once. Two keep the broker busy while one fills.
const BUNDLES_UNDER_WAY: usize = 2;
/// The same for full bundles, which gain nothing by waiting: a confirm takes the time of a disk sync,
/// in which a worker may finish more tasks than two bundles hold.
const FULL_UNDER_WAY: usize = 8;
/// Settlements taken in and not yet acknowledged. Beyond it finished attempts keep their slots, so a
/// broker that takes no results stops the worker instead of filling its memory.
const MAX_UNDER_WAY: usize = 8_192;
/// Messages that wait for room at the publisher. Beyond it no more settlements are taken in, for the
/// same reason: replies are not counted among the settlements under way.
const MAX_OUTBOUND: usize = 256;

/// One thing to do at once, without waiting. The order of actions is part of what they mean.
#[derive(Debug, Clone, Copy)]
pub enum Action {
    /// Acknowledge.
    Acknowledge {
        /// Deliveries of which queue, by position.
        lane: usize,
        /// Which.
        ack: Ack,
    },
    /// Give a delivery back to its queue.
    HandBack(DeliveryRef),
}

/// One message to publish, which needs room at the publisher.
#[derive(Debug)]
pub enum Outbound {
    /// A successor; the broker's answer goes to [`SettleCore::answered`].
    Successor {
        /// What the answer is about.
        ticket: Ticket,
        /// The message.
        outgoing: Outgoing,
    },
    /// A reply; nothing waits for its confirm.
    Reply(Outgoing),
}

/// Names a published successor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(u64);

/// What became of a published successor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// The broker has it.
    Confirmed,
    /// The broker will never take it.
    Impossible,
    /// Nobody will ever know: the publisher has stopped.
    Unknown,
}

#[derive(Debug)]
struct Published {
    claims: Vec<Claim>,
    /// Said when it is confirmed: a note that a task has gone on must not outlive the message.
    notes: Vec<Report>,
    is_bundle: bool,
}

/// Settling, as a state machine.
#[derive(Debug)]
pub struct SettleCore {
    lanes: Arc<Vec<Lane>>,
    inflight: Arc<Inflight>,
    worker: Arc<str>,
    /// Exchange and routing key of bundles.
    results: String,
    bundle: Bundle,
    /// Full ones that wait to be sent, the oldest first.
    full: VecDeque<Bundle>,
    /// Successors without an answer.
    published: HashMap<Ticket, Published>,
    last_ticket: u64,
    bundles_under_way: usize,
    claims_under_way: usize,
    /// What waits for room at the publisher, the oldest first.
    outbound: VecDeque<Outbound>,
    /// Settlements that have ended: acknowledged, handed back, or left to the broker.
    concluded: u64,
}

impl SettleCore {
    /// Nothing to settle yet.
    pub fn new(lanes: Arc<Vec<Lane>>, inflight: Arc<Inflight>, signature: &Signature) -> Self {
        Self {
            lanes,
            inflight,
            worker: Arc::clone(&signature.worker),
            results: Topology::results(&signature.topology),
            bundle: Bundle::default(),
            full: VecDeque::new(),
            published: HashMap::new(),
            last_ticket: 0,
            bundles_under_way: 0,
            claims_under_way: 0,
            outbound: VecDeque::new(),
            concluded: 0,
        }
    }

    /// Whether more settlements may be taken in.
    pub fn has_room(&self) -> bool {
        self.claims_under_way + self.bundle.claims.len() < MAX_UNDER_WAY
            && self.full.is_empty()
            && !self.bundle.is_full()
            && self.outbound.len() < MAX_OUTBOUND
    }

    /// Whether something waits for room at the publisher.
    pub fn wants_room(&self) -> bool {
        !self.outbound.is_empty()
    }

    /// The publisher has room for one message: what is to be published there, if anything.
    pub fn room(&mut self) -> Option<Outbound> {
        self.outbound.pop_front()
    }

    /// The publisher has stopped: what waits for room will never be published.
    /// [`flush`](Self::flush) must follow.
    pub fn no_more_room(&mut self, actions: &mut Vec<Action>) {
        while let Some(waiting) = self.outbound.pop_front() {
            match waiting {
                Outbound::Successor { ticket, .. } => {
                    self.answered(ticket, Answer::Unknown, actions);
                }
                // Best effort, like every reply.
                Outbound::Reply(_) => {}
            }
        }
    }

    /// How many settlements have ended, since the start.
    pub fn concluded(&self) -> u64 {
        self.concluded
    }

    /// Whether everything taken in is answered.
    pub fn is_idle(&self) -> bool {
        self.published.is_empty()
            && self.full.is_empty()
            && self.bundle.is_empty()
            && self.outbound.is_empty()
    }

    /// Takes a settlement in. [`flush`](Self::flush) must follow, after this one or after several.
    pub fn settle(&mut self, settlement: Settlement, actions: &mut Vec<Action>) {
        self.close_full();
        let Settlement { subject, successor, then, notes, reply } = settlement;
        let claim = Claim { subject, then };
        match successor {
            Successor::Result(report) => {
                self.add(notes);
                self.result(report, reply);
                self.bundle.claims.push(claim);
                return;
            }
            Successor::Message(outgoing) => {
                let claims = vec![claim];
                self.publish(*outgoing, Published { claims, notes, is_bundle: false });
            }
            Successor::Confirmed => {
                self.add(notes);
                self.concluded += 1;
                self.acknowledge([claim], actions);
            }
            Successor::HandBack => {
                self.concluded += 1;
                self.hand_back(&claim.subject, actions);
            }
        }
        match reply {
            Some(Reply::Other(to, report)) => self.reply(to, *report),
            // There is no result that it could be the same as.
            Some(Reply::Result(_)) | None => {}
        }
    }

    fn result(&mut self, report: Report, reply: Option<Reply>) {
        match reply {
            Some(Reply::Result(to)) if to.format == ReplyFormat::Bundle => {
                self.bundle.add_with_reply(to.queue, report);
            }
            Some(Reply::Result(to)) => {
                self.reply(to, report.clone());
                self.bundle.add(report);
            }
            Some(Reply::Other(to, other)) => {
                self.reply(to, *other);
                self.bundle.add(report);
            }
            None => self.bundle.add(report),
        }
    }

    /// Sends bundles on their way, and the replies that belong to them, unless enough are under way.
    pub fn flush(&mut self, actions: &mut Vec<Action>) {
        self.close_full();
        loop {
            let most = if self.full.is_empty() { BUNDLES_UNDER_WAY } else { FULL_UNDER_WAY };
            if self.bundles_under_way >= most {
                return;
            }
            let full = self.full.pop_front();
            let bundle = full.unwrap_or_else(|| std::mem::take(&mut self.bundle));
            if bundle.is_empty() {
                return;
            }
            self.send(bundle, actions);
        }
    }

    fn send(&mut self, bundle: Bundle, actions: &mut Vec<Action>) {
        let Bundle { claims, reports, replies, .. } = bundle;
        let message = wire::report::encode(&reports, &self.worker);
        for (queue, replies) in replies {
            match &message {
                Ok(message) if are_the_same(&replies, &reports) => {
                    self.outbound.push_back(reply_to(&queue, message.clone()));
                }
                Ok(_) | Err(_) => self.send_replies(&queue, &spelt_out(replies, &reports)),
            }
        }
        if reports.is_empty() {
            return;
        }
        match message {
            Ok(message) => {
                let (exchange, routing_key) = (self.results.clone(), self.results.clone());
                let outgoing = Outgoing { exchange, routing_key, message };
                let published = Published { claims, notes: vec![], is_bundle: true };
                self.publish(outgoing, published);
            }
            // Plain data always encodes; if it ever does not, the tasks come again elsewhere.
            Err(error) => {
                tracing::error!(%error, "results could not be encoded");
                self.concluded += claims.len() as u64;
                for claim in &claims {
                    self.hand_back(&claim.subject, actions);
                }
            }
        }
    }

    fn send_replies(&mut self, queue: &str, replies: &[Report]) {
        for part in parts(replies) {
            match wire::report::encode(part, &self.worker) {
                Ok(message) => self.outbound.push_back(reply_to(queue, message)),
                Err(error) => tracing::error!(%error, "replies could not be encoded"),
            }
        }
    }

    /// The broker's word on a successor. [`flush`](Self::flush) must follow.
    pub fn answered(&mut self, ticket: Ticket, answer: Answer, actions: &mut Vec<Action>) {
        let Some(published) = self.published.remove(&ticket) else { return };
        let Published { claims, notes, is_bundle } = published;
        self.claims_under_way -= claims.len();
        self.concluded += claims.len() as u64;
        self.bundles_under_way -= usize::from(is_bundle);
        match answer {
            Answer::Confirmed => {
                self.add(notes);
                self.acknowledge(claims, actions);
            }
            // No successor, no acknowledgement: the broker delivers the tasks again.
            Answer::Unknown => {}
            Answer::Impossible => {
                for claim in &claims {
                    self.hand_back(&claim.subject, actions);
                }
            }
        }
    }

    /// A plain reply goes out alone; replies for our own producers travel with the bundle.
    fn reply(&mut self, to: ReplyTo, report: Report) {
        match (to.format, report) {
            (ReplyFormat::Bundle, report) => {
                self.bundle.add_reply(to.queue, report);
            }
            (ReplyFormat::Plain, Report::Finished(result)) => {
                let correlation_id = to.correlation_id.as_deref();
                let message = wire::report::encode_reply(&result, correlation_id, &self.worker);
                self.outbound.push_back(reply_to(&to.queue, message));
            }
            (
                ReplyFormat::Plain,
                Report::Retrying(_)
                | Report::BatchOpened { .. }
                | Report::BatchSealed { .. }
                | Report::Lease(_)
                | Report::FinishedUnderLease { .. },
            ) => {}
        }
    }

    fn add(&mut self, notes: Vec<Report>) {
        for note in notes {
            self.close_full();
            self.bundle.add(note);
        }
    }

    /// Several settlements or notes come at once, and a bundle must fit into a message.
    fn close_full(&mut self) {
        if self.bundle.is_full() {
            self.full.push_back(std::mem::take(&mut self.bundle));
        }
    }

    /// Publishes a successor; its confirm settles the claims.
    fn publish(&mut self, outgoing: Outgoing, published: Published) {
        self.last_ticket += 1;
        let ticket = Ticket(self.last_ticket);
        self.claims_under_way += published.claims.len();
        self.bundles_under_way += usize::from(published.is_bundle);
        self.published.insert(ticket, published);
        self.outbound.push_back(Outbound::Successor { ticket, outgoing });
    }

    fn acknowledge(&self, claims: impl IntoIterator<Item = Claim>, actions: &mut Vec<Action>) {
        for Claim { subject, then } in claims {
            let deliveries = match (&subject, then) {
                (Subject::Members(bundle, tasks), _) => {
                    self.lanes[bundle.queue].done(bundle.tag, *tasks);
                    continue;
                }
                (Subject::Attempt(key), Then::Over) => self.inflight.settled(key),
                (Subject::Attempt(key), Then::MayReturn) => self.inflight.forgotten(key),
                (Subject::Attempt(key), Then::RunsOn) => self.inflight.handed_over(key),
                (Subject::Delivery(delivery), _) => Deliveries::one(*delivery),
                (Subject::Nothing, _) => continue,
            };
            for delivery in deliveries {
                self.lanes[delivery.queue].done(delivery.tag, 1);
            }
        }
        for (lane, open) in self.lanes.iter().enumerate() {
            let acks = open.take().into_iter();
            actions.extend(acks.map(|ack| Action::Acknowledge { lane, ack }));
        }
    }

    fn hand_back(&self, subject: &Subject, actions: &mut Vec<Action>) {
        let deliveries = match subject {
            Subject::Attempt(key) => self.inflight.forgotten(key),
            Subject::Delivery(delivery) | Subject::Members(delivery, _) => {
                Deliveries::one(*delivery)
            }
            Subject::Nothing => Deliveries::default(),
        };
        for delivery in deliveries {
            if self.lanes[delivery.queue].handed_back(delivery.tag) {
                actions.push(Action::HandBack(delivery));
            }
        }
    }
}

/// Through the default exchange, which routes by the queue's name.
fn reply_to(queue: &str, message: Message) -> Outbound {
    Outbound::Reply(Outgoing { exchange: String::new(), routing_key: queue.to_owned(), message })
}

#[cfg(test)]
mod tests;
