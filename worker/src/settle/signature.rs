//! From a disposition to an order: which message is the successor, and who else hears of it.
//!
//! Pure; nothing is published here, and the time is given.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use garenne_common::broker::Outgoing;
use garenne_common::topology::Topology;
use garenne_common::wire::{
    self, DeadLetter, Fence, Lease, LeaseChange, LeaseNote, Message, Report, RetryNote,
};
use garenne_common::{
    DeadReason, Payload, QueueName, ReplyFormat, ReplyGate, ReplyTo, Status, TaskMessage,
    TaskResult, Timestamp,
};

use super::carrier::Carrier;
use super::order::{Reply, Settlement, Subject, Successor, Then};
use crate::inflight::{DeliveryRef, Key};
use crate::outcome::Disposition;
use crate::suspect;

/// An error in a note is cut to so many characters, as in a dead letter; many notes share a message.
const MAX_NOTE_CHARS: usize = 4_000;

/// An attempt that ended, as settling needs to know it.
pub struct Ended {
    /// What was run.
    pub task: Arc<TaskMessage>,
    /// What it came in.
    pub carrier: Carrier,
    /// Whether the broker had delivered it before.
    pub redelivered: bool,
    /// When the attempt began.
    pub started_at: Timestamp,
    /// When it ended.
    pub finished_at: Timestamp,
    /// Which execution it is, if the collector holds its task under a lease.
    pub lease: Option<Fence>,
}

impl Ended {
    fn key(&self) -> Key {
        self.carrier.key(&self.task)
    }

    fn message(&self) -> Cow<'_, Message> {
        self.carrier.message(&self.task)
    }
}

/// A delivery on its way to become an attempt.
#[derive(Clone, Copy)]
pub struct Arrival<'a> {
    /// What to settle it by.
    pub delivery: DeliveryRef,
    /// What came.
    pub message: &'a Message,
    /// Through which queue.
    pub queue: &'a QueueName,
    /// When.
    pub at: Timestamp,
}

/// Who signs.
pub struct Signature {
    /// Where successors go.
    pub topology: Topology,
    /// The most bytes that the body of a task may have.
    pub max_body: usize,
    /// Which queues take replies.
    pub replies: ReplyGate,
    /// The worker's name.
    pub worker: Arc<str>,
}

impl Signature {
    /// Turns a disposition into the order that carries it out; does nothing yet.
    pub fn settlement(&self, ended: &Ended, disposition: Disposition) -> Settlement {
        let task = &ended.task;
        let subject = Subject::Attempt(ended.key());
        match disposition {
            Disposition::Complete(output) => {
                self.finished(ended, subject, self.result(ended, output))
            }
            Disposition::Cancel { reason } => {
                self.finished(ended, subject, self.cancelled(ended, &reason, task.attempt))
            }
            Disposition::Retry { after, error } => self.retry(ended, subject, after, &error),
            Disposition::DeadLetter { reason, error } => {
                let (message, at) = (ended.message(), ended.finished_at);
                let mut letter = self.letter(&message, &task.queue, reason, &error, at);
                letter.started_at = Some(ended.started_at);
                letter.redelivered = ended.redelivered;
                if let Some(fence) = &ended.lease {
                    wire::lease::set_execution(&mut letter.message, fence);
                }
                self.dead(subject, &letter)
            }
            Disposition::Again { after } => self.again(ended, subject, after),
            Disposition::Requeue => match &ended.lease {
                None => self.hand_back(subject, &ended.carrier, task),
                Some(fence) => self.hand_back_leased(ended, subject, fence),
            },
        }
    }

    /// The order for a task that was cancelled before this attempt of it began.
    pub fn unbegun(&self, ended: &Ended, reason: &str) -> Settlement {
        let task = &ended.task;
        let subject = Subject::Attempt(ended.key());
        let result = self.cancelled(ended, reason, task.attempt.saturating_sub(1));
        self.finished(ended, subject, result)
    }

    fn finished(&self, ended: &Ended, subject: Subject, result: TaskResult) -> Settlement {
        let to = self.reply(ended.task.reply.clone());
        let (reply, report) = match &ended.lease {
            None => (to.map(Reply::Result), Report::Finished(result)),
            Some(fence) => (
                to.map(|to| Reply::Other(to, Box::new(Report::Finished(result.clone())))),
                Report::FinishedUnderLease { fence: fence.clone(), result },
            ),
        };
        Settlement { reply, ..Settlement::bare(subject, Successor::Result(report)) }
    }

    /// The order that hands a running attempt over to the collector.
    pub fn lease(
        &self,
        task: &TaskMessage,
        message: &Message,
        fence: &Fence,
        term: Duration,
    ) -> Settlement {
        let lease = Lease {
            id: task.id.clone(),
            message: message.clone(),
            queue: task.queue.clone(),
            fence: fence.clone(),
            worker: self.worker.to_string(),
            term,
        };
        let (results, message) = (self.topology.results(), lease.encode());
        let outgoing = Outgoing { exchange: results.clone(), routing_key: results, message };
        let subject = Subject::Attempt(Key::of(task, &lease.message));
        let successor = Successor::message(outgoing);
        Settlement { then: Then::RunsOn, ..Settlement::bare(subject, successor) }
    }

    /// The order that tells the collector that a leased attempt goes on.
    pub fn renewal(task: &TaskMessage, fence: &Fence, at: Timestamp) -> Settlement {
        let note = lease_note(task, fence, LeaseChange::Renewed, at);
        Settlement { notes: vec![note], ..Settlement::bare(Subject::Nothing, Successor::Confirmed) }
    }

    /// Its delivery was acknowledged long ago, so it goes back as a message of its own.
    fn hand_back_leased(&self, ended: &Ended, subject: Subject, fence: &Fence) -> Settlement {
        let (task, at) = (&ended.task, ended.finished_at);
        let mut message = wire::task::for_republish(&ended.message());
        wire::lease::set_fence(&mut message, fence.number);
        let successor = Successor::message(self.to_tasks(&task.queue, message));
        Settlement {
            then: Then::MayReturn,
            notes: vec![lease_note(task, fence, LeaseChange::Released, at)],
            ..Settlement::bare(subject, successor)
        }
    }

    /// The order that gives deliveries back to their queue, without a trace on a message that would
    /// look guilty by it. A task of a bundle goes back as a message of its own.
    fn hand_back(&self, subject: Subject, carrier: &Carrier, task: &TaskMessage) -> Settlement {
        match carrier {
            Carrier::Alone(message) => self.hand_back_message(subject, message, &task.queue),
            Carrier::Bundle { .. } => {
                let outgoing = self.to_tasks(&task.queue, carrier.message(task).into_owned());
                let successor = Successor::message(outgoing);
                Settlement { then: Then::MayReturn, ..Settlement::bare(subject, successor) }
            }
        }
    }

    /// The order that gives a delivery back that did not become an attempt.
    pub(crate) fn hand_back_message(
        &self,
        subject: Subject,
        message: &Message,
        queue: &QueueName,
    ) -> Settlement {
        if !suspect::counts_high(message) {
            return Settlement::bare(subject, Successor::HandBack);
        }
        let message = wire::task::for_republish(message);
        let (outgoing, _) = self.delayed(queue, message, suspect::RENEWAL);
        let successor = Successor::message(outgoing);
        Settlement { then: Then::MayReturn, ..Settlement::bare(subject, successor) }
    }

    /// The order that lets a task leave a bundle that was delivered before.
    pub(crate) fn single_out(
        &self,
        bundle: DeliveryRef,
        task: &TaskMessage,
        app_id: &str,
    ) -> Settlement {
        let mut message = wire::task::encode(task, app_id);
        wire::crash::mark_returned(&mut message);
        let successor = Successor::message(self.to_tasks(&task.queue, message));
        Settlement::bare(Subject::Delivery(bundle), successor)
    }

    /// The order that sends tasks of a bundle back to their queue, which none of them has left for an
    /// attempt: one as a message of its own, several as a bundle that is new to the broker.
    pub(crate) fn send_back(
        &self,
        bundle: DeliveryRef,
        tasks: &[&TaskMessage],
        app_id: &str,
        queue: &QueueName,
    ) -> Settlement {
        let subject = Subject::Members(bundle, tasks.len());
        let message = match tasks {
            [task] => Ok(wire::task::encode(task, app_id)),
            several => wire::bundle::encode(several.iter().copied(), app_id).map(|mut bundle| {
                wire::bundle::mark_handed_on(&mut bundle);
                bundle
            }),
        };
        match message {
            Ok(message) => {
                Settlement::bare(subject, Successor::message(self.to_tasks(queue, message)))
            }
            // What was decoded always encodes. If it ever does not, the bundle comes again, and is split.
            Err(error) => {
                tracing::error!(%error, "tasks of a bundle could not be encoded");
                Settlement::bare(subject, Successor::HandBack)
            }
        }
    }

    /// The order that sends the same attempt again, under a fresh count of the broker's.
    fn again(&self, ended: &Ended, subject: Subject, after: Duration) -> Settlement {
        let (task, at) = (&ended.task, ended.finished_at);
        let mut message = wire::task::for_republish(&ended.message());
        let release = ended.lease.as_ref().map(|fence| {
            wire::lease::set_fence(&mut message, fence.number);
            lease_note(task, fence, LeaseChange::Released, at)
        });
        let (mut outgoing, _) = self.delayed(&task.queue, message, after);
        // A suspect that did not run here is one still, which the broker no longer says.
        if wire::crash::is_returned(&ended.message()) {
            wire::crash::mark_returned(&mut outgoing.message);
        }
        Settlement {
            then: Then::MayReturn,
            notes: release.into_iter().collect(),
            ..Settlement::bare(subject, Successor::message(outgoing))
        }
    }

    /// The order for a message that never became an attempt.
    pub(crate) fn refusal(
        &self,
        arrival: Arrival<'_>,
        reason: DeadReason,
        error: &str,
    ) -> Settlement {
        let Arrival { delivery, message, queue, at } = arrival;
        let letter = self.letter(message, queue, reason, error, at);
        self.dead(Subject::Delivery(delivery), &letter)
    }

    /// The order that gives a message an id.
    pub(crate) fn identification(&self, arrival: Arrival<'_>) -> Settlement {
        let (id, message) = wire::task::assign_id(arrival.message);
        tracing::debug!(%id, "a task without an id got one");
        let successor = Successor::message(self.to_tasks(arrival.queue, message));
        Settlement::bare(Subject::Delivery(arrival.delivery), successor)
    }

    fn result(&self, ended: &Ended, output: Payload) -> TaskResult {
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
            worker: Arc::clone(&self.worker),
            started_at: ended.started_at,
            finished_at: ended.finished_at,
        }
    }

    fn cancelled(&self, ended: &Ended, reason: &str, attempt: u32) -> TaskResult {
        let task = &ended.task;
        TaskResult {
            id: task.id.clone(),
            name: task.name.clone(),
            queue: task.queue.clone(),
            batch: task.batch.clone(),
            status: Status::Cancelled,
            output: None,
            error: Some(reason.to_owned()),
            reason: None,
            attempt,
            redelivered: ended.redelivered,
            worker: Arc::clone(&self.worker),
            started_at: ended.started_at,
            finished_at: ended.finished_at,
        }
    }

    fn retry(&self, ended: &Ended, subject: Subject, after: Duration, error: &str) -> Settlement {
        let (task, at) = (&ended.task, ended.finished_at);
        let mut message =
            wire::task::next_attempt(&ended.message(), task.attempt.saturating_add(1));
        wire::task::note_first_attempt(&mut message, ended.started_at);
        if let Some(fence) = &ended.lease {
            wire::lease::set_fence(&mut message, fence.number);
        }
        let (outgoing, after) = self.delayed(&task.queue, message, after);
        let release =
            ended.lease.as_ref().map(|fence| lease_note(task, fence, LeaseChange::Released, at));
        let note = Report::Retrying(RetryNote {
            id: task.id.clone(),
            name: task.name.clone(),
            batch: task.batch.clone(),
            attempt: task.attempt,
            error: error.chars().take(MAX_NOTE_CHARS).collect(),
            next_at: at.plus(after),
            worker: self.worker.to_string(),
            at,
        });
        // A plain reply has no form for "not yet".
        let reply = task.reply.clone().filter(|to| to.format == ReplyFormat::Bundle);
        let reply = self.reply(reply);
        Settlement {
            reply: reply.map(|to| Reply::Other(to, Box::new(note.clone()))),
            notes: std::iter::once(note).chain(release).collect(),
            ..Settlement::bare(subject, Successor::message(outgoing))
        }
    }

    fn dead(&self, subject: Subject, letter: &DeadLetter) -> Settlement {
        let dead = self.topology.dead();
        let message = letter.encode();
        let outgoing = Outgoing { exchange: dead.clone(), routing_key: dead, message };
        let reply = self.reply(wire::task::reply_of(&letter.message)).zip(letter.to_result());
        Settlement {
            then: if letter.reason.is_final() { Then::Over } else { Then::MayReturn },
            reply: reply.map(|(to, result)| Reply::Other(to, Box::new(Report::Finished(result)))),
            ..Settlement::bare(subject, Successor::message(outgoing))
        }
    }

    /// Where a reply goes, unless the task names a queue that takes none.
    fn reply(&self, to: Option<ReplyTo>) -> Option<ReplyTo> {
        to.filter(|to| self.replies.admits(&to.queue))
    }

    fn letter(
        &self,
        message: &Message,
        queue: &QueueName,
        reason: DeadReason,
        error: &str,
        at: Timestamp,
    ) -> DeadLetter {
        let letter = DeadLetter::new(message, queue.as_str(), reason, error, &self.worker);
        DeadLetter { at, ..letter }
    }

    /// The way that a message takes that is to arrive after a while, and how long that is.
    fn delayed(
        &self,
        queue: &QueueName,
        message: Message,
        after: Duration,
    ) -> (Outgoing, Duration) {
        match self.topology.delay_route(after) {
            None => (self.to_tasks(queue, message), Duration::ZERO),
            Some(route) => {
                let message = wire::task::with_delay_marks(&message, &route.marks);
                let routing_key = queue.to_string();
                (Outgoing { exchange: route.exchange, routing_key, message }, route.delay)
            }
        }
    }

    fn to_tasks(&self, queue: &QueueName, message: Message) -> Outgoing {
        let exchange = self.topology.tasks_exchange();
        Outgoing { exchange, routing_key: queue.to_string(), message }
    }
}

fn lease_note(task: &TaskMessage, fence: &Fence, change: LeaseChange, at: Timestamp) -> Report {
    Report::Lease(LeaseNote { id: task.id.clone(), fence: fence.clone(), change, at })
}
