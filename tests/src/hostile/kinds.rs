//! What a stranger could send, by kind, each with the place where it must end.
//!
//! A kind draws its details from a seeded generator: where it is cut, how deep it is nested, which
//! bytes are no text. What the broker refuses by itself (a float that is no number, a table that ends
//! too early) is not among them. The header `c` tells one from another wherever it ends.

use fastrand::Rng;
use garenne_common::DeadReason;
use garenne_common::DeadReason::{Broker, Expired, Fatal, Malformed, UnknownTask, Unrouted};
use garenne_common::topology::Topology;
use serde_json::{Value, json};

use crate::harness::raw::{
    Fields, Place, RawProperties, boolean, double, hex, int, long_text, nested,
};

/// Where a message must end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// It is a sound task after all.
    Runs,
    /// A dead letter whose error holds these words.
    Dead(DeadReason, &'static str),
}

/// A message about to be sent.
#[derive(Debug)]
pub(super) struct SentMessage {
    pub(super) kind: &'static str,
    pub(super) end: End,
    properties: RawProperties,
    headers: Fields,
    body: Vec<u8>,
    exchange: String,
    key: Vec<u8>,
}

impl SentMessage {
    /// As the foreign client takes it.
    pub(super) fn order(&self) -> Value {
        let mut properties = self.properties.clone();
        properties.headers(&self.headers);
        json!({ "exchange": self.exchange, "key_bytes": hex(&self.key),
                "raw_properties": properties.hex(), "body_hex": hex(&self.body) })
    }
}

/// A kind of message: changes a sound one and says where that ends.
type Kind = (&'static str, fn(&mut SentMessage, &mut Rng, &Topology) -> End);

/// The message of this number: a sound one, made hostile in one of the ways below.
pub(super) fn make(number: usize, topology: &Topology, seed: u64) -> SentMessage {
    let (kind, change) = KINDS[number % KINDS.len()];
    let mut sent = sound(number, topology);
    let mut rng = Rng::with_seed(seed.wrapping_add(number as u64));
    sent.kind = kind;
    sent.end = change(&mut sent, &mut rng, topology);
    sent
}

/// A sound task that returns its argument.
pub(super) fn sound(number: usize, topology: &Topology) -> SentMessage {
    let mut properties = RawProperties::default();
    properties.text(Place::Type, "garenne.echo");
    properties.text(Place::MessageId, format!("h-{number}"));
    properties.text(Place::ContentType, "application/json");
    SentMessage {
        kind: "sound",
        end: End::Runs,
        properties,
        headers: Fields::default().with("c", int(i64::try_from(number).expect("small"))),
        body: b"7".to_vec(),
        exchange: topology.tasks_exchange(),
        key: b"default".to_vec(),
    }
}

fn not_text(rng: &mut Rng) -> Vec<u8> {
    let mut bytes = b"text".to_vec();
    for _ in 0..rng.usize(1..20) {
        bytes.insert(rng.usize(..=bytes.len()), rng.u8(0x80..));
    }
    bytes.push(0xff);
    bytes
}

fn unprintable(rng: &mut Rng) -> Vec<u8> {
    let evil = ["\u{1b}[2J", "\u{7}", "\u{9b}31m", "\r", "\u{202e}", "\0", "\u{1b}]0;x\u{7}"];
    let evil = rng.choice(&evil).copied().unwrap_or("\0");
    format!("a{evil}b").into_bytes()
}

fn header(sent: &mut SentMessage, name: &str, value: Vec<u8>) {
    sent.headers = std::mem::take(&mut sent.headers).with(name, value);
}

fn deep(kind: u8, levels: usize) -> Vec<u8> {
    (0..levels).fold(vec![], |inside, _| match kind {
        b'F' => {
            nested(b'F', &[&b"\x01k"[..], if inside.is_empty() { b"V" } else { &inside }].concat())
        }
        _ => nested(b'A', &inside),
    })
}

fn property(place: Place, words: &'static str) -> impl Fn(&mut SentMessage, Vec<u8>) -> End {
    move |sent, bytes| {
        sent.properties.text(place, bytes);
        End::Dead(Malformed, words)
    }
}

const NUMBERS: [&str; 7] = [
    "x-garenne-attempt",
    "x-garenne-max-attempts",
    "x-garenne-retry-base-ms",
    "x-garenne-retry-max-ms",
    "x-garenne-timeout-ms",
    "x-garenne-expires-at-ms",
    "x-garenne-submitted-at-ms",
];

/// No whole number from 0 on, in many ways.
fn no_number(rng: &mut Rng) -> Vec<u8> {
    match rng.u8(..11) {
        0 => int(rng.i64(..0)),
        1 => int(i64::MIN),
        2 => double(rng.f64()),
        3 => double(f64::MAX),
        4 => boolean(rng.bool()),
        5 => long_text(""),
        6 => long_text("99999999999999999999999"),
        7 => long_text(unprintable(rng)),
        8 => long_text("x".repeat(rng.usize(1..30_000))),
        9 => nested(b'F', b"\x01kV"),
        _ => deep(b'A', rng.usize(1..5_000)),
    }
}

macro_rules! dead {
    ($words:literal, |$sent:ident, $rng:ident| $body:expr) => {
        |$sent, $rng, _| {
            $body;
            End::Dead(Malformed, $words)
        }
    };
}

/// Every kind.
const KINDS: &[Kind] = &[
    (
        "JSON that is cut off",
        dead!("not JSON", |sent, rng| {
            let whole = br#"{"a":[1,2,{"b":"cc\u00e9"}],"d":null}"#;
            sent.body = whole[..rng.usize(..whole.len())].to_vec();
        }),
    ),
    ("an empty body", dead!("not JSON", |sent, _rng| sent.body.clear())),
    ("a byte-order mark", dead!("not JSON", |sent, _rng| sent.body = b"\xef\xbb\xbf7".to_vec())),
    (
        "a string that is no UTF-8",
        dead!("not JSON", |sent, rng| {
            sent.body = [b"\"", &not_text(rng)[..], b"\""].concat();
        }),
    ),
    (
        "noise",
        dead!("not JSON", |sent, rng| {
            let length = rng.usize(1..100_000);
            sent.body = [0xff]
                .into_iter()
                .chain(std::iter::repeat_with(|| rng.u8(..)).take(length))
                .collect();
        }),
    ),
    ("two values", dead!("not JSON", |sent, _rng| sent.body = b"1 2".to_vec())),
    (
        "numbers that are none",
        dead!("not JSON", |sent, rng| {
            let none = ["NaN", "Infinity", "-", "01", "0x10", "1.", "+1"];
            sent.body = rng.choice(&none).copied().unwrap_or("-").as_bytes().to_vec();
        }),
    ),
    (
        "brackets that nobody closes",
        dead!("not JSON", |sent, rng| {
            sent.body = b"[".repeat(rng.usize(1..500_000));
        }),
    ),
    (
        "deep JSON",
        dead!("100 levels", |sent, rng| {
            let levels = rng.usize(200..200_000);
            sent.body = [b"[".repeat(levels), b"]".repeat(levels)].concat();
        }),
    ),
    (
        "a number beyond all floats",
        dead!("out of range", |sent, _rng| sent.body = b"1e999999".to_vec()),
    ),
    (
        "a compressed body",
        dead!("content_encoding", |sent, rng| {
            let kinds = ["zstd", "gzip", "br", "deflate", "ZSTD", "gzip, identity", "\u{1b}"];
            sent.properties
                .text(Place::ContentEncoding, rng.choice(&kinds).copied().unwrap_or("br"));
            sent.body = b"\x28\xb5\x2f\xfd\xff\xff\xff\xff\xff\xff\xff\xff".to_vec();
        }),
    ),
    ("an encoding that is no UTF-8", |sent, rng, _| {
        property(Place::ContentEncoding, "content_encoding")(sent, not_text(rng))
    }),
    ("an unknown content type", |sent, rng, _| {
        let kinds = ["text/plain", "application/jsonx", "application/msgpack", "", "json\0"];
        let kind = rng.choice(&kinds).copied().unwrap_or("").into();
        property(Place::ContentType, "content_type")(sent, kind)
    }),
    ("a content type that is no UTF-8", |sent, rng, _| {
        property(Place::ContentType, "content_type")(sent, not_text(rng))
    }),
    ("bincode with an absurd length", |sent, _, _| {
        sent.properties.text(Place::Type, "file.sha256");
        sent.body = b"\xfd\xff\xff\xff\xff\xff\xff\xff\xff".to_vec();
        property(Place::ContentType, "wrong arguments")(sent, b"application/x-bincode".to_vec())
    }),
    (
        "no type",
        dead!("type (the task name) is missing", |sent, _rng| sent.properties.without(Place::Type)),
    ),
    ("a type that is no UTF-8", |sent, rng, _| {
        property(Place::Type, "task name")(sent, not_text(rng))
    }),
    ("a type with control characters", |sent, rng, _| {
        property(Place::Type, "task name")(sent, unprintable(rng))
    }),
    ("a long type", |sent, rng, _| {
        property(Place::Type, "task name")(sent, b"x".repeat(rng.usize(129..=255)))
    }),
    ("an id that is no UTF-8", |sent, rng, _| {
        property(Place::MessageId, "task id")(sent, not_text(rng))
    }),
    ("an id with control characters", |sent, rng, _| {
        property(Place::MessageId, "task id")(sent, unprintable(rng))
    }),
    ("a long or empty id", |sent, rng, _| {
        let length = if rng.bool() { 0 } else { rng.usize(129..=255) };
        property(Place::MessageId, "task id")(sent, b"x".repeat(length))
    }),
    ("a reply_to that is no UTF-8", |sent, rng, _| {
        property(Place::ReplyTo, "reply_to")(sent, not_text(rng))
    }),
    ("a correlation_id with control characters", |sent, rng, _| {
        property(Place::CorrelationId, "correlation_id")(sent, unprintable(rng))
    }),
    ("an app_id that is no UTF-8", |sent, rng, _| {
        property(Place::AppId, "app_id")(sent, not_text(rng))
    }),
    ("a property that nobody reads and that is no UTF-8", |sent, rng, _| {
        sent.properties.text(Place::ClusterId, not_text(rng));
        End::Runs
    }),
    (
        "a number that is none",
        dead!("expected a whole number", |sent, rng| {
            let name = rng.choice(&NUMBERS).copied().unwrap_or(NUMBERS[0]);
            let value = no_number(rng);
            header(sent, name, value);
        }),
    ),
    (
        "a factor that is none",
        dead!("x-garenne-retry-factor", |sent, rng| {
            let none = [
                long_text("NaN"),
                long_text("-inf"),
                long_text("inf"),
                boolean(true),
                nested(b'F', b""),
            ];
            header(sent, "x-garenne-retry-factor", rng.choice(&none).cloned().unwrap_or_default());
        }),
    ),
    (
        "a batch that is none",
        dead!("batch", |sent, rng| {
            let none =
                [int(7), long_text("x".repeat(300)), long_text(unprintable(rng)), deep(b'A', 50)];
            header(sent, "x-garenne-batch", rng.choice(&none).cloned().unwrap_or_default());
        }),
    ),
    (
        "a reply format that is none",
        dead!("x-garenne-reply-format", |sent, _rng| {
            header(sent, "x-garenne-reply-format", int(1));
        }),
    ),
    ("absurd numbers", |sent, rng, _| {
        header(sent, "x-garenne-attempt", long_text(u64::MAX.to_string()));
        header(sent, "x-garenne-max-attempts", int(if rng.bool() { 0 } else { i64::MAX }));
        header(sent, "x-garenne-retry-base-ms", int(i64::MAX));
        header(sent, "x-garenne-retry-max-ms", long_text(u64::MAX.to_string()));
        header(sent, "x-garenne-retry-factor", double(if rng.bool() { f64::MAX } else { -5.0 }));
        header(sent, "x-garenne-timeout-ms", int(i64::MAX));
        header(sent, "x-garenne-expires-at-ms", long_text(u64::MAX.to_string()));
        sent.properties.timestamp(rng.choice(&[0, 1, u64::MAX]).copied().unwrap_or(0));
        sent.properties.priority(255);
        End::Runs
    }),
    ("an end in the past", |sent, rng, _| {
        header(sent, "x-garenne-expires-at-ms", int(rng.i64(0..1_700_000_000_000)));
        End::Dead(Expired, "expired")
    }),
    (
        "thousands of headers",
        dead!("too large", |sent, rng| {
            for number in 0..rng.u32(4_000..8_000) {
                header(sent, &format!("h{number}"), boolean(true));
            }
        }),
    ),
    ("hundreds of headers", |sent, rng, _| {
        for number in 0..rng.u32(100..900) {
            header(sent, &format!("h{number}"), int(number.into()));
        }
        End::Runs
    }),
    (
        "a huge header",
        dead!("too large", |sent, rng| {
            header(sent, "huge", long_text("x".repeat(rng.usize(66_000..120_000))));
        }),
    ),
    ("headers nested deep", |sent, rng, _| {
        // Thousands of levels overflow the stack of the client library's thread, unless they are
        // screened. The broker itself needs seconds for ten thousand.
        let kind = if rng.bool() { b'A' } else { b'F' };
        header(sent, "deep", deep(kind, rng.usize(2..4_000)));
        End::Runs
    }),
    ("header names that are no UTF-8", |sent, rng, _| {
        sent.headers = std::mem::take(&mut sent.headers).with(not_text(rng), int(1));
        End::Runs
    }),
    ("a task that says it is a dead letter", |sent, _, _| {
        header(sent, "x-garenne-dead-reason", long_text("fatal"));
        End::Runs
    }),
    ("a task of an unknown name", |sent, _, _| {
        sent.properties.text(Place::Type, "no.such_task");
        End::Dead(UnknownTask, "no.such_task")
    }),
    ("a reply into a queue of tasks", |sent, rng, topology| {
        let queues = [
            topology.dead(),
            topology.results(),
            topology.unrouted(),
            topology.tasks_exchange() + ".default",
        ];
        let queue = rng.choice(&queues).cloned().unwrap_or_default();
        sent.properties.text(Place::ReplyTo, queue);
        End::Runs
    }),
    ("sound, if large", |sent, rng, _| {
        let text = "é".repeat(rng.usize(1..300_000));
        sent.body = format!("{{\"a\":\"{text}\",\"a\":1,\"n\":{}}}", "9".repeat(300)).into_bytes();
        End::Runs
    }),
    ("no report", |sent, rng, topology| {
        sent.exchange = topology.results();
        sent.key = topology.results().into_bytes();
        let mut noise = vec![0; rng.usize(1..500)];
        noise.fill_with(|| rng.u8(..));
        let none = [
            vec![],
            vec![9, 1],
            b"\x02\xfd\xff\xff\xff\xff\xff\xff\xff\xff".to_vec(),
            [&[2, 250], &noise[..]].concat(),
        ];
        sent.properties.text(Place::ContentType, "application/x-garenne-reports");
        sent.body = rng.choice(&none).cloned().unwrap_or_default();
        End::Dead(Malformed, "not a bundle of reports")
    }),
    ("no report in JSON", |sent, rng, topology| {
        sent.exchange = topology.results();
        sent.key = topology.results().into_bytes();
        let none = ["", "{}", "[{}]", "[{\"report\":\"\\u001b[2J\"}]", "[[[[", "[null]"];
        sent.body = rng.choice(&none).copied().unwrap_or_default().as_bytes().to_vec();
        End::Dead(Malformed, "not a bundle of reports")
    }),
    ("a dead letter without a reason", |sent, _, topology| {
        sent.exchange = topology.dead();
        End::Dead(Broker, "given up by the broker")
    }),
    ("a dead letter with words of its own", |sent, rng, topology| {
        sent.exchange = topology.dead();
        header(sent, "x-garenne-dead-reason", long_text("fatal"));
        header(sent, "x-garenne-dead-error", long_text([b"evil ", &unprintable(rng)[..]].concat()));
        header(sent, "x-garenne-dead-by", long_text(unprintable(rng)));
        header(sent, "x-garenne-dead-queue", long_text("q".repeat(3_000)));
        header(sent, "x-garenne-dead-at-ms", int(i64::MAX));
        sent.properties.text(Place::Type, not_text(rng));
        End::Dead(Fatal, "evil")
    }),
    ("a reply among the dead letters", |sent, _, topology| {
        sent.exchange = topology.dead();
        sent.properties.text(Place::Type, "garenne.result");
        End::Dead(Malformed, "a reply")
    }),
    ("a task for no queue", |sent, rng, _| {
        sent.key = if rng.bool() { not_text(rng) } else { unprintable(rng) };
        End::Dead(Unrouted, "no queue")
    }),
];
