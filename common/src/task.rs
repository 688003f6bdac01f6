//! A task: the contract that both ends share, and the unit of work that travels.

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::fingerprint::Fingerprint;
use crate::names::{BatchId, DEFAULT_QUEUE, QueueName, TaskId, TaskName};
use crate::retry::RetryPolicy;
use crate::timestamp::Timestamp;
use crate::wire::Payload;

/// The contract between the two ends of a task: one struct holds the arguments, and names the rest.
///
/// ```
/// use garenne_common::Task;
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Serialize, Deserialize)]
/// struct CountWords {
///     text: String,
/// }
///
/// impl Task for CountWords {
///     const NAME: &'static str = "text.count_words";
///     type Output = u64;
/// }
/// ```
///
/// Keep the types plain when they travel as bincode: no recursion, no `#[serde(untagged)]`,
/// `flatten` or `skip_serializing_if`, which that format cannot carry. JSON carries them all.
pub trait Task: Serialize + DeserializeOwned + Send + 'static {
    /// The name that producers publish under and workers register. See [`TaskName`] for the alphabet.
    const NAME: &'static str;
    /// The queue it goes to unless the submission names another.
    const QUEUE: &'static str = DEFAULT_QUEUE;
    /// What the handler returns.
    type Output: Serialize + DeserializeOwned + Send + 'static;
}

/// One task on its way: identity, arguments and how to treat it.
#[derive(Debug, Clone, PartialEq)]
pub struct TaskMessage {
    /// Identity; the same over all attempts.
    pub id: TaskId,
    /// Which handler runs it.
    pub name: TaskName,
    /// The queue it travels through; on the wire this is the routing key.
    pub queue: QueueName,
    /// The arguments.
    pub args: Payload,
    /// Which attempt this message asks for; the first is 1.
    pub attempt: u32,
    /// The batch that counts it.
    pub batch: Option<BatchId>,
    /// Who wants the result itself.
    pub reply: Option<ReplyTo>,
    /// How to treat it.
    pub options: Options,
    /// When its producer submitted it.
    pub submitted_at: Option<Timestamp>,
    /// W3C trace context of the submission.
    pub traceparent: Option<Arc<str>>,
    /// Present if its sender has chosen the id.
    pub fingerprint: Option<Fingerprint>,
}

/// How a task wants to be treated. Everything has a default.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Options {
    /// How often and how fast it is tried again.
    pub retry: RetryPolicy,
    /// The longest one attempt may run; the worker's default when absent.
    pub timeout: Option<Duration>,
    /// When the attempt is told to come to an end; it may still return until `timeout` is over.
    pub soft_timeout: Option<Duration>,
    /// A task that has not started by then is given up.
    pub expires_at: Option<Timestamp>,
    /// Higher goes first where the broker knows priorities (quorum queues from RabbitMQ 4.0).
    pub priority: Option<u8>,
}

/// Where a copy of the result goes, beside the collector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplyTo {
    /// The queue, reached through the default exchange.
    pub queue: Arc<str>,
    /// The sender's own mark, echoed in the reply.
    pub correlation_id: Option<String>,
    /// What the sender can read.
    pub format: ReplyFormat,
}

/// What a reply looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ReplyFormat {
    /// One JSON message per task, for any client.
    #[default]
    Plain,
    /// Garenne's own report bundles, many results in a message.
    Bundle,
}
