//! A message as AMQP carries it, without a client library's types.

use std::borrow::Cow;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

/// A whole message: properties, headers, body.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Message {
    /// The properties of AMQP's basic class that Garenne uses.
    pub properties: Properties,
    /// The header table, in the order written. Nested tables and arrays of foreign senders are left out.
    pub headers: Vec<(HeaderName, HeaderValue)>,
    /// The body.
    pub body: Bytes,
}

/// AMQP's basic properties. `delivery_mode` is not among them: everything is persistent.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Properties {
    /// MIME type of the body.
    pub content_type: Option<String>,
    /// Compression of the body.
    pub content_encoding: Option<String>,
    /// AMQP's `type`: the task name, or what else the message is.
    pub kind: Option<String>,
    /// The id of the task, notice or question.
    pub message_id: Option<String>,
    /// The sender's own mark.
    pub correlation_id: Option<String>,
    /// The queue for a reply.
    pub reply_to: Option<String>,
    /// Who sent it; for people who look at the management UI.
    pub app_id: Option<String>,
    /// Seconds since 1970.
    pub timestamp: Option<u64>,
    /// Higher goes first.
    pub priority: Option<u8>,
    /// Milliseconds that the message may wait in a queue, as text.
    pub expiration: Option<String>,
    /// The user of RabbitMQ that published it: whoever sets it has had it checked by the broker. Never
    /// published again from here, since it must be the publisher's own.
    #[serde(skip)]
    pub user_id: Option<String>,
}

/// The name of a header; ours are constants, foreign ones are owned.
pub type HeaderName = Cow<'static, str>;

/// A header value.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum HeaderValue {
    /// Text.
    Text(String),
    /// Any of AMQP's integers.
    Int(i64),
    /// Either of AMQP's floats.
    Float(f64),
    /// A truth value.
    Bool(bool),
}

impl HeaderValue {
    fn bytes(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Int(_) | Self::Float(_) | Self::Bool(_) => 8,
        }
    }
}

pub(super) fn header_bytes(name: &str, value: &HeaderValue) -> usize {
    name.len() + value.bytes() + 8
}

impl Message {
    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&HeaderValue> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value)
    }

    /// How much room the headers take in a frame, roughly and never too little.
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
