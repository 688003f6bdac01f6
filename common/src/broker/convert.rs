//! Converts our messages to lapin's properties and field tables, and back.
//!
//! Values that AMQP cannot carry are errors; foreign values without a use here are dropped.

use bytes::Bytes;
use lapin::BasicProperties;
use lapin::protocol::basic::parse_properties;
use lapin::types::{AMQPValue, DecimalValue, FieldTable, ShortString};

use super::BrokerError;
use crate::wire::{ForeignValue, HeaderName, HeaderValue, Message, Properties, is_defined_header};

const PERSISTENT: u8 = 2;
/// RabbitMQ replaces this `reply_to` by an address of the publishing channel, and closes the
/// channel if it does not consume from there, as ours never do. Inside a bundle the name is not
/// seen by RabbitMQ.
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
        HeaderValue::Foreign(foreign) => match foreign {
            ForeignValue::Timestamp(seconds) => AMQPValue::Timestamp(*seconds),
            ForeignValue::Bytes(bytes) => AMQPValue::ByteArray(bytes.to_vec().into()),
            ForeignValue::Decimal { scale, value } => {
                AMQPValue::DecimalValue(DecimalValue { scale: *scale, value: *value })
            }
            // Without its content, and still of a wrong type for whoever reads it next.
            ForeignValue::Nested => AMQPValue::FieldTable(FieldTable::default()),
        },
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
            let value = from_value(value).or_else(|| nested(key.as_str(), value));
            headers.extend(value.map(|value| (key.as_str().to_owned().into(), value)));
        }
        headers.extend(last_death(table));
    }
    Message { properties, headers, body: Bytes::from(body) }
}

/// The headers `x-last-death-*`, which RabbitMQ sets from 3.13 on, for older versions taken from
/// the newest entry of the `x-death` array. A delayed task has been dead-lettered before, by a
/// delay level.
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

/// A table or array in a header that Garenne reads: kept, so that it is refused and not taken for an
/// absent header. Void counts as absent, since some clients send it for a value that they lack.
fn nested(name: &str, value: &AMQPValue) -> Option<HeaderValue> {
    let is_nested = *value != AMQPValue::Void && is_defined_header(name);
    is_nested.then_some(HeaderValue::Foreign(ForeignValue::Nested))
}

/// `None` for tables, arrays and void. Every other type keeps its value and its meaning: a timestamp
/// does not become an integer, nor do bytes become text.
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "a foreign enum; the types that are not listed are dropped"
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
        AMQPValue::Timestamp(seconds) => HeaderValue::Foreign(ForeignValue::Timestamp(*seconds)),
        AMQPValue::DecimalValue(DecimalValue { scale, value }) => {
            HeaderValue::Foreign(ForeignValue::Decimal { scale: *scale, value: *value })
        }
        AMQPValue::Float(number) => HeaderValue::Float((*number).into()),
        AMQPValue::Double(number) => HeaderValue::Float(*number),
        AMQPValue::ShortString(text) => HeaderValue::Text(text.as_str().to_owned()),
        AMQPValue::LongString(text) => match std::str::from_utf8(text.as_bytes()) {
            Ok(text) => HeaderValue::Text(text.to_owned()),
            Err(_) => bytes(text.as_bytes()),
        },
        AMQPValue::ByteArray(array) => bytes(array.as_slice()),
        _ => return None,
    })
}

fn bytes(bytes: &[u8]) -> HeaderValue {
    HeaderValue::Foreign(ForeignValue::Bytes(Bytes::copy_from_slice(bytes)))
}

/// What a delivery with this content header becomes; for those who try whether any bytes break it.
///
/// `None` if the client library would end the connection over it, because the header was not
/// screened or could not be parsed, see [`frames::screen`](crate::wire::frames::screen).
#[doc(hidden)]
pub fn parse_message(header: &[u8], body: Vec<u8>) -> Option<Message> {
    // Class, weight and body size precede the properties.
    let (rest, properties) = parse_properties(header.get(12..)?).ok()?;
    rest.is_empty().then(|| from_properties(&properties, body))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn received(headers: &[(&str, AMQPValue)]) -> Message {
        let mut table = FieldTable::default();
        for (name, value) in headers {
            table.insert((*name).into(), value.clone());
        }
        from_properties(&BasicProperties::default().with_headers(table), vec![])
    }

    #[test]
    fn foreign_types_keep_their_value_when_a_message_is_published_again() {
        let headers = [
            ("b", AMQPValue::ByteArray(vec![0xff, 0x41].into())),
            ("d", AMQPValue::DecimalValue(DecimalValue { scale: 2, value: 199 })),
            ("t", AMQPValue::Timestamp(1_795_422_431)),
        ];
        let published = to_properties(&received(&headers)).unwrap();
        let table = published.headers().as_ref().unwrap();
        for (name, value) in headers {
            assert_eq!(table.inner().get(name), Some(&value));
        }
    }

    #[test]
    fn a_long_string_that_is_not_utf_8_is_bytes_and_not_text() {
        let message = received(&[("x", AMQPValue::LongString(vec![0xff, 0x41].into()))]);
        assert_eq!(message.header("x"), Some(&bytes(&[0xff, 0x41])));
    }

    #[test]
    fn tables_are_kept_in_headers_that_garenne_reads_and_void_is_absent() {
        let table = AMQPValue::FieldTable(FieldTable::default());
        let names = ["x-garenne-batch", "traceparent", "x-mine", "CC"];
        let message = received(&names.map(|name| (name, table.clone())));
        let mut kept: Vec<_> = message.headers.iter().map(|(name, _)| name.as_ref()).collect();
        kept.sort_unstable();
        assert_eq!(kept, ["traceparent", "x-garenne-batch"]);
        let published = to_properties(&message).unwrap();
        assert_eq!(published.headers().as_ref().unwrap().inner()["traceparent"], table);
        assert_eq!(received(&[("x-garenne-batch", AMQPValue::Void)]).headers, []);
    }
}
