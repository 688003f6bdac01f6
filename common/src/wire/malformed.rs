//! The error of every decoder, and the sizes beyond which no decoder looks into a message.

use crate::printable::neutral;

/// Largest body that is decoded, in bytes. RabbitMQ refuses larger messages by default from 4.0 on.
pub const MAX_BODY_BYTES: usize = 16 * 1024 * 1024;

/// Largest JSON of reports, queries or notices that is decoded, in bytes. A parsed value takes up
/// to thirty times as much memory as its text.
pub const MAX_JSON_BYTES: usize = 1024 * 1024;

/// Most reports in one bundle that is decoded. Garenne's own bundles have a few thousand at most.
pub const MAX_REPORTS: usize = 10_000;

/// Largest header table that is accepted, in bytes. Headers share one frame of 128 KiB, and every
/// process that publishes a message again adds some.
pub const MAX_HEADER_BYTES: usize = 64 * 1024;

/// A message that violates the protocol; the text describes how.
///
/// It is the sender's error and not the worker's: such a message becomes a dead letter, unchanged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(pub String);

impl Malformed {
    pub(super) fn new(what: impl std::fmt::Display) -> Self {
        // The reason quotes its input, which may be of any length.
        let reason: String = what.to_string().chars().take(500).collect();
        // Some of it is not escaped: a JSON parser repeats an unknown word as it is.
        Self(neutral(&reason).into_owned())
    }
}

/// Refuses a body of more than `most` bytes; `what` names it in the error.
pub(super) fn within(what: &str, bytes: &[u8], most: usize) -> Result<(), Malformed> {
    if bytes.len() <= most {
        return Ok(());
    }
    Err(Malformed::new(format_args!(
        "{what} of {} bytes is too large; at most {most} are accepted",
        bytes.len()
    )))
}

impl From<crate::names::InvalidName> for Malformed {
    fn from(error: crate::names::InvalidName) -> Self {
        Self::new(error)
    }
}
