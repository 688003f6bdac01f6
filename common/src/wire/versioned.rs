//! JSON messages with a version number `v` beside their fields: heartbeats of workers and
//! collectors.
//!
//! A new layout gets a new number; fields may be added under the same one.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::codec::Codec;
use super::malformed::{Malformed, within};
use super::message::{Message, Properties};

/// The version of every layout so far.
const VERSION: u32 = 1;

#[derive(Serialize)]
struct Versioned<'a, T> {
    v: u32,
    #[serde(flatten)]
    fields: &'a T,
}

/// The version alone, which is read before the fields.
#[derive(Deserialize)]
struct VersionField {
    v: u32,
}

/// Encodes `fields` as a message of this AMQP `type`, published by `app_id`.
pub(super) fn encode(fields: &impl Serialize, kind: &str, app_id: &str) -> Message {
    let body = serde_json::to_vec(&Versioned { v: VERSION, fields });
    let properties = Properties {
        content_type: Some(Codec::Json.content_type().to_owned()),
        kind: Some(kind.to_owned()),
        app_id: Some(app_id.to_owned()),
        ..Properties::default()
    };
    // Structs of text and numbers always encode.
    Message { properties, headers: vec![], body: body.unwrap_or_default().into() }
}

/// Decodes a body of at most `most` bytes; `what` names the message in errors.
pub(super) fn decode<T: DeserializeOwned>(
    message: &Message,
    what: &str,
    most: usize,
) -> Result<T, Malformed> {
    within(what, &message.body, most)?;
    let VersionField { v } = serde_json::from_slice(&message.body).map_err(Malformed::new)?;
    if v != VERSION {
        return Err(Malformed::new(format_args!("{what} of unknown version {v}")));
    }
    serde_json::from_slice(&message.body).map_err(Malformed::new)
}
