//! How an attempt ended ([`Outcome`]), and what becomes of its message ([`Disposition`]).
//!
//! A failed task is an outcome, never an error of the worker. `decide` derives the disposition from the
//! outcome, and `settle` carries it out.

use std::io;
use std::time::Duration;

use garenne_common::wire::CrashRecord;
use garenne_common::{DeadReason, Payload};
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::history::RETURN_DELAY;

/// How an attempt ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// The handler returned this output.
    Succeeded(Payload),
    /// The handler returned an error.
    Failed(TaskError),
    /// The arguments do not fit the handler; another attempt would fail in the same way.
    BadArguments(String),
    /// It exceeded its time limit, which is the value.
    TimedOut(Duration),
    /// The handler panicked with this message.
    Panicked(String),
    /// The child process that ran it died.
    Crashed(Crash),
    /// The worker stops and its grace period is over.
    Interrupted,
    /// It could not start, for a reason that lies in the worker or its machine.
    NotStarted(StartFailure),
    /// It was cancelled and did not end within `worker.cancel_grace`.
    Cancelled,
}

impl Outcome {
    /// The outcome of a handler that returned an error.
    pub(crate) fn of_error(error: TaskError) -> Self {
        match error.retryable {
            Retryable::OutOfResources => {
                Self::NotStarted(StartFailure::new(StartFailureKind::Resources, error.message))
            }
            Retryable::ByPolicy | Retryable::After(_) | Retryable::Never => Self::Failed(error),
        }
    }

    /// The outcome of a handler that returned an error which is not retried.
    pub(crate) fn fatal(message: impl Into<String>) -> Self {
        Self::Failed(TaskError::fatal(message))
    }
}

/// The death of a child process, which ran this attempt and nothing else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Crash {
    /// All crashes of the task so far, this one included.
    pub record: CrashRecord,
    /// The number of crashes at which the task is given up.
    pub budget: u32,
    /// The signal or exit code that ended the process, as text.
    pub how: String,
}

/// Why an attempt could not start. The task is not at fault: it is tried again later or in another worker
/// and loses no attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StartFailure {
    /// Which tasks are affected.
    pub kind: StartFailureKind,
    /// The error text.
    pub detail: String,
    /// Delay before the task is tried again.
    pub after: Duration,
}

/// Which tasks a [`StartFailure`] affects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StartFailureKind {
    /// All tasks: the process or machine has no file descriptor, thread, process or memory left.
    Resources,
    /// Tasks of one name: their program is missing, being written or not executable on this machine.
    Command,
    /// Isolated attempts: no child process can be started.
    Isolation,
}

impl StartFailure {
    pub(crate) fn new(kind: StartFailureKind, detail: String) -> Self {
        Self { kind, detail, after: RETURN_DELAY }
    }

    /// A failure of kind `Resources` if this error of the operating system means that.
    pub(crate) fn of_shortage(error: &io::Error, what: &str) -> Option<Self> {
        is_shortage(error)
            .then(|| Self::new(StartFailureKind::Resources, format!("{what}: {error}")))
    }
}

/// Whether an error means that this process or machine has no file descriptor, process, thread or memory
/// left.
///
/// Only for operations in which `EAGAIN` has that meaning, such as starting a process.
pub(crate) fn is_shortage(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM | Errno::EAGAIN))
}

/// What becomes of the message of an attempt.
#[derive(Debug, Clone, PartialEq)]
pub enum Disposition {
    /// The result is published; then the message is acknowledged.
    Complete(Payload),
    /// The next attempt is published with a delay; then the message is acknowledged.
    Retry {
        /// Delay of the next attempt.
        after: Duration,
        /// The error text.
        error: String,
    },
    /// The same attempt is published with a delay; then the message is acknowledged.
    Again {
        /// The delay.
        after: Duration,
    },
    /// A dead letter is published; then the message is acknowledged.
    DeadLetter {
        /// Why the task is given up.
        reason: DeadReason,
        /// The error text.
        error: String,
    },
    /// The message returns to its queue unchanged and loses no attempt.
    Requeue,
    /// A cancelled result is published; then the message is acknowledged.
    Cancel {
        /// The reason of the cancel request.
        reason: String,
    },
}

/// Why a handler failed, and whether another attempt may help.
///
/// Any error converts into it with `?` and is then retried according to the task's retry policy. A handler
/// only names the exceptions: [`fatal`](Self::fatal) and [`retry_after`](Self::retry_after).
/// (Like `anyhow::Error`, it does not implement `std::error::Error` itself for that reason.)
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskError {
    message: String,
    retryable: Retryable,
}

/// Whether another attempt may help.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Retryable {
    /// Yes, after the delay of the task's retry policy.
    ByPolicy,
    /// Yes, after this delay.
    After(Duration),
    /// No.
    Never,
    /// Yes, and it costs no attempt: the worker lacked file descriptors, threads or memory.
    OutOfResources,
}

impl TaskError {
    /// A failure that is retried according to the task's retry policy.
    pub fn retry(message: impl Into<String>) -> Self {
        Self { message: message.into(), retryable: Retryable::ByPolicy }
    }

    /// A failure that another attempt may not repeat if it starts after `delay`.
    pub fn retry_after(delay: Duration, message: impl Into<String>) -> Self {
        Self { message: message.into(), retryable: Retryable::After(delay) }
    }

    /// A failure that is not retried: the task becomes a dead letter.
    pub fn fatal(message: impl Into<String>) -> Self {
        Self { message: message.into(), retryable: Retryable::Never }
    }

    /// Not a failure of the task: this worker lacks file descriptors, threads or memory to run it.
    ///
    /// The task is tried again later or in another worker without losing an attempt, and this worker runs
    /// fewer tasks at the same time for a while. Use it only for shortages that the task does not cause.
    pub fn out_of_resources(message: impl Into<String>) -> Self {
        Self { message: message.into(), retryable: Retryable::OutOfResources }
    }

    /// A failure with this advice.
    pub(crate) fn with(message: String, retryable: Retryable) -> Self {
        Self { message, retryable }
    }

    /// The error text.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// Whether another attempt may help.
    pub const fn retryable(&self) -> Retryable {
        self.retryable
    }
}

impl<E: std::error::Error> From<E> for TaskError {
    fn from(error: E) -> Self {
        let mut message = error.to_string();
        let mut cause = error.source();
        while let Some(inner) = cause {
            message.push_str(": ");
            message.push_str(&inner.to_string());
            cause = inner.source();
        }
        Self::retry(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_convert_into_retryable_ones_with_all_their_causes() {
        #[derive(Debug, thiserror::Error)]
        #[error("reading the list failed")]
        struct Outer(#[source] std::io::Error);
        let error = TaskError::from(Outer(std::io::Error::other("disk on fire")));
        assert_eq!(error, TaskError::retry("reading the list failed: disk on fire"));
    }
}
