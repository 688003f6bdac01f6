//! The trait that producer and worker share, and the task as it is transported.

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::fingerprint::Fingerprint;
use crate::names::{BatchId, DEFAULT_QUEUE, QueueName, TaskId, TaskName};
use crate::retry::RetryPolicy;
use crate::timestamp::Timestamp;
use crate::wire::Payload;

/// A typed task: the struct holds the arguments, and the trait defines name, queue and output.
///
/// Producer and worker share the type.
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
/// Types that are encoded as bincode must not be recursive, nor use `#[serde(untagged)]`, `flatten`
/// or `skip_serializing_if`, which that format does not support. JSON supports them all.
pub trait Task: Serialize + DeserializeOwned + Send + 'static {
    /// The name under which producers publish and workers register the task; see [`TaskName`].
    const NAME: &'static str;
    /// The queue of the task unless the submission names another.
    const QUEUE: &'static str = DEFAULT_QUEUE;
    /// What the handler returns.
    type Output: Serialize + DeserializeOwned + Send + 'static;
}

/// One task: its id, arguments and options.
#[derive(Debug, Clone, PartialEq)]
pub struct TaskMessage {
    /// The id; the same in all attempts.
    pub id: TaskId,
    /// The name, which selects the handler.
    pub name: TaskName,
    /// The queue; on the wire this is the routing key.
    pub queue: QueueName,
    /// The arguments.
    pub args: Payload,
    /// The number of the attempt to run; the first is 1.
    pub attempt: u32,
    /// The batch that the task is a member of: its id or key.
    pub batch: Option<BatchId>,
    /// Where the reply goes, if one is wanted.
    pub reply: Option<ReplyTo>,
    /// The options.
    pub options: Options,
    /// When the producer submitted the task, by its clock.
    pub submitted_at: Option<Timestamp>,
    /// W3C trace context of the submission.
    pub traceparent: Option<Arc<str>>,
    /// Present if its sender has chosen the id.
    pub fingerprint: Option<Fingerprint>,
}

/// Options of a task. Every option has a default.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Options {
    /// How often and after which delays the task is tried again.
    pub retry: RetryPolicy,
    /// Longest time that one attempt may run; `None` for the worker's default.
    pub timeout: Option<Duration>,
    /// How long after its start an attempt is asked to stop. It may still return until `timeout`.
    pub soft_timeout: Option<Duration>,
    /// The task is given up unless an attempt has started by then.
    pub expires_at: Option<Timestamp>,
    /// Tasks with a higher priority are delivered first, on quorum queues from RabbitMQ 4.0 on.
    pub priority: Option<u8>,
}

/// Where a copy of the result is sent, in addition to the collector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplyTo {
    /// The queue, published to through the default exchange.
    pub queue: Arc<str>,
    /// The sender's own identifier, echoed in the reply.
    pub correlation_id: Option<String>,
    /// The format of the reply.
    pub format: ReplyFormat,
}

/// The format of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ReplyFormat {
    /// One JSON message per task, which any client can read.
    #[default]
    Plain,
    /// Report bundles with many results per message.
    Bundle,
}
