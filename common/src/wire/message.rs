//! An AMQP message as plain data, without a client library's types.
//!
//! Comes in: what `broker` makes of a delivery. Goes out: what `broker` publishes. Header values
//! keep their AMQP type as far as a reader could take one type for another: a timestamp is not an
//! integer here, and bytes are not text.

use std::borrow::Cow;
use std::fmt;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

/// A whole message: properties, headers, body.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Message {
    /// The properties of AMQP's basic class that Garenne uses.
    pub properties: Properties,
    /// The header table, in the order written. Tables, arrays and voids in headers that Garenne
    /// does not define are left out.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// The body.
    pub body: Bytes,
}

/// AMQP's basic properties. `delivery_mode` is not among them: every message is persistent.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Properties {
    /// MIME type of the body.
    pub content_type: Option<String>,
    /// Compression of the body.
    pub content_encoding: Option<String>,
    /// AMQP's `type`: the task name, or the kind of message.
    pub kind: Option<String>,
    /// The id of the task, notice or query.
    pub message_id: Option<String>,
    /// The sender's own identifier, echoed in replies.
    pub correlation_id: Option<String>,
    /// The queue for a reply.
    pub reply_to: Option<String>,
    /// The name of the sender, shown in the management UI.
    pub app_id: Option<String>,
    /// Seconds since 1970.
    pub timestamp: Option<u64>,
    /// Messages with a higher priority are delivered first.
    pub priority: Option<u8>,
    /// How long the message may stay in a queue, in milliseconds, as text.
    pub expiration: Option<String>,
    /// The RabbitMQ user that published the message. The broker refuses a message whose `user_id`
    /// is not that of its connection, so a present value is verified. Never published again, since
    /// it would have to be the publisher's own.
    #[serde(skip)]
    pub user_id: Option<String>,
}

/// The name of a header. Garenne's own are constants; those of foreign clients are owned.
pub type HeaderName = Cow<'static, str>;

/// A header value.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum HeaderValue {
    /// UTF-8 text.
    Text(String),
    /// Any of AMQP's integers.
    Int(i64),
    /// Either of AMQP's floats.
    Float(f64),
    /// A boolean.
    Bool(bool),
    /// A value of a type that no header of Garenne has.
    Foreign(ForeignValue),
}

/// A header value of a type that no header of Garenne has.
///
/// Kept apart from the other types so that it is neither taken for one of them nor lost when a
/// worker publishes the message again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ForeignValue {
    /// AMQP's timestamp: seconds since 1970.
    Timestamp(u64),
    /// A byte array, or a long string that is not UTF-8.
    Bytes(Bytes),
    /// A decimal number, `value` / 10^`scale`.
    Decimal {
        /// How many digits of `value` are behind the decimal point.
        scale: u8,
        /// The unscaled number.
        value: u32,
    },
    /// A table or an array in a header that Garenne defines. Its content is not kept.
    Nested,
}

impl HeaderValue {
    fn bytes(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Foreign(ForeignValue::Bytes(bytes)) => bytes.len(),
            Self::Int(_) | Self::Float(_) | Self::Bool(_) | Self::Foreign(_) => 8,
        }
    }
}

/// For error messages: the type and the value.
impl fmt::Display for HeaderValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => {
                // The message goes on behind it, so the text must not fill it.
                let start: String = text.chars().take(100).collect();
                let cut = if start.len() < text.len() { "…" } else { "" };
                write!(f, "the text {start:?}{cut}")
            }
            Self::Int(number) => write!(f, "the integer {number}"),
            Self::Float(number) => write!(f, "the float {number}"),
            Self::Bool(truth) => write!(f, "the boolean {truth}"),
            Self::Foreign(ForeignValue::Timestamp(at)) => write!(f, "the timestamp {at}"),
            Self::Foreign(ForeignValue::Bytes(bytes)) => {
                write!(f, "{} bytes that are not text", bytes.len())
            }
            Self::Foreign(ForeignValue::Decimal { scale, value }) => {
                write!(f, "the decimal {value}e-{scale}")
            }
            Self::Foreign(ForeignValue::Nested) => f.write_str("a table or array"),
        }
    }
}

/// Size of one header in a frame: approximate, and never too small.
pub(super) fn header_bytes(name: &str, value: &HeaderValue) -> usize {
    name.len() + value.bytes() + 8
}

impl Message {
    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&HeaderValue> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value)
    }

    /// Size of the headers in a frame, in bytes: approximate, and never too small.
    pub fn header_bytes(&self) -> usize {
        self.headers.iter().map(|(name, value)| header_bytes(name, value)).sum()
    }

    /// Sets a header, replacing an earlier value.
    pub fn set_header(&mut self, name: impl Into<HeaderName>, value: HeaderValue) {
        let name = name.into();
        self.headers.retain(|(key, _)| *key != name);
        self.headers.push((name, value));
    }
}
