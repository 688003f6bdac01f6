//! Validated names and ids.
//!
//! Comes in: text from configuration, callers and messages. Goes out: a name that is valid
//! everywhere. Every name ends up in an AMQP short string (255 bytes), in RabbitMQ's management UI
//! and in logs, so the alphabets are small. Ids are less restricted, because foreign producers
//! choose their own.

use std::borrow::Borrow;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::printable::is_printable;

/// The queue of tasks that name no other queue. Every process declares it.
pub const DEFAULT_QUEUE: &str = "default";

/// An invalid name or id; the message states the rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind} {given:?} is not valid: {rule}")]
pub struct InvalidName {
    kind: &'static str,
    given: String,
    rule: &'static str,
}

impl InvalidName {
    fn new(kind: &'static str, given: &str, rule: &'static str) -> Self {
        // Ids can be of any length; log lines must not be.
        let given = given.chars().take(80).collect();
        Self { kind, given, rule }
    }
}

macro_rules! checked_name {
    ($(#[$doc:meta])* $name:ident, $kind:literal, $rule:literal, $valid:expr) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(Arc<str>);

        impl $name {
            #[doc = concat!("Validates `text` against the rule: ", $rule, ".")]
            pub fn new(text: &str) -> Result<Self, InvalidName> {
                let valid: fn(&str) -> bool = $valid;
                if valid(text) {
                    Ok(Self(Arc::from(text)))
                } else {
                    Err(InvalidName::new($kind, text, $rule))
                }
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }

        impl FromStr for $name {
            type Err = InvalidName;
            fn from_str(text: &str) -> Result<Self, InvalidName> {
                Self::new(text)
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.serialize_str(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                let text = String::deserialize(from)?;
                Self::new(&text).map_err(serde::de::Error::custom)
            }
        }
    };
}

checked_name!(
    /// The name of a task, by convention with dots: `text.count_words`.
    TaskName,
    "task name",
    "1 to 128 characters out of A-Z a-z 0-9 . _ - :",
    |text| (1..=128).contains(&text.len()) && text.bytes().all(|b| word_byte(b) || b == b':')
);

checked_name!(
    /// The short name of a queue of tasks: `default`, `cpu`.
    QueueName,
    "queue name",
    "1 to 100 characters out of A-Z a-z 0-9 . _ -",
    |text| (1..=100).contains(&text.len()) && text.bytes().all(word_byte)
);

checked_name!(
    /// The prefix of every broker object of one installation. Namespaces share no objects.
    Namespace,
    "namespace",
    "1 to 64 characters out of A-Z a-z 0-9 . _ -",
    |text| (1..=64).contains(&text.len()) && text.bytes().all(word_byte)
);

checked_name!(
    /// The id of a task. Garenne generates UUIDv7; foreign producers may choose any printable text.
    TaskId,
    "task id",
    "1 to 128 printable characters",
    id_text
);

checked_name!(
    /// The id of a batch, or its [key](Self::generate_key).
    BatchId,
    "batch id",
    "1 to 128 printable characters",
    id_text
);

impl TaskId {
    /// Generates an id: a UUIDv7, so that ids sort by the time of their generation.
    pub fn generate() -> Self {
        Self(uuid_text())
    }
}

impl BatchId {
    /// Generates an id: a UUIDv7. Every client that knows the id can add members to the batch; see
    /// [`generate_key`](Self::generate_key).
    pub fn generate() -> Self {
        Self(uuid_text())
    }

    /// An id of text that is known to be valid.
    pub(crate) fn of_text(text: &str) -> Self {
        Self(Arc::from(text))
    }
}

impl Default for QueueName {
    fn default() -> Self {
        Self(Arc::from(DEFAULT_QUEUE))
    }
}

fn uuid_text() -> Arc<str> {
    let mut buffer = uuid::Uuid::encode_buffer();
    Arc::from(&*uuid::Uuid::now_v7().as_hyphenated().encode_lower(&mut buffer))
}

fn word_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-')
}

/// Whether text is a valid id. Ids are shown in terminals and log files, so they must be printable.
fn id_text(text: &str) -> bool {
    // The fast path: nearly every id is plain ASCII, and every result has one.
    if (1..=128).contains(&text.len()) && text.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
        return true;
    }
    // 128 characters of four bytes each would exceed AMQP's 255 bytes, so both are limited.
    !text.is_empty()
        && text.len() <= 255
        && text.chars().count() <= 128
        && text.chars().all(is_printable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn task_names_are_limited_to_their_alphabet() {
        for good in ["text.count_words", "a", "A-b:c.9"] {
            assert!(TaskName::new(good).is_ok(), "{good}");
        }
        for bad in ["", "a b", "a/b", "é", "a\n", &"x".repeat(129)] {
            assert!(TaskName::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn ids_may_have_any_printable_characters() {
        for good in ["order 17/2026", "été", "{\"a\":1}"] {
            assert!(TaskId::new(good).is_ok(), "{good}");
        }
        for bad in ["", "a\u{1b}[31m", "a\0", "a\u{202e}b", &"é".repeat(129), &"x".repeat(129)] {
            assert!(TaskId::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn generated_ids_are_valid_and_sort_by_time() {
        let first = TaskId::generate();
        std::thread::sleep(std::time::Duration::from_millis(2));
        let second = TaskId::generate();
        assert!(first < second);
        assert_eq!(TaskId::new(first.as_str()).as_ref(), Ok(&first));
    }

    #[test]
    fn the_error_states_the_rule_and_is_short() {
        let error = QueueName::new(&"q!".repeat(500)).unwrap_err().to_string();
        assert!(error.contains("1 to 100 characters"), "{error}");
        assert!(error.len() < 250, "{error}");
    }
}
