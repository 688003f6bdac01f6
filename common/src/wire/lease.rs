//! Leases: how a task survives that runs longer than the broker waits for its acknowledgement.
//!
//! The worker publishes the whole message to `results` as a [`Lease`], with its terms in headers,
//! and acknowledges the delivery only after the confirm. From then on the collector holds the task:
//! it waits while the worker renews the lease, and publishes the message again when the lease
//! lapses. Every execution under a lease has a [`Fence`]; a higher number takes precedence over a
//! lower one.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::headers::{self, millis, number, text};
use super::malformed::Malformed;
use super::message::{HeaderValue, Message};
use super::task;
use crate::names::{QueueName, TaskId};
use crate::timestamp::Timestamp;

/// Identifies one execution under a lease among all executions of its task.
///
/// A handler may compare the number in its own store: an execution with a lower number is obsolete,
/// even if it still runs. The name distinguishes two executions with the same number, which a
/// duplicated message can cause; the collector then keeps the one that it has received first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fence {
    /// Grows with every execution of one message.
    pub number: u64,
    /// Unique to this execution.
    pub execution: String,
}

impl Fence {
    /// The fence of an execution that starts now.
    pub fn begin(number: u64) -> Self {
        Self { number, execution: uuid::Uuid::now_v7().simple().to_string() }
    }
}

/// A running task that a worker hands over to the collector.
#[derive(Debug, Clone, PartialEq)]
pub struct Lease {
    /// The id of the task.
    pub id: TaskId,
    /// The message of the task as it was delivered.
    pub message: Message,
    /// The queue of the task.
    pub queue: QueueName,
    /// The execution that holds the lease.
    pub fence: Fence,
    /// The name of the worker that runs it.
    pub worker: String,
    /// How long after the last renewal the lease lapses.
    pub term: Duration,
}

/// A worker's report about a lease that it holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LeaseNote {
    /// The id of the task.
    pub id: TaskId,
    /// The execution that holds the lease.
    pub fence: Fence,
    /// Whether the lease is renewed or released.
    pub change: LeaseChange,
    /// When the report was written, by the worker's clock.
    pub at: Timestamp,
}

/// The change that a worker reports for a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LeaseChange {
    /// The execution continues.
    Renewed,
    /// The execution has ended, and the broker has confirmed the next message of the task.
    Released,
}

impl Lease {
    /// Encodes the lease: the message of the task, and the terms in headers.
    pub fn encode(&self) -> Message {
        let mut message = task::for_republish(&self.message);
        // The worker has assigned an id to a message without one; the collector must use the same.
        message.properties.message_id = Some(self.id.to_string());
        let term = i64::try_from(self.term.as_millis()).unwrap_or(i64::MAX);
        set_fence(&mut message, self.fence.number);
        message.set_header(headers::LEASE_TERM, HeaderValue::Int(term));
        for (name, value) in [
            (headers::LEASE_EXECUTION, &self.fence.execution),
            (headers::LEASE_WORKER, &self.worker),
            (headers::LEASE_QUEUE, &self.queue.to_string()),
        ] {
            message.set_header(name, HeaderValue::Text(value.clone()));
        }
        message
    }

    /// Whether a message is a lease, by the presence of its header.
    pub fn is_one(message: &Message) -> bool {
        message.header(headers::LEASE_EXECUTION).is_some()
    }

    /// Decodes a lease.
    pub fn decode(message: &Message) -> Result<Self, Malformed> {
        headers::check(message)?;
        let missing = |name: &str| Malformed::new(format_args!("a lease without {name}"));
        let word =
            |name: &str| text(message, name)?.map(str::to_owned).ok_or_else(|| missing(name));
        let id = message.properties.message_id.as_deref().ok_or_else(|| missing("a message id"))?;
        let lease = Self {
            id: TaskId::new(id)?,
            queue: QueueName::new(&word(headers::LEASE_QUEUE)?)?,
            fence: Fence { number: fence_of(message)?, execution: word(headers::LEASE_EXECUTION)? },
            worker: word(headers::LEASE_WORKER)?,
            term: millis(message, headers::LEASE_TERM)?
                .ok_or_else(|| missing(headers::LEASE_TERM))?,
            message: without_terms(message),
        };
        Ok(lease)
    }
}

/// The fence number in the message of a task: that of its last execution under a lease, 0 if there
/// was none.
pub fn fence_of(message: &Message) -> Result<u64, Malformed> {
    Ok(number(message, headers::FENCE)?.unwrap_or(0))
}

/// The fence number of the execution that this delivery starts. It is higher than that of every
/// earlier execution, because it includes the broker's count of deliveries of this message.
pub fn next_fence(message: &Message) -> Result<u64, Malformed> {
    let returns = number(message, headers::DELIVERY_COUNT)?.unwrap_or(0);
    let handed_out = number(message, headers::ACQUIRED_COUNT)?.unwrap_or(0);
    Ok(fence_of(message)?.saturating_add(returns.max(handed_out)).saturating_add(1))
}

/// Sets the fence number of the last execution in a task's message that is published again.
pub fn set_fence(message: &mut Message, number: u64) {
    let number = i64::try_from(number).unwrap_or(i64::MAX);
    message.set_header(headers::FENCE, HeaderValue::Int(number));
}

/// Records in the message of a task that its last execution under a lease lapsed, perhaps because
/// the task killed its worker. The broker's count of deliveries starts at zero for every published
/// message, so this header carries the count on.
pub fn mark_lapsed(message: &mut Message) {
    let lapses = lapses(message).saturating_add(1);
    let lapses = HeaderValue::Int(i64::try_from(lapses).unwrap_or(i64::MAX));
    message.set_header(headers::LAPSES, lapses);
}

/// How many executions of this attempt under a lease lapsed in a row. For decoded tasks:
/// [`task::decode`] refuses a header of the wrong type, which counts as 0 here.
pub fn lapses(message: &Message) -> u64 {
    number(message, headers::LAPSES).ok().flatten().unwrap_or_default()
}

/// The execution under a lease that produced this message (a dead letter or the next attempt), if
/// there was one. `None` also if its headers have a wrong type: a malformed task never had a lease.
pub fn execution_of(message: &Message) -> Option<Fence> {
    let execution = text(message, headers::LEASE_EXECUTION).ok().flatten()?.to_owned();
    Some(Fence { number: fence_of(message).ok()?, execution })
}

/// Sets the execution under a lease that produces this message.
pub fn set_execution(message: &mut Message, fence: &Fence) {
    set_fence(message, fence.number);
    let execution = HeaderValue::Text(fence.execution.clone());
    message.set_header(headers::LEASE_EXECUTION, execution);
}

/// The message of the task without the terms of a lease.
pub fn without_terms(message: &Message) -> Message {
    let mut message = message.clone();
    message.headers.retain(|(name, _)| !name.starts_with("x-garenne-lease-"));
    message
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Properties;

    fn task() -> Message {
        let properties = Properties {
            kind: Some("a.b".to_owned()),
            message_id: Some("t-1".to_owned()),
            ..Properties::default()
        };
        Message { properties, headers: vec![], body: b"{}".to_vec().into() }
    }

    fn lease() -> Lease {
        Lease {
            id: TaskId::new("t-1").unwrap(),
            message: task(),
            queue: QueueName::new("cpu").unwrap(),
            fence: Fence { number: 3, execution: "e".to_owned() },
            worker: "w".to_owned(),
            term: Duration::from_mins(1),
        }
    }

    #[test]
    fn a_lease_carries_the_whole_task() {
        let encoded = lease().encode();
        assert!(Lease::is_one(&encoded) && !Lease::is_one(&task()));
        let mut read = Lease::decode(&encoded).unwrap();
        assert_eq!(fence_of(&read.message), Ok(3));
        read.message.headers.clear();
        assert_eq!(read, lease());
    }

    #[test]
    fn lapses_add_up_until_an_execution_ends() {
        let mut message = task();
        mark_lapsed(&mut message);
        mark_lapsed(&mut message);
        assert_eq!(lapses(&message), 2);
        assert_eq!(lapses(&task::for_republish(&message)), 2, "a republish keeps them");
        assert_eq!(lapses(&task::next_attempt(&message, 2)), 0);
        let record = crate::wire::CrashRecord::default();
        let charged = record.charged(Timestamp::from_millis(0), "w", "signal SIGABRT");
        assert_eq!(lapses(&charged.write(&message)), 0, "the crash was charged instead");
    }

    #[test]
    fn terms_that_are_missing_or_of_the_wrong_type_are_named() {
        let mut encoded = lease().encode();
        encoded.headers.retain(|(name, _)| name != headers::LEASE_TERM);
        let error = Lease::decode(&encoded).unwrap_err();
        assert_eq!(error.0, "a lease without x-garenne-lease-term-ms");
        encoded.set_header(headers::LEASE_TERM, HeaderValue::Bool(true));
        let error = Lease::decode(&encoded).unwrap_err();
        assert!(error.0.contains("x-garenne-lease-term-ms is the boolean true"), "{error}");
        let mut encoded = lease().encode();
        encoded.set_header(headers::RETURNED, HeaderValue::Int(1));
        assert!(Lease::decode(&encoded).unwrap_err().0.contains(headers::RETURNED));
    }

    #[test]
    fn every_delivery_of_a_message_has_a_higher_fence() {
        let mut message = task();
        assert_eq!(next_fence(&message), Ok(1));
        message.set_header("x-delivery-count", HeaderValue::Int(2));
        assert_eq!(next_fence(&message), Ok(3));
        set_fence(&mut message, 7);
        assert_eq!(next_fence(&message), Ok(10));
        message.set_header("x-garenne-fence", HeaderValue::Int(i64::MAX));
        assert!(next_fence(&message).is_ok());
    }
}
