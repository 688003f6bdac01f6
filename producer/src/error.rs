//! Errors of a producer: of submissions, of waits for an output, of queries to the collector.
//!
//! Each message says what is wrong and, after a semicolon, what to do. The cause is the error's
//! source.

use std::time::Duration;

use garenne_common::broker::BrokerError;
use garenne_common::wire::codec::CodecError;
use garenne_common::wire::{MAX_BODY_BYTES, Malformed};
use garenne_common::{BatchId, DeadReason, InvalidName, QueueName, TaskId};

/// Why a task, or the opening or sealing of a batch, is not known to be with the broker.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SubmitError {
    /// The submission is not valid; nothing was sent.
    #[error("the submission is not valid: {0}")]
    Invalid(String),
    /// The queue does not exist; nothing was sent.
    #[error(
        "queue {queue} does not exist, so no worker would get the task; start a worker that \
         serves it, or declare the queue"
    )]
    UnknownQueue {
        /// The queue.
        queue: QueueName,
    },
    /// The encoded arguments are too large; nothing was sent.
    #[error(
        "the arguments have {bytes} bytes, more than the {MAX_BODY_BYTES} that a task may have; \
         store large data elsewhere and pass a reference to it"
    )]
    TooLarge {
        /// Size of the encoded arguments in bytes.
        bytes: usize,
    },
    /// The broker did not confirm the task in time.
    ///
    /// The task may have arrived all the same. Submitting it again under the same id is safe: the
    /// first final result of an id counts, later ones are dropped.
    #[error(
        "task {id} was not confirmed ({source}) and may have arrived all the same; submit it \
         again with the same id"
    )]
    Unconfirmed {
        /// The id to submit the task again with.
        id: TaskId,
        /// Why there was no confirm.
        source: BrokerError,
    },
    /// The broker could not be used; nothing was sent.
    #[error(transparent)]
    Broker(#[from] BrokerError),
}

/// Why a task has no output.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum OutputError {
    /// The task failed for good; it is kept as a dead letter.
    #[error("task {id} failed on attempt {attempt} ({}, by {worker}): \
             {error}", reason_code(*reason))]
    Failed {
        /// The task.
        id: TaskId,
        /// The reason; workers in other languages may omit it.
        reason: Option<DeadReason>,
        /// The last error, as the worker reported it.
        error: String,
        /// The last attempt; 0 if none was made.
        attempt: u32,
        /// The process that ran the task or made it a dead letter.
        worker: String,
    },
    /// The task was cancelled.
    #[error("task {id} was cancelled: {reason}")]
    Cancelled {
        /// The task.
        id: TaskId,
        /// The reason given with the cancel request.
        reason: String,
    },
    /// The task succeeded, but its output does not have the expected type.
    #[error(
        "task {id} succeeded, but its output does not have the expected type ({source}); use the \
         same task type in the producer and the worker"
    )]
    Decode {
        /// The task.
        id: TaskId,
        /// The decoding error.
        source: CodecError,
    },
    /// Another task with the same id has ended: its name or arguments differ. This task may not have
    /// run.
    #[error(
        "another task with the id {id} was submitted before (its name or arguments differ), and \
         the first result of an id counts; submit this task with another id"
    )]
    Conflict {
        /// The id.
        id: TaskId,
    },
    /// No result arrived within the given time; the task may still wait or run.
    #[error("task {id} has no result after {waited:?}; wait longer, or query its state")]
    NoAnswer {
        /// The task.
        id: TaskId,
        /// How long the result was waited for.
        waited: Duration,
    },
    /// The producer was closed while the handle waited; the task is not affected.
    #[error(
        "the producer was closed before the result of task {id} arrived; query the state of the \
         task"
    )]
    Closed {
        /// The task.
        id: TaskId,
    },
}

/// Why a query to the collector has no response, or why a batch or a notice cannot be waited for.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum QueryError {
    /// No collector responded.
    #[error(
        "no collector answered within {waited:?}; is a collector running on this broker and \
         namespace?"
    )]
    NoCollector {
        /// How long the response was waited for.
        waited: Duration,
    },
    /// The collector refused the query.
    #[error("the collector refused the query: {0}")]
    Refused(String),
    /// The response is malformed or has an unexpected type.
    #[error(
        "the collector's response is not valid ({0}); are producer and collector of the same \
         version?"
    )]
    Malformed(#[from] Malformed),
    /// The queue that a replay should go to does not exist.
    #[error("queue {queue} does not exist; start a worker that serves it, or declare the queue")]
    UnknownQueue {
        /// The queue.
        queue: QueueName,
    },
    /// A batch was not done within the given time.
    #[error("batch {batch} is not done after {waited:?}; wait longer, or query its state")]
    NotDone {
        /// The batch.
        batch: BatchId,
        /// How long the batch was waited for.
        waited: Duration,
    },
    /// The broker could not be used.
    #[error(transparent)]
    Broker(#[from] BrokerError),
}

impl SubmitError {
    /// Whether the same submission may succeed later without anybody changing anything.
    pub const fn is_transient(&self) -> bool {
        match self {
            Self::Invalid(_) | Self::UnknownQueue { .. } | Self::TooLarge { .. } => false,
            Self::Unconfirmed { source, .. } | Self::Broker(source) => source.is_transient(),
        }
    }
}

impl OutputError {
    /// Whether waiting again can help. A task that has ended does not change.
    pub const fn is_transient(&self) -> bool {
        match self {
            Self::NoAnswer { .. } => true,
            Self::Failed { .. }
            | Self::Cancelled { .. }
            | Self::Decode { .. }
            | Self::Conflict { .. }
            | Self::Closed { .. } => false,
        }
    }
}

impl QueryError {
    /// Whether the same query may succeed later without anybody changing anything.
    pub const fn is_transient(&self) -> bool {
        match self {
            Self::NoCollector { .. } | Self::NotDone { .. } => true,
            Self::Refused(_) | Self::Malformed(_) | Self::UnknownQueue { .. } => false,
            Self::Broker(error) => error.is_transient(),
        }
    }
}

impl From<InvalidName> for SubmitError {
    fn from(error: InvalidName) -> Self {
        Self::Invalid(error.to_string())
    }
}

impl From<CodecError> for SubmitError {
    fn from(error: CodecError) -> Self {
        match error {
            CodecError::TooLarge(bytes) => Self::TooLarge { bytes },
            CodecError::Encode(_) | CodecError::Decode(_) => {
                Self::Invalid(format!("the arguments {error}"))
            }
        }
    }
}

fn reason_code(reason: Option<DeadReason>) -> &'static str {
    reason.map_or("no reason given", DeadReason::as_str)
}

/// The error of one task of a message that could not be published.
pub(crate) fn submit_error(id: &TaskId, error: BrokerError) -> SubmitError {
    // The broker or our own encoder has refused the message, so it has certainly not arrived.
    if matches!(error, BrokerError::Rejected(_) | BrokerError::TooLong(_)) {
        return error.into();
    }
    SubmitError::Unconfirmed { id: id.clone(), source: error }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_queue_is_named_with_what_to_do() {
        let queue = QueueName::new("gpu").unwrap();
        let text = SubmitError::UnknownQueue { queue }.to_string();
        assert!(text.starts_with("queue gpu does not exist"), "{text}");
        assert!(text.contains("start a worker"), "{text}");
    }

    #[test]
    fn an_unconfirmed_task_is_transient_and_names_its_id() {
        let id = TaskId::new("t-1").unwrap();
        let source = BrokerError::Unconfirmed(Duration::from_secs(15));
        let error = SubmitError::Unconfirmed { id, source };
        assert!(error.is_transient());
        assert!(error.to_string().starts_with("task t-1 was not confirmed"), "{error}");
    }

    #[test]
    fn errors_that_need_a_person_are_not_transient() {
        assert!(!SubmitError::TooLarge { bytes: 1 }.is_transient());
        assert!(!SubmitError::from(BrokerError::Forbidden("no".to_owned())).is_transient());
        assert!(QueryError::NoCollector { waited: Duration::ZERO }.is_transient());
        assert!(!QueryError::Refused("no".to_owned()).is_transient());
    }
}
