//! From a delivery to an attempt, or to the order that settles it without one: decided, not done.

use std::sync::Arc;

use garenne_common::failpoints::Protection;
use garenne_common::{TaskMessage, TaskName, Timestamp, wire};

use crate::guard::{self, Verdict};
use crate::inflight::{Begin, DeliveryRef, Inflight, Key};
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
    let Arrival { delivery, message, queue, at } = arrival;
    match guard::inspect(message, queue, find, (at, signature.max_body)) {
        Verdict::Run(task, handler) => {
            let key = Key::of(&task, message);
            enter(&key, (task, handler), delivery, inflight)
        }
        Verdict::AssignId => Admission::Settle(Box::new(signature.identification(arrival))),
        Verdict::Refuse { reason, error } => {
            tracing::warn!(%queue, reason = reason.as_str(), error, "dead letter");
            Admission::Settle(Box::new(signature.refusal(arrival, reason, &error)))
        }
    }
}

/// The same for a task of a bundle.
pub fn admit_member<H>(
    (task, delivery): (Arc<TaskMessage>, DeliveryRef),
    (app_id, at): (&str, Timestamp),
    find: impl FnOnce(&TaskName) -> Option<H>,
    inflight: &Inflight,
    signature: &Signature,
) -> Admission<H> {
    match guard::inspect_member(&task, find, (at, signature.max_body)) {
        Ok(handler) => {
            let key = Key::of_member(&task);
            enter(&key, (task, handler), delivery, inflight)
        }
        Err((reason, error)) => {
            let (message, queue) = (wire::task::encode(&task, app_id), &task.queue);
            tracing::warn!(%queue, id = %task.id, reason = reason.as_str(), error, "dead letter");
            let arrival = Arrival { delivery, message: &message, queue, at };
            Admission::Settle(Box::new(signature.refusal(arrival, reason, &error)))
        }
    }
}

/// Decides about the tasks of a bundle that was delivered before: what is known here is settled with
/// its run, and everything else leaves the bundle, so that from now on each is counted by itself. One
/// of them may have killed a worker, so each is marked as one that came before.
pub fn split(
    tasks: &[TaskMessage],
    delivery: DeliveryRef,
    app_id: &str,
    inflight: &Inflight,
    signature: &Signature,
) -> Vec<Settlement> {
    let settlement = |task: &TaskMessage| match inflight.recognise(&Key::of_member(task), delivery)
    {
        Some(Begin::Adopted) => None,
        Some(Begin::Settled | Begin::Run) => {
            Some(Settlement::bare(Subject::Delivery(delivery), Successor::Confirmed))
        }
        None => Some(signature.single_out(delivery, task, app_id)),
    };
    tasks.iter().filter_map(settlement).collect()
}

/// Whether a bundle must be split before anything of it runs.
pub(crate) fn must_be_split(came_before: bool) -> bool {
    came_before && Protection::BundleSplit.is_enabled()
}

fn enter<H>(
    key: &Key,
    (task, handler): (Arc<TaskMessage>, H),
    delivery: DeliveryRef,
    inflight: &Inflight,
) -> Admission<H> {
    match inflight.begin(key, delivery) {
        Begin::Run => Admission::Run(task, handler),
        Begin::Adopted => {
            tracing::info!(id = %task.id, "adopted a redelivery");
            Admission::Adopted
        }
        Begin::Settled => {
            let subject = Subject::Delivery(delivery);
            Admission::Settle(Box::new(Settlement::bare(subject, Successor::Confirmed)))
        }
    }
}
