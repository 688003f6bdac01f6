//! Payloads: arguments and outputs as bytes with a known codec, and the two codecs themselves.
//!
//! JSON is for people and other languages, bincode for Rust to Rust. bincode 2.0.1 is finished and
//! unmaintained (docs/decisions/0001), so it is fenced in here: always a size limit (a hostile length
//! panics without one), trailing bytes refused.

use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::depth::{is_too_deep, showable};
use super::{MAX_BODY_BYTES, MAX_DEPTH};
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
    /// The MIME type that says so on the wire.
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::Json => "application/json",
            Self::Bincode => "application/x-bincode",
        }
    }

    /// The codec of a MIME type; parameters such as `; charset=utf-8` are let pass.
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
    /// How to read `bytes`.
    pub codec: Codec,
    /// The encoded value.
    pub bytes: Bytes,
}

impl Payload {
    /// Encodes a value.
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

    /// Decodes a value.
    pub fn decode<T: DeserializeOwned>(&self) -> Result<T, CodecError> {
        match self.codec {
            Codec::Json => serde_json::from_slice(&self.bytes).map_err(CodecError::decode),
            Codec::Bincode => from_bincode(&self.bytes),
        }
    }

    /// The JSON text, if it is JSON; a payload from the wire was checked when it was decoded.
    pub fn as_json(&self) -> Option<&str> {
        match self.codec {
            Codec::Json => std::str::from_utf8(&self.bytes).ok(),
            Codec::Bincode => None,
        }
    }

    /// One line for people: the JSON as it was written, or a note of what cannot be shown.
    pub fn to_line(&self) -> String {
        match self.as_json() {
            // Within strings JSON has no line ends, so these are space between its words.
            Some(text) if !is_too_deep(&self.bytes) => text.trim().replace(['\r', '\n'], " "),
            _ => self.to_json_value().to_string(),
        }
    }

    /// The value for people: the JSON itself, or a note of what cannot be shown.
    pub fn to_json_value(&self) -> serde_json::Value {
        let bytes = self.bytes.len();
        match self.codec {
            Codec::Json => showable(&self.bytes).unwrap_or_else(
                || serde_json::json!({ "json_bytes": bytes, "nested_deeper_than": MAX_DEPTH }),
            ),
            Codec::Bincode => serde_json::json!({ "bincode_bytes": bytes }),
        }
    }
}

/// JSON shows a JSON payload as itself, and of a binary one what [`Payload::to_json_value`] does.
impl Serialize for Payload {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        if !to.is_human_readable() {
            return (self.codec, &self.bytes).serialize(to);
        }
        let raw: Option<&serde_json::value::RawValue> =
            self.as_json().and_then(|text| serde_json::from_str(text).ok());
        // An answer wraps the value in more levels, and a reader that gives up loses all of it.
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
            // The text as it was written, since numbers change when they are converted to floats. So it
            // must not be read through a tagged or flattened type, which serde would buffer.
            let text = Box::<serde_json::value::RawValue>::deserialize(from)?;
            let text = Bytes::from(Box::<str>::from(text).into_string());
            if showable(&text).is_none() {
                return Err(serde::de::Error::custom(
                    "a value that is nested too deeply, or a number outside the range of floats",
                ));
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
    /// The value does not fit the format.
    #[error("cannot encode: {0}")]
    Encode(String),
    /// The bytes are not such a value.
    #[error("cannot decode: {0}")]
    Decode(String),
    /// More than [`MAX_BODY_BYTES`].
    #[error("{0} bytes are more than the {MAX_BODY_BYTES} that a message may have")]
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

pub(super) fn to_bincode<T: Serialize + ?Sized>(value: &T) -> Result<Vec<u8>, CodecError> {
    bincode::serde::encode_to_vec(value, bincode::config::standard()).map_err(CodecError::encode)
}

/// [`to_bincode`] at the end of what is there.
pub(super) fn append_bincode<T: Serialize>(value: &T, to: &mut Vec<u8>) -> Result<(), CodecError> {
    let written = bincode::serde::encode_into_std_write(value, to, bincode::config::standard());
    written.map(drop).map_err(CodecError::encode)
}

/// Decodes one value of several, without copying its text; and how many bytes it took.
pub(super) fn from_bincode_prefix<'a, T: Deserialize<'a>>(
    bytes: &'a [u8],
) -> Result<(T, usize), CodecError> {
    let config = bincode::config::standard().with_limit::<MAX_BODY_BYTES>();
    bincode::serde::borrow_decode_from_slice(bytes, config).map_err(CodecError::decode)
}

/// Decodes the one value that the bytes are; its text may be borrowed from them.
pub(super) fn from_bincode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, CodecError> {
    let (value, read) = from_bincode_prefix(bytes)?;
    // bincode reads what it needs and ignores the rest, which would hide a newer or a broken sender.
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
        fn what_was_encoded_decodes(value in any::<(u64, String, Option<Vec<i16>>)>()) {
            for codec in [Codec::Json, Codec::Bincode] {
                let payload = Payload::encode(codec, &value).unwrap();
                prop_assert_eq!(payload.decode::<(u64, String, Option<Vec<i16>>)>(), Ok(value.clone()));
            }
        }

        #[test]
        fn no_bytes_make_a_decoder_panic(bytes in any::<Vec<u8>>()) {
            for codec in [Codec::Json, Codec::Bincode] {
                let payload = Payload { codec, bytes: bytes.clone().into() };
                drop(payload.decode::<(String, Vec<String>, Option<u64>)>());
            }
        }
    }

    #[test]
    fn a_hostile_length_is_an_error_and_not_a_panic() {
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
    fn content_types_with_parameters_are_known() {
        let json = Codec::from_content_type("Application/JSON; charset=utf-8");
        assert_eq!(json, Some(Codec::Json));
        assert_eq!(Codec::from_content_type("text/plain"), None);
    }
}
