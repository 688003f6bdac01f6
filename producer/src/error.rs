//! What can go wrong for a producer: on submitting, on waiting for an output, on asking the collector.
//!
//! Each message is a sentence for a person and says what to do next; its cause is its source.

use std::time::Duration;

use garenne_common::broker::BrokerError;
use garenne_common::wire::codec::CodecError;
use garenne_common::wire::{MAX_BODY_BYTES, Malformed};
use garenne_common::{BatchId, DeadReason, InvalidName, QueueName, TaskId};

/// A task, or the opening or sealing of a batch, is not known to be with the broker.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SubmitError {
    /// The submission contradicts the rules; nothing was sent.
    #[error("the submission is not valid: {0}")]
    Invalid(String),
    /// The queue does not exist; nothing was sent.
    #[error(
        "no queue named {queue} exists, so the task would wait for ever; start a worker that serves it \
         (garenne-worker --queues {queue}) or create it (garenne topology apply --queue {queue})"
    )]
    UnknownQueue {
        /// Which.
        queue: QueueName,
    },
    /// The encoded arguments are too large; nothing was sent.
    #[error(
        "the arguments have {bytes} bytes, and a task may have at most {MAX_BODY_BYTES}; put large data \
         somewhere else and pass its address"
    )]
    TooLarge {
        /// How large they are.
        bytes: usize,
    },
    /// The broker did not confirm the task in time.
    ///
    /// It may have arrived nevertheless. Submitting it again under the same id is safe: the first
    /// final result of an id counts, later ones are dropped.
    #[error(
        "task {id} was not confirmed ({source}); it may have arrived nevertheless, so submit it again \
         with the same id"
    )]
    Unconfirmed {
        /// The id to use again.
        id: TaskId,
        /// What happened.
        source: BrokerError,
    },
    /// The broker could not be used; no task was sent.
    #[error(transparent)]
    Broker(#[from] BrokerError),
}

/// Why there is no output.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum OutputError {
    /// The task was given up; it is kept as a dead letter.
    #[error("task {id} failed on attempt {attempt} ({}, by {worker}): {error}", word(*reason))]
    Failed {
        /// Which task.
        id: TaskId,
        /// Why it was given up; a worker in another language may not say.
        reason: Option<DeadReason>,
        /// The last error, in the worker's words.
        error: String,
        /// The attempt that ended it; 0 if none was made.
        attempt: u32,
        /// Who ran it, or who gave it up.
        worker: String,
    },
    /// The task was cancelled.
    #[error("task {id} was cancelled: {reason}")]
    Cancelled {
        /// Which task.
        id: TaskId,
        /// Why, in the words of whoever cancelled it.
        reason: String,
    },
    /// The task succeeded, but its output is not of the expected type.
    #[error(
        "task {id} succeeded, but its output is not what this program expects ({source}); build both \
         ends from the same task type"
    )]
    Decode {
        /// Which task.
        id: TaskId,
        /// What did not fit.
        source: CodecError,
    },
    /// Another task with the same id has ended: its name or arguments differ. This task may not have run.
    #[error(
        "another task with the id {id} was submitted before (its name or arguments differ), and the \
         first result of an id counts; submit this task with another id"
    )]
    Conflict {
        /// The id.
        id: TaskId,
    },
    /// No result came within the time given; the task may still be waiting or running.
    #[error(
        "task {id} has no result after {waited:?}; wait longer, or look with: garenne task show {id}"
    )]
    NoAnswer {
        /// Which task.
        id: TaskId,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The producer was closed while the handle waited; the task itself goes on.
    #[error(
        "the producer was closed before the result of task {id} came; look with: garenne task show {id}"
    )]
    Closed {
        /// Which task.
        id: TaskId,
    },
}

/// Why there is no answer from the collector, or no notice.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum QueryError {
    /// Nobody answered.
    #[error(
        "no collector answered within {waited:?}; is garenne-collector running on this broker and \
         namespace?"
    )]
    NoCollector {
        /// How long it was waited for.
        waited: Duration,
    },
    /// The collector declined.
    #[error("the collector refused the question: {0}")]
    Refused(String),
    /// The answer cannot be read.
    #[error(
        "the collector's answer cannot be read ({0}); are producer and collector of the same version?"
    )]
    Malformed(#[from] Malformed),
    /// A replay was to go to a queue that does not exist.
    #[error(
        "queue {queue} does not exist; start a worker that serves it, or declare it with: \
         garenne topology apply --queue {queue}"
    )]
    UnknownQueue {
        /// Which queue.
        queue: QueueName,
    },
    /// A batch was not done in the time given.
    #[error(
        "batch {batch} is not done after {waited:?}; wait longer, or look with: \
         garenne batch show {batch}"
    )]
    NotDone {
        /// Which batch.
        batch: BatchId,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The broker could not be used.
    #[error(transparent)]
    Broker(#[from] BrokerError),
}

impl SubmitError {
    /// Whether the same submission may succeed later without a change by a person.
    pub const fn is_transient(&self) -> bool {
        match self {
            Self::Invalid(_) | Self::UnknownQueue { .. } | Self::TooLarge { .. } => false,
            Self::Unconfirmed { source, .. } | Self::Broker(source) => source.is_transient(),
        }
    }
}

impl OutputError {
    /// Whether waiting again can help. A task that ended stays as it ended.
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
    /// Whether asking again can help without a change by a person.
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

fn word(reason: Option<DeadReason>) -> &'static str {
    reason.map_or("no reason given", DeadReason::as_str)
}

/// What a failed publish means for one of its tasks.
pub(crate) fn submit_error(id: &TaskId, error: BrokerError) -> SubmitError {
    // These are answers: the broker, or our own encoder, did not take the message.
    if matches!(error, BrokerError::Rejected(_) | BrokerError::TooLong(_)) {
        return error.into();
    }
    SubmitError::Unconfirmed { id: id.clone(), source: error }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_queue_says_what_to_do() {
        let queue = QueueName::new("gpu").unwrap();
        let text = SubmitError::UnknownQueue { queue }.to_string();
        assert!(text.contains("garenne topology apply --queue gpu"), "{text}");
    }

    #[test]
    fn an_unconfirmed_task_names_the_id_to_use_again() {
        let id = TaskId::new("t-1").unwrap();
        let source = BrokerError::Unconfirmed(Duration::from_secs(15));
        let error = SubmitError::Unconfirmed { id, source };
        assert!(error.is_transient());
        assert!(error.to_string().starts_with("task t-1 was not confirmed"), "{error}");
    }

    #[test]
    fn what_only_a_person_can_mend_is_not_transient() {
        assert!(!SubmitError::TooLarge { bytes: 1 }.is_transient());
        assert!(!SubmitError::from(BrokerError::Forbidden("no".to_owned())).is_transient());
        assert!(QueryError::NoCollector { waited: Duration::ZERO }.is_transient());
        assert!(!QueryError::Refused("no".to_owned()).is_transient());
    }
}
