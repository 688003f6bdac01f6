//! What a worker says of itself every few seconds, as JSON on the fanout exchange `heartbeats`.
//!
//! Best effort: a heartbeat that is lost is followed by the next, and nothing is decided by a single
//! one that is missing.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::message::{Message, Properties};
use super::{Codec, Malformed};
use crate::health::Problem;
use crate::names::{QueueName, TaskName};
use crate::timestamp::Timestamp;

/// AMQP's `type` of a heartbeat.
pub const HEARTBEAT_KIND: &str = "garenne.heartbeat";
const VERSION: u32 = 1;
/// The shortest and the longest period that a worker may be configured with.
pub const SHORTEST: Duration = Duration::from_millis(100);
/// See [`SHORTEST`].
pub const LONGEST: Duration = Duration::from_mins(1);
/// A worker that knows thousands of tasks still fits.
const MAX_HEARTBEAT_BYTES: usize = 1024 * 1024;

/// One heartbeat of a worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// How the worker signs its results.
    pub worker: String,
    /// The version of Garenne it was built from.
    pub version: String,
    /// The queues it serves.
    pub queues: Vec<QueueName>,
    /// The tasks it has handlers for.
    pub tasks: Vec<TaskName>,
    /// Maximum number of tasks that it runs at the same time.
    pub concurrency: u32,
    /// How many run now.
    pub running: u32,
    /// Blocking handlers that have not returned although their attempts are over; each reduces the
    /// concurrency by one until it returns.
    #[serde(default)]
    pub stuck_handlers: u32,
    /// Whether it takes no more tasks.
    pub draining: bool,
    /// What keeps it from doing its work; empty if it is healthy.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<Problem>,
    /// After how many milliseconds the next one follows.
    pub every_ms: u32,
    /// When it was written.
    pub at: Timestamp,
}

#[derive(Serialize)]
struct HeartbeatBody<'a> {
    v: u32,
    #[serde(flatten)]
    heartbeat: &'a Heartbeat,
}

#[derive(Deserialize)]
struct HeartbeatVersion {
    v: u32,
}

impl Heartbeat {
    /// How long after it a worker still counts as alive: three more could have come. A period that
    /// `worker.heartbeat` does not allow is cut to one that it does.
    pub fn holds_for(&self) -> Duration {
        let every = Duration::from_millis(u64::from(self.every_ms)).clamp(SHORTEST, LONGEST);
        every * 3 + Duration::from_secs(1)
    }

    /// Writes it.
    pub fn encode(&self) -> Message {
        let body = serde_json::to_vec(&HeartbeatBody { v: VERSION, heartbeat: self });
        let properties = Properties {
            content_type: Some(Codec::Json.content_type().to_owned()),
            kind: Some(HEARTBEAT_KIND.to_owned()),
            app_id: Some(self.worker.clone()),
            ..Properties::default()
        };
        // Plain data always encodes.
        Message { properties, headers: vec![], body: body.unwrap_or_default().into() }
    }

    /// Reads one.
    pub fn decode(message: &Message) -> Result<Self, Malformed> {
        if message.body.len() > MAX_HEARTBEAT_BYTES {
            return Err(Malformed::new(format_args!("{} bytes of heartbeat", message.body.len())));
        }
        let HeartbeatVersion { v } =
            serde_json::from_slice(&message.body).map_err(Malformed::new)?;
        if v != VERSION {
            return Err(Malformed::new(format_args!("a heartbeat of version {v}")));
        }
        serde_json::from_slice(&message.body).map_err(Malformed::new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn heartbeat() -> Heartbeat {
        Heartbeat {
            worker: "host:7".to_owned(),
            version: "0.1.0".to_owned(),
            queues: vec![QueueName::default()],
            tasks: vec![TaskName::new("text.count_words").unwrap()],
            concurrency: 8,
            running: 3,
            stuck_handlers: 0,
            draining: false,
            problems: vec![],
            every_ms: 2_000,
            at: Timestamp::from_millis(1_000),
        }
    }

    /// The golden sample of version 1; docs/protocol.md shows it.
    #[test]
    fn version_1_looks_like_this() {
        let message = heartbeat().encode();
        let golden = r#"{"v":1,"worker":"host:7","version":"0.1.0","queues":["default"],"tasks":["text.count_words"],"concurrency":8,"running":3,"stuck_handlers":0,"draining":false,"every_ms":2000,"at":"1970-01-01T00:00:01Z"}"#;
        assert_eq!(std::str::from_utf8(&message.body).unwrap(), golden);
        assert_eq!(Heartbeat::decode(&message), Ok(heartbeat()));
    }

    #[test]
    fn another_version_is_refused_by_number() {
        let message = Message { body: r#"{"v":2}"#.into(), ..Message::default() };
        let expected = Malformed("a heartbeat of version 2".to_owned());
        assert_eq!(Heartbeat::decode(&message), Err(expected));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic(body in any::<Vec<u8>>()) {
            drop(Heartbeat::decode(&Message { body: body.into(), ..Message::default() }));
        }
    }
}
