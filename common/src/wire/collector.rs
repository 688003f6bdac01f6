//! What a collector says of itself every few seconds, as JSON on the fanout exchange `heartbeats`.
//!
//! Best effort, like a worker's ([`super::heartbeat`]). Collectors know each other's stores by it, and
//! `garenne doctor` what is stuck in them.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::message::{Message, Properties};
use super::{Codec, Malformed};
use crate::health::Problem;
use crate::timestamp::Timestamp;

/// AMQP's `type` of a collector's heartbeat.
pub const COLLECTOR_KIND: &str = "garenne.collector";
const VERSION: u32 = 1;
/// A collector has few things to say.
const MAX_BYTES: usize = 64 * 1024;
/// No collector is believed to be alive for longer than three of these.
const LONGEST_PERIOD_MS: u32 = 60_000;

/// One heartbeat of a collector.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CollectorHeartbeat {
    /// How the process signs itself.
    pub collector: String,
    /// The version of Garenne it was built from.
    pub version: String,
    /// The id of its store; several collectors may share one.
    pub store: String,
    /// When that store was made.
    pub store_created: Timestamp,
    /// Whether it takes results; not while it stands back for an older store.
    pub consuming: bool,
    /// Deliveries that it has taken and not committed.
    pub uncommitted: u64,
    /// What keeps it from doing its work; empty if it is healthy.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<Problem>,
    /// After how many milliseconds the next one follows.
    pub every_ms: u32,
    /// When it was written.
    pub at: Timestamp,
}

#[derive(Serialize)]
struct CollectorHeartbeatBody<'a> {
    v: u32,
    #[serde(flatten)]
    heartbeat: &'a CollectorHeartbeat,
}

#[derive(Deserialize)]
struct CollectorHeartbeatVersion {
    v: u32,
}

impl CollectorHeartbeat {
    /// Whether a message says that it is one.
    pub fn is_one(message: &Message) -> bool {
        message.properties.kind.as_deref() == Some(COLLECTOR_KIND)
    }

    /// How long after it the collector still counts as alive: three more could have come.
    pub fn holds_for(&self) -> Duration {
        let every = self.every_ms.min(LONGEST_PERIOD_MS);
        Duration::from_millis(u64::from(every)) * 3 + Duration::from_secs(1)
    }

    /// Writes it.
    pub fn encode(&self) -> Message {
        let body = serde_json::to_vec(&CollectorHeartbeatBody { v: VERSION, heartbeat: self });
        let properties = Properties {
            content_type: Some(Codec::Json.content_type().to_owned()),
            kind: Some(COLLECTOR_KIND.to_owned()),
            app_id: Some(self.collector.clone()),
            ..Properties::default()
        };
        // Plain data always encodes.
        Message { properties, headers: vec![], body: body.unwrap_or_default().into() }
    }

    /// Reads one.
    pub fn decode(message: &Message) -> Result<Self, Malformed> {
        if message.body.len() > MAX_BYTES {
            return Err(Malformed::new(format_args!("{} bytes of heartbeat", message.body.len())));
        }
        let CollectorHeartbeatVersion { v } =
            serde_json::from_slice(&message.body).map_err(Malformed::new)?;
        if v != VERSION {
            return Err(Malformed::new(format_args!("a collector's heartbeat of version {v}")));
        }
        serde_json::from_slice(&message.body).map_err(Malformed::new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn heartbeat() -> CollectorHeartbeat {
        CollectorHeartbeat {
            collector: "host:9".to_owned(),
            version: "0.1.0".to_owned(),
            store: "0b0e9c5c-4a77-4f0e-8c3e-0d5a6f1b2c3d".to_owned(),
            store_created: Timestamp::from_millis(1_000),
            consuming: true,
            uncommitted: 12,
            problems: vec![],
            every_ms: 2_000,
            at: Timestamp::from_millis(2_000),
        }
    }

    /// The golden sample of version 1; docs/protocol.md shows it.
    #[test]
    fn version_1_looks_like_this() {
        let message = heartbeat().encode();
        let golden = r#"{"v":1,"collector":"host:9","version":"0.1.0","store":"0b0e9c5c-4a77-4f0e-8c3e-0d5a6f1b2c3d","store_created":"1970-01-01T00:00:01Z","consuming":true,"uncommitted":12,"every_ms":2000,"at":"1970-01-01T00:00:02Z"}"#;
        assert_eq!(std::str::from_utf8(&message.body).unwrap(), golden);
        assert!(CollectorHeartbeat::is_one(&message));
        assert_eq!(CollectorHeartbeat::decode(&message), Ok(heartbeat()));
    }

    #[test]
    fn another_version_is_refused_by_number() {
        let message = Message { body: r#"{"v":2}"#.into(), ..Message::default() };
        let expected = Malformed("a collector's heartbeat of version 2".to_owned());
        assert_eq!(CollectorHeartbeat::decode(&message), Err(expected));
    }

    #[test]
    fn nobody_is_believed_to_be_alive_for_days() {
        let long = CollectorHeartbeat { every_ms: u32::MAX, ..heartbeat() };
        assert_eq!(long.holds_for(), Duration::from_secs(181));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic(body in any::<Vec<u8>>()) {
            drop(CollectorHeartbeat::decode(&Message { body: body.into(), ..Message::default() }));
        }
    }
}
