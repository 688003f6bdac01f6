//! Orders to settle: whose deliveries, and what must be confirmed before they are acknowledged.

use garenne_common::broker::Outgoing;
use garenne_common::wire::Report;
use garenne_common::{ReplyTo, TaskResult};

use crate::inflight::{DeliveryRef, Key};

/// Whose deliveries a settlement is about.
#[derive(Debug)]
pub enum Subject {
    /// All deliveries of an attempt, adopted ones included.
    Attempt(Key),
    /// One delivery that never became an attempt.
    Delivery(DeliveryRef),
}

/// What must be confirmed before the deliveries are acknowledged.
#[derive(Debug)]
pub enum Successor {
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
pub struct Settlement {
    /// Whose deliveries.
    pub subject: Subject,
    /// What must be confirmed first.
    pub successor: Successor,
    /// Whether the same task and attempt may rightly arrive again and must then run.
    pub may_return: bool,
    /// For the collector, not waited for.
    pub note: Option<Report>,
    /// For whoever asked for the result itself; best effort and never part of settling.
    pub reply: Option<(ReplyTo, Report)>,
}

impl Settlement {
    /// A settlement that only says what becomes of the deliveries.
    pub fn bare(subject: Subject, successor: Successor) -> Self {
        Self { subject, successor, may_return: false, note: None, reply: None }
    }
}
