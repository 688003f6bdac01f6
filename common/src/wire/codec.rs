//! Payloads: arguments and outputs as bytes with a known codec, and the two codecs themselves.
//!
//! JSON serves people and other languages, bincode serves Rust programs on both ends. bincode 2.0.1
//! is complete but no longer maintained (docs/decisions/0001), so only this file calls it: always
//! with a size limit, because a forged length panics without one, and trailing bytes are refused.

use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::depth::{MAX_DEPTH, is_showable, is_too_deep, showable};
use super::malformed::{MAX_BODY_BYTES, Malformed};
use crate::printable::neutral;

/// How a payload is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Codec {
    /// `application/json`.
    #[default]
    Json,
    /// `application/x-bincode`: bincode 2, standard configuration (little endian, varint).
    Bincode,
}

impl Codec {
    /// The MIME type of this codec on the wire.
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::Json => "application/json",
            Self::Bincode => "application/x-bincode",
        }
    }

    /// The codec of a MIME type, if there is one. Parameters such as `; charset=utf-8` are ignored.
    pub fn from_content_type(content_type: &str) -> Option<Self> {
        let essence = content_type.split(';').next().unwrap_or_default().trim();
        [Self::Json, Self::Bincode]
            .into_iter()
            .find(|codec| essence.eq_ignore_ascii_case(codec.content_type()))
    }
}

/// Encoded arguments or an encoded output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Payload {
    /// The codec of `bytes`.
    pub codec: Codec,
    /// The encoded value.
    pub bytes: Bytes,
}

impl Payload {
    /// Encodes a value. Fails if the codec cannot represent the value, or if it has more than
    /// [`MAX_BODY_BYTES`].
    pub fn encode<T: Serialize + ?Sized>(codec: Codec, value: &T) -> Result<Self, CodecError> {
        let bytes = match codec {
            Codec::Json => serde_json::to_vec(value).map_err(CodecError::encode)?,
            Codec::Bincode => to_bincode(value)?,
        };
        if bytes.len() > MAX_BODY_BYTES {
            return Err(CodecError::TooLarge(bytes.len()));
        }
        Ok(Self { codec, bytes: bytes.into() })
    }

    /// The payload of JSON that every response can carry; `None` for bytes that are not JSON or
    /// that are nested too deeply.
    pub fn of_showable_json(json: &[u8]) -> Option<Self> {
        let bytes = json.to_vec().into();
        is_showable(json).then_some(Self { codec: Codec::Json, bytes })
    }

    /// Decodes a value. Fails if the bytes are not exactly one such value.
    pub fn decode<T: DeserializeOwned>(&self) -> Result<T, CodecError> {
        match self.codec {
            Codec::Json => serde_json::from_slice(&self.bytes).map_err(CodecError::decode),
            Codec::Bincode => from_bincode(&self.bytes),
        }
    }

    /// The text of a JSON payload. It is not checked here; payloads from the wire are checked when
    /// they are decoded.
    pub fn as_json(&self) -> Option<&str> {
        match self.codec {
            Codec::Json => std::str::from_utf8(&self.bytes).ok(),
            Codec::Bincode => None,
        }
    }

    /// The payload as one line of text: the JSON as it was written, or a placeholder for what
    /// cannot be shown.
    pub fn to_line(&self) -> String {
        match self.as_json() {
            // Strings in JSON contain no line breaks, so these are whitespace between tokens.
            Some(text) if !is_too_deep(&self.bytes) => text.trim().replace(['\r', '\n'], " "),
            _ => self.to_json_value().to_string(),
        }
    }

    /// The payload as a JSON value: the JSON itself, or a placeholder for what cannot be shown.
    pub fn to_json_value(&self) -> serde_json::Value {
        let bytes = self.bytes.len();
        match self.codec {
            Codec::Json if is_too_deep(&self.bytes) => {
                serde_json::json!({ "json_bytes": bytes, "nested_deeper_than": MAX_DEPTH })
            }
            Codec::Json => showable(&self.bytes).unwrap_or_else(
                || serde_json::json!({ "json_bytes": bytes, "numbers_outside": "f64" }),
            ),
            Codec::Bincode => serde_json::json!({ "bincode_bytes": bytes }),
        }
    }
}

/// In JSON, a JSON payload is written as itself and a binary one as [`Payload::to_json_value`].
impl Serialize for Payload {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        if !to.is_human_readable() {
            return (self.codec, &self.bytes).serialize(to);
        }
        let raw: Option<&serde_json::value::RawValue> =
            self.as_json().and_then(|text| serde_json::from_str(text).ok());
        // A response wraps the value in more levels; a reader that reaches its limit loses all of
        // it.
        let raw = raw.filter(|_| !is_too_deep(&self.bytes));
        match raw {
            Some(raw) => raw.serialize(to),
            None => self.to_json_value().serialize(to),
        }
    }
}

impl<'de> Deserialize<'de> for Payload {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        if from.is_human_readable() {
            // The text as it was written, since numbers change when they are converted to floats.
            // So a payload must not be decoded through a tagged or flattened type, which serde
            // buffers.
            let text = Box::<serde_json::value::RawValue>::deserialize(from)?;
            let text = Bytes::from(Box::<str>::from(text).into_string());
            if is_too_deep(&text) {
                return Err(serde::de::Error::custom("a value that is nested too deeply"));
            }
            Ok(Self { codec: Codec::Json, bytes: text })
        } else {
            let (codec, bytes) = Deserialize::deserialize(from)?;
            Ok(Self { codec, bytes })
        }
    }
}

/// A value that could not be encoded or decoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// The codec cannot represent the value.
    #[error("cannot encode: {0}")]
    Encode(String),
    /// The bytes are not a value of the expected type.
    #[error("cannot decode: {0}")]
    Decode(String),
    /// More than [`MAX_BODY_BYTES`].
    #[error("{0} bytes are too large for a message; at most {MAX_BODY_BYTES} are accepted")]
    TooLarge(usize),
}

impl CodecError {
    fn encode(error: impl std::fmt::Display) -> Self {
        Self::Encode(error.to_string())
    }

    fn decode(error: impl std::fmt::Display) -> Self {
        let text: String = error.to_string().chars().take(300).collect();
        Self::Decode(neutral(&text).into_owned())
    }
}

impl From<CodecError> for Malformed {
    fn from(error: CodecError) -> Self {
        Self::new(error)
    }
}

pub(super) fn to_bincode<T: Serialize + ?Sized>(value: &T) -> Result<Vec<u8>, CodecError> {
    bincode::serde::encode_to_vec(value, bincode::config::standard()).map_err(CodecError::encode)
}

/// [`to_bincode`], appended to a buffer.
pub(super) fn append_bincode<T: Serialize>(value: &T, to: &mut Vec<u8>) -> Result<(), CodecError> {
    let written = bincode::serde::encode_into_std_write(value, to, bincode::config::standard());
    written.map(drop).map_err(CodecError::encode)
}

/// Decodes the first of several values, without copying its text. Returns the value and the number
/// of bytes that it occupies.
pub(super) fn from_bincode_prefix<'a, T: Deserialize<'a>>(
    bytes: &'a [u8],
) -> Result<(T, usize), CodecError> {
    let config = bincode::config::standard().with_limit::<MAX_BODY_BYTES>();
    bincode::serde::borrow_decode_from_slice(bytes, config).map_err(CodecError::decode)
}

/// Decodes a value that occupies all of the bytes; its text may be borrowed from them.
pub(super) fn from_bincode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, CodecError> {
    let (value, read) = from_bincode_prefix(bytes)?;
    // bincode ignores trailing bytes, which would hide a newer or a broken sender.
    if read == bytes.len() {
        Ok(value)
    } else {
        Err(CodecError::Decode(format!("{} bytes too many", bytes.len() - read)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn encoded_values_decode(value in any::<(u64, String, Option<Vec<i16>>)>()) {
            for codec in [Codec::Json, Codec::Bincode] {
                let payload = Payload::encode(codec, &value).unwrap();
                let decoded = payload.decode::<(u64, String, Option<Vec<i16>>)>();
                prop_assert_eq!(decoded, Ok(value.clone()));
            }
        }

        #[test]
        fn decoders_do_not_panic_on_any_bytes(bytes in any::<Vec<u8>>()) {
            for codec in [Codec::Json, Codec::Bincode] {
                let payload = Payload { codec, bytes: bytes.clone().into() };
                drop(payload.decode::<(String, Vec<String>, Option<u64>)>());
            }
        }
    }

    #[test]
    fn a_forged_length_is_an_error_and_not_a_panic() {
        let bytes = [253, 255, 255, 255, 255, 255, 255, 255, 255].to_vec();
        let payload = Payload { codec: Codec::Bincode, bytes: bytes.into() };
        assert!(payload.decode::<String>().is_err());
        assert!(payload.decode::<Vec<u64>>().is_err());
    }

    #[test]
    fn trailing_bytes_are_refused() {
        let mut bytes = to_bincode(&7_u8).unwrap();
        bytes.push(0);
        assert!(from_bincode::<u8>(&bytes).is_err());
    }

    #[test]
    fn content_types_with_parameters_are_recognised() {
        let json = Codec::from_content_type("Application/JSON; charset=utf-8");
        assert_eq!(json, Some(Codec::Json));
        assert_eq!(Codec::from_content_type("text/plain"), None);
    }
}
