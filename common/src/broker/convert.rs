//! Our messages as lapin's properties and field tables, both ways.

use bytes::Bytes;
use lapin::BasicProperties;
use lapin::protocol::basic::parse_properties;
use lapin::types::{AMQPValue, FieldTable, ShortString};

use super::BrokerError;
use crate::wire::{HeaderName, HeaderValue, Message, Properties};

const PERSISTENT: u8 = 2;
/// RabbitMQ replaces this `reply_to` by an address of the publishing channel, and closes the channel if it
/// does not consume from there, as ours never do. A bundle may name it inside, where RabbitMQ does not look.
const DIRECT_REPLY_TO: &str = "amq.rabbitmq.reply-to";

pub(super) fn short(text: &str) -> Result<ShortString, BrokerError> {
    // The infallible conversion panics above 255 bytes.
    ShortString::try_new(text).map_err(|_| BrokerError::TooLong(text.chars().take(80).collect()))
}

pub(super) fn to_properties(message: &Message) -> Result<BasicProperties, BrokerError> {
    let from = &message.properties;
    let mut to = BasicProperties::default().with_delivery_mode(PERSISTENT);
    macro_rules! set {
        ($($field:ident => $with:ident),*) => {
            $(if let Some(text) = &from.$field { to = to.$with(short(text)?); })*
        };
    }
    set!(
        content_type => with_content_type,
        content_encoding => with_content_encoding,
        kind => with_type,
        message_id => with_message_id,
        correlation_id => with_correlation_id,
        app_id => with_app_id,
        expiration => with_expiration
    );
    if let Some(queue) = from.reply_to.as_deref().filter(|queue| *queue != DIRECT_REPLY_TO) {
        to = to.with_reply_to(short(queue)?);
    }
    if let Some(seconds) = from.timestamp {
        to = to.with_timestamp(seconds);
    }
    if let Some(priority) = from.priority {
        to = to.with_priority(priority);
    }
    if !message.headers.is_empty() {
        let headers = message.headers.iter().map(|(key, value)| (key.as_ref(), value));
        to = to.with_headers(to_table(headers)?);
    }
    Ok(to)
}

pub(super) fn to_table<'a>(
    pairs: impl Iterator<Item = (&'a str, &'a HeaderValue)>,
) -> Result<FieldTable, BrokerError> {
    let mut table = FieldTable::default();
    for (key, value) in pairs {
        table.insert(short(key)?, to_value(value));
    }
    Ok(table)
}

fn to_value(value: &HeaderValue) -> AMQPValue {
    match value {
        HeaderValue::Text(text) => AMQPValue::LongString(text.as_str().into()),
        HeaderValue::Int(number) => AMQPValue::LongLongInt(*number),
        HeaderValue::Float(number) => AMQPValue::Double(*number),
        HeaderValue::Bool(truth) => AMQPValue::Boolean(*truth),
    }
}

pub(super) fn from_properties(from: &BasicProperties, body: Vec<u8>) -> Message {
    let text = |text: &Option<ShortString>| text.as_ref().map(|text| text.as_str().to_owned());
    let properties = Properties {
        content_type: text(from.content_type()),
        content_encoding: text(from.content_encoding()),
        kind: text(from.kind()),
        message_id: text(from.message_id()),
        correlation_id: text(from.correlation_id()),
        reply_to: text(from.reply_to()),
        app_id: text(from.app_id()),
        timestamp: *from.timestamp(),
        priority: *from.priority(),
        expiration: text(from.expiration()),
        user_id: text(from.user_id()),
    };
    let mut headers = vec![];
    if let Some(table) = from.headers() {
        for (key, value) in table.inner() {
            // A header of ours of a type that we have no use for is a mistake, and not an absent header.
            let value = from_value(value).or_else(|| misplaced(key.as_str(), value));
            headers.extend(value.map(|value| (key.as_str().to_owned().into(), value)));
        }
        headers.extend(last_death(table));
    }
    Message { properties, headers, body: Bytes::from(body) }
}

/// What RabbitMQ says itself from 3.13 on in `x-last-death-*`, taken out of the newest entry of its
/// `x-death` array for older versions. A task that was delayed has died before, of a delay level.
fn last_death(table: &FieldTable) -> Vec<(HeaderName, HeaderValue)> {
    let Some(AMQPValue::FieldArray(deaths)) = table.inner().get("x-death") else { return vec![] };
    let Some(AMQPValue::FieldTable(newest)) = deaths.as_slice().first() else { return vec![] };
    let known = [("reason", "x-last-death-reason"), ("queue", "x-last-death-queue")];
    let known = known.into_iter().filter(|(_, name)| !table.contains_key(name));
    known
        .filter_map(|(field, name)| {
            newest.inner().get(field).and_then(from_value).map(|value| (name.into(), value))
        })
        .collect()
}

/// What no number and no text of ours is read from; a client that has no value to send may send void.
fn misplaced(name: &str, value: &AMQPValue) -> Option<HeaderValue> {
    let ours = name.starts_with("x-garenne-") && *value != AMQPValue::Void;
    ours.then_some(HeaderValue::Bool(false))
}

/// `None` for tables, arrays and the like: Garenne has no use for them.
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "a foreign enum; what is not listed has no use here"
)]
fn from_value(value: &AMQPValue) -> Option<HeaderValue> {
    Some(match value {
        AMQPValue::Boolean(truth) => HeaderValue::Bool(*truth),
        AMQPValue::ShortShortInt(number) => HeaderValue::Int((*number).into()),
        AMQPValue::ShortShortUInt(number) => HeaderValue::Int((*number).into()),
        AMQPValue::ShortInt(number) => HeaderValue::Int((*number).into()),
        AMQPValue::ShortUInt(number) => HeaderValue::Int((*number).into()),
        AMQPValue::LongInt(number) => HeaderValue::Int((*number).into()),
        AMQPValue::LongUInt(number) => HeaderValue::Int((*number).into()),
        AMQPValue::LongLongInt(number) => HeaderValue::Int(*number),
        AMQPValue::Timestamp(seconds) => HeaderValue::Int(i64::try_from(*seconds).ok()?),
        AMQPValue::Float(number) => HeaderValue::Float((*number).into()),
        AMQPValue::Double(number) => HeaderValue::Float(*number),
        AMQPValue::ShortString(text) => HeaderValue::Text(text.as_str().to_owned()),
        AMQPValue::LongString(text) => {
            HeaderValue::Text(String::from_utf8_lossy(text.as_bytes()).into_owned())
        }
        AMQPValue::ByteArray(bytes) => {
            HeaderValue::Text(String::from_utf8_lossy(bytes.as_slice()).into_owned())
        }
        _ => return None,
    })
}

/// What a delivery with this content header becomes; for those who try whether any bytes break it.
///
/// `None` if the client library ends the connection over it. Such a header was not screened, or
/// could not be followed, see [`frames::screen`](crate::wire::frames::screen).
#[doc(hidden)]
pub fn parse_message(header: &[u8], body: Vec<u8>) -> Option<Message> {
    // Class, weight and the size of the body stand before the properties.
    let (rest, properties) = parse_properties(header.get(12..)?).ok()?;
    rest.is_empty().then(|| from_properties(&properties, body))
}
