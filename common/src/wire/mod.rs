//! The wire protocol: tasks, reports, dead letters, notices and queries as AMQP messages.
//!
//! Comes in: bytes and headers, from any client. Goes out: checked values, or [`Malformed`].
//! Nothing here does IO, names lapin, or panics on any input. docs/protocol.md describes the
//! protocol, and golden samples hold the code to it. Only [`codec`] names a codec crate.

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
mod malformed;
pub mod message;
pub mod notice;
pub mod query;
pub mod replay;
pub mod report;
pub mod stalled;
pub mod task;
mod versioned;

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
pub use malformed::{MAX_BODY_BYTES, MAX_HEADER_BYTES, MAX_JSON_BYTES, MAX_REPORTS, Malformed};
pub use message::{ForeignValue, HeaderName, HeaderValue, Message, Properties};
pub use notice::{BatchState, BatchSummary, Notice, TaskSummary};
pub use query::{BatchStatus, CancelState, Cancelled, Query, Response, TaskState};
pub use report::{Report, RetryNote};
pub use stalled::{ParkedKind, QuietBatch, Stalled};
