//! From a delivery to an attempt, or to the order that settles it without one: decided, not done.

use std::sync::Arc;

use garenne_common::{TaskMessage, TaskName};

use crate::guard::{self, Verdict};
use crate::inflight::{Begin, Inflight, Key};
use crate::settle::{Arrival, Settlement, Signature, Subject, Successor};

/// What becomes of a delivery; `H` is how the caller names a handler.
pub enum Admission<H> {
    /// Run it; its attempt counts as begun.
    Run(Arc<TaskMessage>, H),
    /// It runs here already and will be settled with that run.
    Adopted,
    /// It is not to be run.
    Settle(Box<Settlement>),
}

/// Decides about a delivery: is it sound and known (`find`), does it run here, has it just ended?
pub fn admit<H>(
    arrival: Arrival<'_>,
    find: impl FnOnce(&TaskName) -> Option<H>,
    inflight: &Inflight,
    signature: &Signature,
) -> Admission<H> {
    let settle = |settlement| Admission::Settle(Box::new(settlement));
    let Arrival { delivery, message, queue, at } = arrival;
    let (task, handler) = match guard::inspect(message, queue, find, at) {
        Verdict::Run(task, handler) => (task, handler),
        Verdict::AssignId => return settle(signature.identification(arrival)),
        Verdict::Refuse { reason, error } => {
            tracing::warn!(%queue, reason = reason.as_str(), error, "dead letter");
            return settle(signature.refusal(arrival, reason, &error));
        }
    };
    match inflight.begin(&Key::of(&task, message), delivery) {
        Begin::Run => Admission::Run(task, handler),
        Begin::Adopted => {
            tracing::info!(id = %task.id, "adopted a redelivery");
            Admission::Adopted
        }
        Begin::Settled => {
            settle(Settlement::bare(Subject::Delivery(delivery), Successor::Confirmed))
        }
    }
}
