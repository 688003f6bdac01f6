//! Fingerprints of tasks with ids chosen by their sender.
//!
//! A sender may use an id twice by mistake, for two different tasks. The first final record of an
//! id counts, so the second task would get the output of the first. The fingerprint, which is
//! copied from the task to its final record, reveals that. Generated ids are unique and need no
//! fingerprint.

use std::fmt;
use std::num::NonZeroU64;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest, Sha256};

use crate::names::TaskName;
use crate::wire::Payload;

/// Identifies the name and arguments of a task: the first 64 bits of a SHA-256 hash, 0 replaced by
/// 1.
///
/// The hash is that of the name, a zero byte, the content type, a zero byte, and the body. As text
/// it has 16 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fingerprint(NonZeroU64);

/// A text that is not a fingerprint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a fingerprint, which has 16 hexadecimal digits")]
pub struct InvalidFingerprint(String);

impl Fingerprint {
    /// The fingerprint of a task.
    pub fn of(name: &TaskName, args: &Payload) -> Self {
        let mut hash = Sha256::new();
        hash.update(name.as_str());
        hash.update([0]);
        hash.update(args.codec.content_type());
        hash.update([0]);
        hash.update(&args.bytes);
        let hash = hash.finalize();
        let mut first = [0; 8];
        first.copy_from_slice(&hash[..8]);
        Self::from_u64(u64::from_be_bytes(first))
    }

    /// The fingerprint stored as this number; 0 becomes 1.
    pub fn from_u64(number: u64) -> Self {
        Self(NonZeroU64::new(number).unwrap_or(NonZeroU64::MIN))
    }

    /// The fingerprint as a number, for storage.
    pub fn as_u64(self) -> u64 {
        self.0.get()
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl FromStr for Fingerprint {
    type Err = InvalidFingerprint;

    fn from_str(text: &str) -> Result<Self, InvalidFingerprint> {
        let hex = text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let number = u64::from_str_radix(text, 16).ok().filter(|_| hex);
        let invalid = || InvalidFingerprint(text.chars().take(40).collect());
        number.map(Self::from_u64).ok_or_else(invalid)
    }
}

impl Serialize for Fingerprint {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Fingerprint {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'_, str>::deserialize(from)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Codec;

    fn of(name: &str, args: &str) -> Fingerprint {
        let args = Payload { codec: Codec::Json, bytes: args.as_bytes().to_vec().into() };
        Fingerprint::of(&TaskName::new(name).unwrap(), &args)
    }

    /// The sample of docs/protocol.md, for clients in other languages.
    #[test]
    fn the_fingerprint_is_the_documented_one() {
        let fingerprint = of("garenne.echo", "{\"x\":1}");
        assert_eq!(fingerprint.to_string(), "5b6d47c3355032c5");
        assert_eq!(fingerprint.to_string().parse(), Ok(fingerprint));
    }

    #[test]
    fn tasks_with_another_name_or_arguments_have_another_fingerprint() {
        let one = of("a.b", "1");
        assert_eq!(one, of("a.b", "1"));
        assert!(one != of("a.b", "2") && one != of("a.c", "1"));
    }

    #[test]
    fn other_texts_are_refused() {
        for text in ["", "1", "+23456789abcdef0", "0123456789abcdeg", "0123456789abcdef0"] {
            assert!(text.parse::<Fingerprint>().is_err(), "{text}");
        }
    }
}
