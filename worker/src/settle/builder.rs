//! Builds settlements: which message is the successor of a task, and which notes and replies go with it.
//!
//! Pure: publishes nothing, and the time is a parameter.

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

use super::settlement::{Reply, Settlement, Subject, Successor};
use crate::intake::queue::DeliveryRef;
use crate::intake::source::{Arrival, TaskSource};
use crate::run::history;
use crate::run::known_attempts::AttemptKey;
use crate::run::outcome::Disposition;

/// Error texts of notes are truncated to this number of characters, since many notes share a message.
const MAX_NOTE_CHARS: usize = 4_000;

/// An attempt of a task.
pub struct Attempt {
    /// The task.
    pub task: Arc<TaskMessage>,
    /// The message or bundle that it arrived in.
    pub source: TaskSource,
    /// Whether the broker has delivered it before.
    pub redelivered: bool,
    /// When the attempt started.
    pub started_at: Timestamp,
    /// When it ended; equal to `started_at` before that.
    pub finished_at: Timestamp,
    /// The execution, if the collector holds the task under a lease.
    pub lease: Option<Fence>,
}

impl Attempt {
    /// An attempt that starts at `at` without a lease.
    pub fn new(task: Arc<TaskMessage>, arrival: Arrival, at: Timestamp) -> Self {
        let Arrival { source, redelivered, delivery: _ } = arrival;
        Self { task, source, redelivered, started_at: at, finished_at: at, lease: None }
    }

    fn key(&self) -> AttemptKey {
        AttemptKey::of(&self.task, &self.source)
    }

    fn message(&self) -> Cow<'_, Message> {
        self.source.message()
    }
}

/// Builds the settlements of one worker.
pub struct SettlementBuilder {
    /// Where successors are published.
    pub topology: Topology,
    /// Maximum size of a task's body, in bytes.
    pub max_body: usize,
    /// Which queues may receive replies.
    pub replies: ReplyGate,
    /// Name of the worker.
    pub worker: Arc<str>,
}

impl SettlementBuilder {
    /// The settlement that carries out a disposition.
    pub fn build(&self, attempt: &Attempt, disposition: Disposition) -> Settlement {
        let (task, key) = (&attempt.task, attempt.key());
        match disposition {
            Disposition::Complete(output) => {
                self.finished(attempt, key, self.succeeded(attempt, output))
            }
            Disposition::Cancel { reason } => {
                self.finished(attempt, key, self.cancelled(attempt, &reason, task.attempt))
            }
            Disposition::Retry { after, error } => self.retry(attempt, key, after, &error),
            Disposition::DeadLetter { reason, error } => {
                let (message, at) = (attempt.message(), attempt.finished_at);
                let mut letter = self.letter(&message, &task.queue, reason, &error, at);
                letter.started_at = Some(attempt.started_at);
                letter.redelivered = attempt.redelivered;
                if let Some(fence) = &attempt.lease {
                    wire::lease::set_execution(&mut letter.message, fence);
                }
                let subject =
                    if reason.is_final() { Subject::Ended(key) } else { Subject::MayReturn(key) };
                self.dead(subject, &letter)
            }
            Disposition::Again { after } => self.again(attempt, key, after),
            Disposition::Requeue => match &attempt.lease {
                None => self.requeue(key, &attempt.source, task),
                Some(fence) => self.requeue_leased(attempt, key, fence),
            },
        }
    }

    /// The settlement of a task that was cancelled before this attempt started.
    pub fn cancelled_before_start(&self, attempt: &Attempt, reason: &str) -> Settlement {
        let result = self.cancelled(attempt, reason, attempt.task.attempt.saturating_sub(1));
        self.finished(attempt, attempt.key(), result)
    }

    fn finished(&self, attempt: &Attempt, key: AttemptKey, result: TaskResult) -> Settlement {
        let to = self.reply_to(attempt.task.reply.clone());
        let (reply, report) = match &attempt.lease {
            None => (to.map(|to| Reply { to, report: None }), Report::Finished(result)),
            Some(fence) => (
                to.map(|to| Reply::of(to, Report::Finished(result.clone()))),
                Report::FinishedUnderLease { fence: fence.clone(), result },
            ),
        };
        Settlement { reply, ..Settlement::new(Subject::Ended(key), Successor::Result(report)) }
    }

    /// The settlement that hands a running attempt over to the collector.
    pub fn lease(
        &self,
        task: &TaskMessage,
        source: &TaskSource,
        fence: &Fence,
        term: Duration,
    ) -> Settlement {
        let key = AttemptKey::of(task, source);
        let lease = Lease {
            id: task.id.clone(),
            message: source.message().into_owned(),
            queue: task.queue.clone(),
            fence: fence.clone(),
            worker: self.worker.to_string(),
            term,
        };
        let (results, message) = (self.topology.results(), lease.encode());
        let outgoing = Outgoing { exchange: results.clone(), routing_key: results, message };
        Settlement::new(Subject::Leased(key), Successor::message(outgoing))
    }

    /// The settlement that renews the lease of a running attempt.
    pub fn renewal(task: &TaskMessage, fence: &Fence, at: Timestamp) -> Settlement {
        let note = lease_note(task, fence, LeaseChange::Renewed, at);
        Settlement { notes: vec![note], ..Settlement::new(Subject::None, Successor::Confirmed) }
    }

    /// Its delivery has been acknowledged, so the task returns in a message of its own.
    fn requeue_leased(&self, attempt: &Attempt, key: AttemptKey, fence: &Fence) -> Settlement {
        let (task, at) = (&attempt.task, attempt.finished_at);
        let mut message = wire::task::for_republish(&attempt.message());
        wire::lease::set_fence(&mut message, fence.number);
        let successor = Successor::message(self.to_tasks(&task.queue, message));
        Settlement {
            notes: vec![lease_note(task, fence, LeaseChange::Released, at)],
            ..Settlement::new(Subject::MayReturn(key), successor)
        }
    }

    /// Returns a task to its queue; one from a bundle in a message of its own.
    fn requeue(&self, key: AttemptKey, source: &TaskSource, task: &TaskMessage) -> Settlement {
        let subject = Subject::MayReturn(key);
        match source {
            TaskSource::Message(message) => self.requeue_message(subject, message, &task.queue),
            TaskSource::Bundle { .. } => {
                let outgoing = self.to_tasks(&task.queue, source.message().into_owned());
                Settlement::new(subject, Successor::message(outgoing))
            }
        }
    }

    /// Returns a message to its queue. A message with many deliveries is published again instead, since
    /// the broker would count the return and the task look guilty by it.
    pub(crate) fn requeue_message(
        &self,
        subject: Subject,
        message: &Message,
        queue: &QueueName,
    ) -> Settlement {
        if !history::has_many_deliveries(message) {
            return Settlement::new(subject, Successor::Requeue);
        }
        let message = wire::task::for_republish(message);
        let (outgoing, _) = self.delayed(queue, message, history::RETURN_DELAY);
        Settlement::new(subject, Successor::message(outgoing))
    }

    /// The settlement of a task that leaves a bundle which was delivered before.
    pub(crate) fn split_from_bundle(
        &self,
        bundle: DeliveryRef,
        task: &TaskMessage,
        app_id: &str,
    ) -> Settlement {
        let mut message = wire::task::encode(task, app_id);
        wire::crash::mark_returned(&mut message);
        let successor = Successor::message(self.to_tasks(&task.queue, message));
        Settlement::new(Subject::task(bundle), successor)
    }

    /// Returns waiting tasks of a bundle to their queue: one task in a message of its own, several in a
    /// bundle that is new to the broker.
    pub(crate) fn rebalance(
        &self,
        bundle: DeliveryRef,
        tasks: &[&TaskMessage],
        app_id: &str,
        queue: &QueueName,
    ) -> Settlement {
        let subject = Subject::Tasks { delivery: bundle, count: tasks.len() };
        let message = match tasks {
            [task] => Ok(wire::task::encode(task, app_id)),
            several => wire::bundle::encode(several.iter().copied(), app_id).map(|mut bundle| {
                wire::bundle::mark_handed_on(&mut bundle);
                bundle
            }),
        };
        match message {
            Ok(message) => {
                Settlement::new(subject, Successor::message(self.to_tasks(queue, message)))
            }
            // Decoded tasks can always be encoded. If not, the bundle is delivered again and split.
            Err(error) => {
                tracing::error!(%error, "tasks of a bundle could not be encoded");
                Settlement::new(subject, Successor::Requeue)
            }
        }
    }

    /// Publishes the same attempt again with a delay. The broker's count of deliveries restarts.
    fn again(&self, attempt: &Attempt, key: AttemptKey, after: Duration) -> Settlement {
        let (task, at) = (&attempt.task, attempt.finished_at);
        let mut message = wire::task::for_republish(&attempt.message());
        let released = attempt.lease.as_ref().map(|fence| {
            wire::lease::set_fence(&mut message, fence.number);
            lease_note(task, fence, LeaseChange::Released, at)
        });
        let (mut outgoing, _) = self.delayed(&task.queue, message, after);
        // A suspect that did not run here remains one, although the broker's marks are gone.
        if wire::crash::is_returned(&attempt.message()) {
            wire::crash::mark_returned(&mut outgoing.message);
        }
        Settlement {
            notes: released.into_iter().collect(),
            ..Settlement::new(Subject::MayReturn(key), Successor::message(outgoing))
        }
    }

    /// The dead letter of a message that did not become an attempt.
    pub(crate) fn refuse(
        &self,
        arrival: &Arrival,
        queue: &QueueName,
        at: Timestamp,
        reason: DeadReason,
        error: &str,
    ) -> Settlement {
        let letter = self.letter(&arrival.source.message(), queue, reason, error, at);
        self.dead(Subject::task(arrival.delivery), &letter)
    }

    /// Publishes a message without an id again with one, so that redeliveries of it can be recognised.
    pub(crate) fn assign_id(&self, arrival: &Arrival, queue: &QueueName) -> Settlement {
        let (id, message) = wire::task::assign_id(&arrival.source.message());
        tracing::debug!(%id, "assigned an id to a task without one");
        let successor = Successor::message(self.to_tasks(queue, message));
        Settlement::new(Subject::task(arrival.delivery), successor)
    }

    fn succeeded(&self, attempt: &Attempt, output: Payload) -> TaskResult {
        let task = &attempt.task;
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
            redelivered: attempt.redelivered,
            worker: Arc::clone(&self.worker),
            started_at: attempt.started_at,
            finished_at: attempt.finished_at,
            fingerprint: task.fingerprint,
        }
    }

    fn cancelled(&self, attempt: &Attempt, reason: &str, number: u32) -> TaskResult {
        let task = &attempt.task;
        TaskResult {
            id: task.id.clone(),
            name: task.name.clone(),
            queue: task.queue.clone(),
            batch: task.batch.clone(),
            status: Status::Cancelled,
            output: None,
            error: Some(reason.to_owned()),
            reason: None,
            attempt: number,
            redelivered: attempt.redelivered,
            worker: Arc::clone(&self.worker),
            started_at: attempt.started_at,
            finished_at: attempt.finished_at,
            fingerprint: task.fingerprint,
        }
    }

    fn retry(
        &self,
        attempt: &Attempt,
        key: AttemptKey,
        after: Duration,
        error: &str,
    ) -> Settlement {
        let (task, at) = (&attempt.task, attempt.finished_at);
        let mut message =
            wire::task::next_attempt(&attempt.message(), task.attempt.saturating_add(1));
        wire::task::note_first_attempt(&mut message, attempt.started_at);
        if let Some(fence) = &attempt.lease {
            wire::lease::set_fence(&mut message, fence.number);
        }
        let (outgoing, after) = self.delayed(&task.queue, message, after);
        let released =
            attempt.lease.as_ref().map(|fence| lease_note(task, fence, LeaseChange::Released, at));
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
        // Plain replies have no form for a retry.
        let reply = task.reply.clone().filter(|to| to.format == ReplyFormat::Bundle);
        let reply = self.reply_to(reply);
        Settlement {
            reply: reply.map(|to| Reply::of(to, note.clone())),
            notes: std::iter::once(note).chain(released).collect(),
            ..Settlement::new(Subject::Ended(key), Successor::message(outgoing))
        }
    }

    fn dead(&self, subject: Subject, letter: &DeadLetter) -> Settlement {
        let dead = self.topology.dead();
        let message = letter.encode();
        let outgoing = Outgoing { exchange: dead.clone(), routing_key: dead, message };
        let reply = self.reply_to(wire::task::reply_of(&letter.message)).zip(letter.to_result());
        Settlement {
            reply: reply.map(|(to, result)| Reply::of(to, Report::Finished(result))),
            ..Settlement::new(subject, Successor::message(outgoing))
        }
    }

    /// Where a reply goes; `None` if the queue may not receive replies.
    fn reply_to(&self, to: Option<ReplyTo>) -> Option<ReplyTo> {
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

    /// A message that arrives after a delay, and the delay, rounded to what the delay queues support.
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
