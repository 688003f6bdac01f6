//! A dead letter's message at rest: properties and headers as versioned JSON beside the raw body.
//!
//! It must come back byte for byte when it is replayed, years later, by a newer version. So the
//! stored shape is apart from the wire types, and floats are kept as their bits: JSON has no NaN.

use std::borrow::Cow;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use garenne_common::wire::{ForeignValue, HeaderValue, Message, Properties};
use serde::{Deserialize, Serialize};

/// An envelope of another version, or none at all.
#[derive(Debug, thiserror::Error)]
#[error("not a stored message: {0}")]
pub struct EnvelopeError(#[from] serde_json::Error);

/// Every version ever written; a new one is a new variant.
#[derive(Serialize, Deserialize)]
#[serde(tag = "version")]
enum Envelope {
    #[serde(rename = "1")]
    V1(EnvelopeV1),
}

#[derive(Serialize, Deserialize)]
struct EnvelopeV1 {
    content_type: Option<String>,
    content_encoding: Option<String>,
    kind: Option<String>,
    message_id: Option<String>,
    correlation_id: Option<String>,
    reply_to: Option<String>,
    app_id: Option<String>,
    timestamp: Option<u64>,
    priority: Option<u8>,
    expiration: Option<String>,
    /// Envelopes of the first releases have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    user_id: Option<String>,
    headers: Vec<(String, ValueV1)>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum ValueV1 {
    Text(String),
    Int(i64),
    FloatBits(u64),
    Bool(bool),
    Timestamp(u64),
    /// In base64.
    Bytes(String),
    Decimal {
        scale: u8,
        value: u32,
    },
    Nested,
}

/// The envelope of a message: everything but its body.
pub fn seal_envelope(message: &Message) -> Result<String, EnvelopeError> {
    let Properties {
        content_type,
        content_encoding,
        kind,
        message_id,
        correlation_id,
        reply_to,
        app_id,
        timestamp,
        priority,
        expiration,
        user_id,
    } = message.properties.clone();
    let headers = message.headers.iter().map(|(name, value)| {
        let value = match value {
            HeaderValue::Text(text) => ValueV1::Text(text.clone()),
            HeaderValue::Int(number) => ValueV1::Int(*number),
            HeaderValue::Float(number) => ValueV1::FloatBits(number.to_bits()),
            HeaderValue::Bool(truth) => ValueV1::Bool(*truth),
            HeaderValue::Foreign(foreign) => match foreign {
                ForeignValue::Timestamp(seconds) => ValueV1::Timestamp(*seconds),
                ForeignValue::Bytes(bytes) => ValueV1::Bytes(STANDARD.encode(bytes)),
                ForeignValue::Decimal { scale, value } => {
                    ValueV1::Decimal { scale: *scale, value: *value }
                }
                ForeignValue::Nested => ValueV1::Nested,
            },
        };
        (name.to_string(), value)
    });
    let envelope = EnvelopeV1 {
        content_type,
        content_encoding,
        kind,
        message_id,
        correlation_id,
        reply_to,
        app_id,
        timestamp,
        priority,
        expiration,
        user_id,
        headers: headers.collect(),
    };
    Ok(serde_json::to_string(&Envelope::V1(envelope))?)
}

/// The message of an envelope and its body.
pub fn open_envelope(envelope: &str, body: Bytes) -> Result<Message, EnvelopeError> {
    let Envelope::V1(envelope) = serde_json::from_str(envelope)?;
    let headers = envelope.headers.into_iter().map(|(name, value)| {
        let foreign = HeaderValue::Foreign;
        let value = match value {
            ValueV1::Text(text) => HeaderValue::Text(text),
            ValueV1::Int(number) => HeaderValue::Int(number),
            ValueV1::FloatBits(bits) => HeaderValue::Float(f64::from_bits(bits)),
            ValueV1::Bool(truth) => HeaderValue::Bool(truth),
            ValueV1::Timestamp(seconds) => foreign(ForeignValue::Timestamp(seconds)),
            ValueV1::Bytes(base64) => {
                let bytes = STANDARD.decode(base64).map_err(serde::de::Error::custom)?;
                foreign(ForeignValue::Bytes(bytes.into()))
            }
            ValueV1::Decimal { scale, value } => foreign(ForeignValue::Decimal { scale, value }),
            ValueV1::Nested => foreign(ForeignValue::Nested),
        };
        Ok((Cow::Owned(name), value))
    });
    let headers = headers.collect::<Result<_, serde_json::Error>>()?;
    let properties = Properties {
        content_type: envelope.content_type,
        content_encoding: envelope.content_encoding,
        kind: envelope.kind,
        message_id: envelope.message_id,
        correlation_id: envelope.correlation_id,
        reply_to: envelope.reply_to,
        app_id: envelope.app_id,
        timestamp: envelope.timestamp,
        priority: envelope.priority,
        expiration: envelope.expiration,
        user_id: envelope.user_id,
    };
    Ok(Message { properties, headers, body })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_comes_back_as_it_was() {
        let mut message = Message { body: vec![0, 255].into(), ..Message::default() };
        message.properties.kind = Some("a\"b".to_owned());
        message.properties.timestamp = Some(u64::MAX);
        message.properties.priority = Some(9);
        message.set_header("t", HeaderValue::Text("é\n".to_owned()));
        message.set_header("i", HeaderValue::Int(i64::MIN));
        message.set_header("f", HeaderValue::Float(f64::INFINITY));
        message.set_header("b", HeaderValue::Bool(true));
        for (name, value) in [
            ("at", ForeignValue::Timestamp(u64::MAX)),
            ("raw", ForeignValue::Bytes(vec![0, 255].into())),
            ("price", ForeignValue::Decimal { scale: 2, value: 199 }),
            ("x-garenne-batch", ForeignValue::Nested),
        ] {
            message.set_header(name, HeaderValue::Foreign(value));
        }
        let envelope = seal_envelope(&message).unwrap();
        assert!(envelope.starts_with("{\"version\":\"1\""), "{envelope}");
        assert_eq!(open_envelope(&envelope, message.body.clone()).unwrap(), message);
        assert!(open_envelope("{\"version\":\"2\"}", Bytes::new()).is_err());
    }
}
