//! A settlement: which deliveries are to be acknowledged, and what must be confirmed before.

use garenne_common::ReplyTo;
use garenne_common::broker::Outgoing;
use garenne_common::wire::Report;

use crate::intake::queue::DeliveryRef;
use crate::run::known_attempts::AttemptKey;

/// What a settlement settles.
#[derive(Debug, Clone)]
pub enum Subject {
    /// All deliveries of an attempt that has ended. The same attempt need not run again.
    Ended(AttemptKey),
    /// All deliveries of an attempt that has ended. The same attempt may arrive again and must run then.
    MayReturn(AttemptKey),
    /// All deliveries of an attempt that continues under a lease. The same message need not run again.
    Leased(AttemptKey),
    /// Tasks of one delivery that did not become attempts. A delivery that is not a bundle has one.
    Tasks {
        /// The delivery.
        delivery: DeliveryRef,
        /// Number of its tasks.
        count: usize,
    },
    /// Nothing: the settlement only carries notes or a reply.
    None,
}

impl Subject {
    /// A single task of a delivery that did not become an attempt.
    pub fn task(delivery: DeliveryRef) -> Self {
        Self::Tasks { delivery, count: 1 }
    }
}

/// What must be confirmed before the deliveries are acknowledged.
#[derive(Debug)]
pub enum Successor {
    /// The result of the task for the collector, published in a bundle with others.
    Result(Report),
    /// A message of its own. Boxed, since few tasks need one and all settlements are moved.
    Message(Box<Outgoing>),
    /// Nothing: the successor has been confirmed before.
    Confirmed,
    /// There is no successor: the deliveries return to their queue.
    Requeue,
}

impl Successor {
    /// A message of its own.
    pub fn message(outgoing: Outgoing) -> Self {
        Self::Message(Box::new(outgoing))
    }
}

/// What the settlement task is to do about one task.
#[derive(Debug)]
pub struct Settlement {
    /// The deliveries.
    pub subject: Subject,
    /// What must be confirmed before.
    pub successor: Successor,
    /// Reports for the collector that are published once the successor is confirmed. Nothing waits for
    /// their confirms.
    pub notes: Vec<Report>,
    /// For a sender that waits for the result itself; best effort, and not waited for.
    pub reply: Option<Reply>,
}

/// A reply to the sender of a task.
#[derive(Debug)]
pub struct Reply {
    /// Where it goes.
    pub to: ReplyTo,
    /// What it contains; `None` for the report of [`Successor::Result`].
    pub report: Option<Box<Report>>,
}

impl Reply {
    /// A reply with a report of its own.
    pub(crate) fn of(to: ReplyTo, report: Report) -> Self {
        Self { to, report: Some(Box::new(report)) }
    }
}

impl Settlement {
    /// A settlement without notes and reply.
    pub fn new(subject: Subject, successor: Successor) -> Self {
        Self { subject, successor, notes: vec![], reply: None }
    }
}
