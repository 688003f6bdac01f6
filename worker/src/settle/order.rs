//! Orders to settle: whose deliveries, and what must be confirmed before they are acknowledged.

use garenne_common::ReplyTo;
use garenne_common::broker::Outgoing;
use garenne_common::wire::Report;

use crate::inflight::{DeliveryRef, Key};

/// Whose deliveries a settlement is about.
#[derive(Debug)]
pub enum Subject {
    /// All deliveries of an attempt, adopted ones included.
    Attempt(Key),
    /// One delivery, or one task of a bundle, that never became an attempt.
    Delivery(DeliveryRef),
    /// So many tasks of a bundle that never became attempts.
    Members(DeliveryRef, usize),
    /// No delivery: the settlement only carries notes.
    Nothing,
}

/// What must be confirmed before the deliveries are acknowledged.
#[derive(Debug)]
pub enum Successor {
    /// How the task ended, for the collector, bundled with others.
    Result(Report),
    /// A message of its own; in a box, because few tasks need one and all settlements are moved.
    Message(Box<Outgoing>),
    /// Nothing: a successor was confirmed before.
    Confirmed,
    /// None: the deliveries go back to their queue.
    HandBack,
}

/// What the acknowledgement means for the attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// It is over; the same task and attempt need not run again.
    Over,
    /// It is over, but the same task and attempt may rightly arrive again and must then run.
    MayReturn,
    /// It goes on under a lease; the same message, if it arrives, need not run.
    RunsOn,
}

/// An order to settle.
#[derive(Debug)]
pub struct Settlement {
    /// Whose deliveries.
    pub subject: Subject,
    /// What must be confirmed first.
    pub successor: Successor,
    /// What that means for the attempt.
    pub then: Then,
    /// For the collector, said when the successor is confirmed; nothing waits for them.
    pub notes: Vec<Report>,
    /// For whoever asked for the result itself; best effort and never part of settling.
    pub reply: Option<Reply>,
}

/// What a sender hears itself.
#[derive(Debug)]
pub enum Reply {
    /// The same as the collector, whose [`Successor::Result`] it is.
    Result(ReplyTo),
    /// Something of its own.
    Other(ReplyTo, Box<Report>),
}

impl Successor {
    /// A message of its own.
    pub fn message(outgoing: Outgoing) -> Self {
        Self::Message(Box::new(outgoing))
    }
}

impl Settlement {
    /// A settlement that only says what becomes of the deliveries.
    pub fn bare(subject: Subject, successor: Successor) -> Self {
        Self { subject, successor, then: Then::Over, notes: vec![], reply: None }
    }
}

/// Deliveries that a confirm settles.
#[derive(Debug)]
pub(super) struct Claim {
    pub(super) subject: Subject,
    pub(super) then: Then,
}
