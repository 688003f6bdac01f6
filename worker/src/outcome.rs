//! What happened to an attempt, and what becomes of its message: two exhaustive enums.
//!
//! An [`Outcome`] is a value until `settle` acts on the [`Disposition`] that `decide` made of it.
//! A failed task is an outcome, never an error of the worker.

use std::io;
use std::time::Duration;

use garenne_common::wire::CrashRecord;
use garenne_common::{DeadReason, Payload};
use nix::errno::Errno;

use crate::suspect;

/// What happened to one attempt.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// The handler returned this output.
    Succeeded(Payload),
    /// The handler returned an error.
    Failed(TaskError),
    /// The arguments are not what the handler takes; no attempt can mend that.
    BadArguments(String),
    /// It ran past its limit.
    TimedOut(Duration),
    /// The handler panicked with this message.
    Panicked(String),
    /// The process that ran it died.
    Crashed(Crash),
    /// The worker is stopping and could not wait any longer.
    Interrupted,
    /// It could not begin, for a reason that lies with the worker or its machine.
    Unable(Trouble),
    /// It was cancelled and did not end in time.
    Cancelled,
}

/// The death of a process that ran one attempt and nothing else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Crash {
    /// All crashes charged to the task, this one included.
    pub record: CrashRecord,
    /// How many are too many.
    pub budget: u32,
    /// Which signal or exit code ended the process.
    pub how: String,
}

/// What kept an attempt from beginning. It says nothing about the task, which is tried again elsewhere or
/// later and loses no attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// What it concerns.
    pub kind: TroubleKind,
    /// What went wrong, in words.
    pub detail: String,
    /// How long the task waits until it is tried again.
    pub after: Duration,
}

/// What a [`Trouble`] concerns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TroubleKind {
    /// Every task: no file, thread, process or memory is to be had.
    Resources,
    /// Tasks of one name: their program is missing, busy or not executable on this machine.
    Command,
    /// Suspects: no child process for an isolated attempt can be started.
    Isolation,
}

impl Trouble {
    pub(crate) fn new(kind: TroubleKind, detail: String) -> Self {
        Self { kind, detail, after: suspect::RENEWAL }
    }

    /// If an error of the operating system says that resources are short.
    pub(crate) fn of_shortage(error: &io::Error, what: &str) -> Option<Self> {
        is_shortage(error).then(|| Self::new(TroubleKind::Resources, format!("{what}: {error}")))
    }
}

/// Whether an error says that this process or machine has no file, process, thread or memory left.
///
/// Only for operations in which `EAGAIN` means that, such as starting a process.
pub(crate) fn is_shortage(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM | Errno::EAGAIN))
}

/// What becomes of the message.
#[derive(Debug, Clone, PartialEq)]
pub enum Disposition {
    /// Its result goes out; then it is acknowledged.
    Complete(Payload),
    /// The next attempt goes to the delay queues; then it is acknowledged.
    Retry {
        /// How long the next attempt waits.
        after: Duration,
        /// What went wrong.
        error: String,
    },
    /// The same attempt goes to the delay queues, to be run again; then it is acknowledged.
    Again {
        /// How long it waits.
        after: Duration,
    },
    /// It goes to the dead letters; then it is acknowledged.
    DeadLetter {
        /// Why it is given up.
        reason: DeadReason,
        /// What went wrong.
        error: String,
    },
    /// It goes back to its queue as it is and costs no attempt.
    Requeue,
    /// Its result, that it was cancelled, goes out; then it is acknowledged.
    Cancel {
        /// Why it was cancelled.
        reason: String,
    },
}

/// Why a handler failed, and whether another attempt may help.
///
/// Any error turns into one by `?` and is then retried as the task's policy says, so a handler only
/// names the exceptions: [`fatal`](Self::fatal) and [`retry_after`](Self::retry_after).
/// (Like `anyhow::Error` it is therefore no `std::error::Error` itself.)
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskError {
    message: String,
    retryable: Retryable,
}

/// Whether another attempt may help.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retryable {
    /// Yes, after the wait that the task's policy computes.
    ByPolicy,
    /// Yes, but not before this has passed.
    After(Duration),
    /// No.
    Never,
    /// Yes, and it costs no attempt: the worker had too few files, threads or memory.
    OutOfResources,
}

impl TaskError {
    /// A failure that another attempt may mend.
    pub fn retry(message: impl Into<String>) -> Self {
        Self { message: message.into(), retryable: Retryable::ByPolicy }
    }

    /// A failure that another attempt may mend, but not before `delay` has passed.
    pub fn retry_after(delay: Duration, message: impl Into<String>) -> Self {
        Self { message: message.into(), retryable: Retryable::After(delay) }
    }

    /// A failure that no other attempt can mend; the task becomes a dead letter at once.
    pub fn fatal(message: impl Into<String>) -> Self {
        Self { message: message.into(), retryable: Retryable::Never }
    }

    /// No failure of the task: this worker has too few open files, threads or memory to run it.
    ///
    /// The task is tried again elsewhere or later without losing an attempt, and this worker runs fewer
    /// tasks at once for a while. Use it only for shortages that the task itself does not cause.
    pub fn out_of_resources(message: impl Into<String>) -> Self {
        Self { message: message.into(), retryable: Retryable::OutOfResources }
    }

    /// What went wrong, in words.
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
    fn errors_turn_into_retryable_ones_with_all_their_causes() {
        #[derive(Debug, thiserror::Error)]
        #[error("reading the list failed")]
        struct Outer(#[source] std::io::Error);
        let error = TaskError::from(Outer(std::io::Error::other("disk on fire")));
        assert_eq!(error, TaskError::retry("reading the list failed: disk on fire"));
    }
}
