//! The wire protocol: how tasks, reports, dead letters, notices and questions look as AMQP messages.
//!
//! A public protocol, described in docs/protocol.md and held still by golden samples. Everything here
//! is pure: bytes and headers in, checked values out, and no input makes it panic. Only this module
//! names a codec crate; nothing here names lapin.

pub mod bundle;
pub mod codec;
pub mod collector;
pub mod control;
pub mod crash;
pub mod dead;
pub mod depth;
pub mod frames;
mod headers;
pub mod heartbeat;
pub mod lease;
pub mod letters;
pub mod message;
pub mod notice;
pub mod query;
pub mod replay;
pub mod report;
pub mod stalled;
pub mod task;

pub use codec::{Codec, CodecError, Payload};
pub use collector::CollectorHeartbeat;
pub use control::{CancelRequest, CancelTarget, Control};
pub(crate) use headers::{DELAY_MARK, is_defined as is_defined_header};

pub use crash::CrashRecord;
pub use dead::DeadLetter;
pub use depth::MAX_DEPTH;
pub use heartbeat::Heartbeat;
pub use lease::{Fence, Lease, LeaseChange, LeaseNote};
pub use letters::{
    DeadCursor, DeadFilter, DeadPage, DeadSummary, LetterMessage, LetterState, Purged, ReplayItem,
    ReplayOutcome, ReplayPlan, Replayed,
};
pub use message::{ForeignValue, HeaderName, HeaderValue, Message, Properties};
pub use notice::{BatchState, BatchSummary, Notice, TaskSummary};
pub use query::{BatchStatus, CancelState, Cancelled, Query, Response, TaskState};
pub use report::{Report, RetryNote};
pub use stalled::{ParkedKind, QuietBatch, Stalled};

use crate::printable::neutral;

/// No body larger than this is looked into: RabbitMQ 4 refuses larger ones anyway.
pub const MAX_BODY_BYTES: usize = 16 * 1024 * 1024;

/// No JSON of reports, questions or notices larger than this is looked into: a parsed value takes up
/// to some thirty times the room of its text.
pub const MAX_JSON_BYTES: usize = 1024 * 1024;

/// No bundle of more reports than this is taken; Garenne's own have at most some thousand.
pub const MAX_REPORTS: usize = 10_000;

/// No headers larger than this are taken: they share one frame of 128 KiB, and whoever passes a
/// message on adds some.
pub const MAX_HEADER_BYTES: usize = 64 * 1024;

/// The message is not what the protocol says; the text says where.
///
/// Never a worker's error: a message that decodes to this goes to the dead letters as it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(pub String);

impl Malformed {
    fn new(what: impl std::fmt::Display) -> Self {
        // A reason quotes its input; bounded, because the input is not.
        let reason: String = what.to_string().chars().take(500).collect();
        // Not all of it is quoted: a JSON parser repeats a word that it does not know as it is.
        Self(neutral(&reason).into_owned())
    }
}

/// Refuses what is too large to be looked into.
fn within(what: &str, bytes: &[u8], most: usize) -> Result<(), Malformed> {
    if bytes.len() <= most {
        return Ok(());
    }
    Err(Malformed::new(format_args!(
        "{what} of {} bytes is too large, more than {most}",
        bytes.len()
    )))
}

impl From<crate::InvalidName> for Malformed {
    fn from(error: crate::InvalidName) -> Self {
        Self::new(error)
    }
}

impl From<CodecError> for Malformed {
    fn from(error: CodecError) -> Self {
        Self::new(error)
    }
}
