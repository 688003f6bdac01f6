//! Settling: the one place that tells the broker what became of a delivery.
//!
//! Every message gets its successor first (a result, its next attempt, a dead letter, itself under an
//! id), the broker confirms the successor, and only then the message is acknowledged. Results travel
//! in bundles: while one bundle waits for its confirm the next one fills, so an idle worker sends at
//! once and a busy one sends many results per message without any timer.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt};
use garenne_common::broker::{BrokerError, DeliveryTag, Outgoing, Publisher, Settler};
use garenne_common::topology::Topology;
use garenne_common::wire::{self, DeadLetter, Message, Report, RetryNote};
use garenne_common::{
    DeadReason, QueueName, ReplyFormat, ReplyTo, Status, TaskMessage, TaskResult, Timestamp,
};
use tokio::sync::mpsc;

use crate::acks::Acks;
use crate::inflight::{DeliveryRef, Inflight, Key};
use crate::outcome::Disposition;

/// Bundles of results that wait for their confirm at once. Two keep the broker busy while one fills.
const BUNDLES_UNDER_WAY: usize = 2;
const MAX_BUNDLE_REPORTS: usize = 500;
const MAX_BUNDLE_BYTES: usize = 1024 * 1024;
/// Settlements taken in and not yet acknowledged. Beyond it finished attempts keep their slots, so a
/// broker that takes no results stops the worker instead of filling its memory.
const MAX_UNDER_WAY: usize = 8_192;

/// Whose deliveries a settlement is about.
#[derive(Debug)]
pub(crate) enum Subject {
    /// All deliveries of an attempt, adopted ones included.
    Attempt(Key),
    /// One delivery that never became an attempt.
    Delivery(DeliveryRef),
}

/// What must be confirmed before the deliveries are acknowledged.
#[derive(Debug)]
pub(crate) enum Successor {
    /// A result for the collector, bundled with others.
    Result(TaskResult),
    /// A message of its own.
    Message(Outgoing),
    /// Nothing: a successor was confirmed before.
    Confirmed,
    /// None: the deliveries go back to their queue.
    HandBack,
}

/// An order to settle.
#[derive(Debug)]
pub(crate) struct Settlement {
    pub(crate) subject: Subject,
    pub(crate) successor: Successor,
    /// Whether the same task and attempt may rightly arrive again and must then run.
    pub(crate) may_return: bool,
    /// For the collector, not waited for.
    pub(crate) note: Option<Report>,
    /// For whoever asked for the result itself; best effort and never part of settling.
    pub(crate) reply: Option<(ReplyTo, Report)>,
}

impl Settlement {
    /// A settlement that only says what becomes of the deliveries.
    pub(crate) fn bare(subject: Subject, successor: Successor) -> Self {
        Self { subject, successor, may_return: false, note: None, reply: None }
    }
}

/// An attempt that ended, as settling needs to know it.
pub(crate) struct Ended {
    pub(crate) task: Arc<TaskMessage>,
    /// As it arrived: a retry and a dead letter keep what its sender wrote.
    pub(crate) message: Message,
    pub(crate) redelivered: bool,
    pub(crate) started_at: Timestamp,
}

/// Who signs.
pub(crate) struct Signature {
    pub(crate) topology: Topology,
    pub(crate) worker: Arc<str>,
}

impl Signature {
    /// Turns a disposition into the order that carries it out; does nothing yet.
    pub(crate) fn settlement(&self, ended: &Ended, disposition: Disposition) -> Settlement {
        let task = &ended.task;
        let subject = Subject::Attempt((task.id.clone(), task.attempt));
        match disposition {
            Disposition::Complete(output) => {
                let result = self.result(ended, output);
                Settlement {
                    reply: task.reply.clone().map(|to| (to, Report::Finished(result.clone()))),
                    ..Settlement::bare(subject, Successor::Result(result))
                }
            }
            Disposition::Retry { after, error } => self.retry(ended, subject, after, error),
            Disposition::DeadLetter { reason, error } => {
                let mut letter = self.letter(&ended.message, &task.queue, reason, &error);
                letter.started_at = Some(ended.started_at);
                letter.redelivered = ended.redelivered;
                self.dead(subject, &letter)
            }
            Disposition::Requeue => Settlement::bare(subject, Successor::HandBack),
        }
    }

    /// The order for a message that never became an attempt.
    pub(crate) fn refusal(
        &self,
        delivery: DeliveryRef,
        message: &Message,
        queue: &QueueName,
        reason: DeadReason,
        error: &str,
    ) -> Settlement {
        self.dead(Subject::Delivery(delivery), &self.letter(message, queue, reason, error))
    }

    /// The order that gives a message an id.
    pub(crate) fn identification(
        &self,
        delivery: DeliveryRef,
        message: &Message,
        queue: &QueueName,
    ) -> Settlement {
        let (id, message) = wire::task::assign_id(message);
        tracing::debug!(%id, "a task without an id got one");
        let successor = Successor::Message(self.to_tasks(queue, message));
        Settlement::bare(Subject::Delivery(delivery), successor)
    }

    fn result(&self, ended: &Ended, output: garenne_common::Payload) -> TaskResult {
        let task = &ended.task;
        TaskResult {
            id: task.id.clone(),
            name: task.name.clone(),
            queue: task.queue.clone(),
            batch: task.batch.clone(),
            status: Status::Succeeded,
            output: Some(output),
            error: None,
            reason: None,
            attempt: task.attempt,
            redelivered: ended.redelivered,
            worker: self.worker.to_string(),
            started_at: ended.started_at,
            finished_at: Timestamp::now(),
        }
    }

    fn retry(&self, ended: &Ended, subject: Subject, after: Duration, error: String) -> Settlement {
        let (task, at) = (&ended.task, Timestamp::now());
        let message = wire::task::next_attempt(&ended.message, task.attempt.saturating_add(1));
        let (outgoing, after) = match self.topology.delay_route(after) {
            None => (self.to_tasks(&task.queue, message), Duration::ZERO),
            Some(route) => {
                let message = wire::task::with_delay_marks(&message, &route.marks);
                let routing_key = task.queue.to_string();
                (Outgoing { exchange: route.exchange, routing_key, message }, route.delay)
            }
        };
        let note = Report::Retrying(RetryNote {
            id: task.id.clone(),
            name: task.name.clone(),
            batch: task.batch.clone(),
            attempt: task.attempt,
            error,
            next_at: at.plus(after),
            worker: self.worker.to_string(),
            at,
        });
        // A plain reply has no form for "not yet".
        let reply = task.reply.clone().filter(|to| to.format == ReplyFormat::Bundle);
        Settlement {
            reply: reply.map(|to| (to, note.clone())),
            note: Some(note),
            ..Settlement::bare(subject, Successor::Message(outgoing))
        }
    }

    fn dead(&self, subject: Subject, letter: &DeadLetter) -> Settlement {
        let dead = self.topology.dead();
        let message = letter.encode();
        let outgoing = Outgoing { exchange: dead.clone(), routing_key: dead, message };
        let reply = wire::task::reply_of(&letter.message).zip(letter.to_result());
        Settlement {
            may_return: !letter.reason.is_final(),
            reply: reply.map(|(to, result)| (to, Report::Finished(result))),
            ..Settlement::bare(subject, Successor::Message(outgoing))
        }
    }

    fn letter(
        &self,
        message: &Message,
        queue: &QueueName,
        reason: DeadReason,
        error: &str,
    ) -> DeadLetter {
        DeadLetter::new(message, queue.as_str(), reason, error, &self.worker)
    }

    fn to_tasks(&self, queue: &QueueName, message: Message) -> Outgoing {
        let exchange = self.topology.tasks_exchange();
        Outgoing { exchange, routing_key: queue.to_string(), message }
    }
}

/// One queue of the worker, as far as settling goes.
pub(crate) struct Lane {
    pub(crate) queue: QueueName,
    pub(crate) settler: Settler,
    acks: Mutex<Acks>,
}

impl Lane {
    pub(crate) fn new(queue: QueueName, settler: Settler) -> Self {
        Self { queue, settler, acks: Mutex::default() }
    }

    /// A delivery arrived; must be called before anything can settle it.
    pub(crate) fn delivered(&self, tag: DeliveryTag) {
        self.acks().delivered(tag);
    }

    /// Gives a delivery back to the queue.
    async fn hand_back(&self, tag: DeliveryTag) {
        self.acks().handed_back(tag);
        self.settler.requeue(tag).await;
    }

    /// Acknowledges what is done, with as few acknowledgements as are right.
    async fn acknowledge(&self) {
        let acks = self.acks().take();
        for ack in acks {
            if !self.settler.ack(ack.tag, ack.multiple).await {
                // Its channel is gone: it comes again, and `Inflight` knows it as settled.
                tracing::debug!(?ack, "the acknowledgement came too late");
            }
        }
    }

    fn acks(&self) -> std::sync::MutexGuard<'_, Acks> {
        self.acks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

type Confirmation = Pin<Box<dyn Future<Output = Confirmed> + Send>>;

/// The broker's word on one published successor.
struct Confirmed {
    tickets: Vec<Ticket>,
    is_bundle: bool,
    result: Result<(), BrokerError>,
}

/// What is settled when a confirm arrives.
struct Ticket {
    subject: Subject,
    may_return: bool,
}

/// The task that settles.
pub(crate) struct SettleTask {
    pub(crate) inbox: mpsc::Receiver<Settlement>,
    pub(crate) publisher: Publisher,
    pub(crate) signature: Arc<Signature>,
    pub(crate) lanes: Arc<Vec<Lane>>,
    pub(crate) inflight: Arc<Inflight>,
}

#[derive(Default)]
struct Bundle {
    tickets: Vec<Ticket>,
    reports: Vec<Report>,
    bytes: usize,
    replies: HashMap<String, Vec<Report>>,
}

#[derive(Default)]
struct UnderWay {
    confirmations: FuturesUnordered<Confirmation>,
    bundles: usize,
    tickets: usize,
}

impl SettleTask {
    /// Settles until every sender is gone and everything taken in is confirmed.
    pub(crate) async fn run(mut self) {
        let (mut bundle, mut under_way) = (Bundle::default(), UnderWay::default());
        let mut arrived = Vec::with_capacity(MAX_BUNDLE_REPORTS);
        let mut open = true;
        while open || !under_way.confirmations.is_empty() || !bundle.is_empty() {
            let room = open
                && under_way.tickets + bundle.tickets.len() < MAX_UNDER_WAY
                && !bundle.is_full();
            tokio::select! {
                Some(confirmed) = under_way.confirmations.next() => {
                    under_way.tickets -= confirmed.tickets.len();
                    under_way.bundles -= usize::from(confirmed.is_bundle);
                    self.conclude(confirmed).await;
                }
                count = self.inbox.recv_many(&mut arrived, MAX_BUNDLE_REPORTS), if room => {
                    open = count > 0;
                    for settlement in arrived.drain(..) {
                        self.accept(settlement, &mut bundle, &mut under_way).await;
                    }
                }
            }
            if under_way.bundles < BUNDLES_UNDER_WAY && !bundle.is_empty() {
                self.flush(std::mem::take(&mut bundle), &mut under_way).await;
            }
        }
    }

    async fn accept(&self, settlement: Settlement, bundle: &mut Bundle, under_way: &mut UnderWay) {
        let Settlement { subject, successor, may_return, note, reply } = settlement;
        let ticket = Ticket { subject, may_return };
        if let Some((to, report)) = reply {
            self.reply(to, report, bundle).await;
        }
        if let Some(note) = note {
            bundle.add(note);
        }
        match successor {
            Successor::Result(result) => {
                bundle.add(Report::Finished(result));
                bundle.tickets.push(ticket);
            }
            Successor::Message(outgoing) => self.publish(outgoing, vec![ticket], false, under_way),
            Successor::Confirmed => self.acknowledge([ticket]).await,
            Successor::HandBack => self.hand_back(&ticket.subject).await,
        }
    }

    /// A plain reply goes out alone; replies for our own producers travel with the bundle.
    async fn reply(&self, to: ReplyTo, report: Report, bundle: &mut Bundle) {
        match (to.format, report) {
            (ReplyFormat::Bundle, report) => {
                bundle.replies.entry(to.queue).or_default().push(report);
            }
            (ReplyFormat::Plain, Report::Finished(result)) => {
                let correlation_id = to.correlation_id.as_deref();
                let worker = &self.signature.worker;
                let message = wire::report::encode_reply(&result, correlation_id, worker);
                self.send_reply(to.queue, message).await;
            }
            (
                ReplyFormat::Plain,
                Report::Retrying(_) | Report::BatchOpened { .. } | Report::BatchSealed { .. },
            ) => {}
        }
    }

    async fn send_reply(&self, queue: String, message: Message) {
        let outgoing = Outgoing { exchange: String::new(), routing_key: queue, message };
        if let Err(error) = self.publisher.send_and_forget(outgoing).await {
            tracing::debug!(%error, "a reply was not sent");
        }
    }

    /// Sends a bundle of results on its way, and the replies that belong to it.
    async fn flush(&self, bundle: Bundle, under_way: &mut UnderWay) {
        let worker = &self.signature.worker;
        for (queue, reports) in bundle.replies {
            for part in parts(&reports) {
                match wire::report::encode(part, worker) {
                    Ok(message) => self.send_reply(queue.clone(), message).await,
                    Err(error) => tracing::error!(%error, "replies could not be encoded"),
                }
            }
        }
        if bundle.reports.is_empty() {
            return;
        }
        let results = self.signature.topology.results();
        match wire::report::encode(&bundle.reports, worker) {
            Ok(message) => {
                let outgoing =
                    Outgoing { exchange: results.clone(), routing_key: results, message };
                self.publish(outgoing, bundle.tickets, true, under_way);
            }
            // Plain data always encodes; if it ever does not, the tasks come again elsewhere.
            Err(error) => {
                tracing::error!(%error, "results could not be encoded");
                for ticket in &bundle.tickets {
                    self.hand_back(&ticket.subject).await;
                }
            }
        }
    }

    /// Publishes a successor; its confirm settles the tickets.
    fn publish(
        &self,
        outgoing: Outgoing,
        tickets: Vec<Ticket>,
        is_bundle: bool,
        under_way: &mut UnderWay,
    ) {
        let publisher = self.publisher.clone();
        under_way.tickets += tickets.len();
        under_way.bundles += usize::from(is_bundle);
        under_way.confirmations.push(Box::pin(async move {
            let result = until_taken(&publisher, outgoing).await;
            Confirmed { tickets, is_bundle, result }
        }));
    }

    async fn conclude(&self, Confirmed { tickets, result, .. }: Confirmed) {
        match result {
            Ok(()) => self.acknowledge(tickets).await,
            // No successor, no acknowledgement: the broker delivers the tasks again.
            Err(BrokerError::Closed) => {}
            Err(error) => {
                tracing::error!(%error, "a successor cannot be published; handing the tasks back");
                tokio::time::sleep(Duration::from_secs(1)).await;
                for ticket in &tickets {
                    self.hand_back(&ticket.subject).await;
                }
            }
        }
    }

    async fn acknowledge(&self, tickets: impl IntoIterator<Item = Ticket>) {
        for Ticket { subject, may_return } in tickets {
            let deliveries = match &subject {
                Subject::Attempt(key) if may_return => self.inflight.forgotten(key),
                Subject::Attempt(key) => self.inflight.settled(key),
                Subject::Delivery(delivery) => vec![*delivery],
            };
            for delivery in deliveries {
                self.lanes[delivery.queue].acks().done(delivery.tag);
            }
        }
        for lane in self.lanes.iter() {
            lane.acknowledge().await;
        }
    }

    async fn hand_back(&self, subject: &Subject) {
        let deliveries = match subject {
            Subject::Attempt(key) => self.inflight.forgotten(key),
            Subject::Delivery(delivery) => vec![*delivery],
        };
        for delivery in deliveries {
            self.lanes[delivery.queue].hand_back(delivery.tag).await;
        }
    }
}

impl Bundle {
    fn add(&mut self, report: Report) {
        self.bytes += wire::report::weight(&report);
        self.reports.push(report);
    }

    fn is_full(&self) -> bool {
        self.reports.len() >= MAX_BUNDLE_REPORTS || self.bytes >= MAX_BUNDLE_BYTES
    }

    fn is_empty(&self) -> bool {
        self.reports.is_empty() && self.replies.is_empty()
    }
}

/// Cuts reports into bundles of a bounded size; a report that is larger alone goes alone.
fn parts(reports: &[Report]) -> impl Iterator<Item = &[Report]> {
    let mut rest = reports;
    std::iter::from_fn(move || {
        let mut bytes = 0;
        let fits = rest.iter().take_while(|report| {
            bytes += wire::report::weight(report);
            bytes <= MAX_BUNDLE_BYTES
        });
        let count = fits.count().clamp(1, MAX_BUNDLE_REPORTS).min(rest.len());
        let (part, after) = rest.split_at(count);
        rest = after;
        (!part.is_empty()).then_some(part)
    })
}

/// Publishes until the broker has it. A refusal (a full queue) may pass; nothing else is refused.
async fn until_taken(publisher: &Publisher, outgoing: Outgoing) -> Result<(), BrokerError> {
    let mut pause = Duration::from_millis(100);
    loop {
        let confirmed = publisher.send(outgoing.clone()).await?.confirmed().await;
        match confirmed {
            Err(BrokerError::Rejected(queue)) => {
                tracing::warn!(queue, "RabbitMQ refused a message; trying again");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_secs(5));
            }
            other => return other,
        }
    }
}
