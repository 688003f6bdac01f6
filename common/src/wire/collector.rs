//! Heartbeats of collectors: JSON on the fanout exchange `heartbeats`, every few seconds.
//!
//! Best effort, like those of workers ([`super::heartbeat`]). By them collectors learn of each
//! other's stores, and `garenne doctor` of their problems.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::malformed::Malformed;
use super::message::Message;
use super::versioned;
use crate::health::Problem;
use crate::timestamp::Timestamp;

/// AMQP `type` of a collector's heartbeat.
pub const COLLECTOR_KIND: &str = "garenne.collector";
/// Largest heartbeat, in bytes.
const MAX_BYTES: usize = 64 * 1024;
/// The longest period that is believed, in milliseconds.
const LONGEST_PERIOD_MS: u32 = 60_000;

/// One heartbeat of a collector.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CollectorHeartbeat {
    /// The name of the collector.
    pub collector: String,
    /// The version of Garenne that the collector was built from.
    pub version: String,
    /// The id of its store. Several collectors may share a store.
    pub store: String,
    /// When that store was created.
    pub store_created: Timestamp,
    /// Whether the collector consumes results. It does not while it yields to an older store.
    pub consuming: bool,
    /// Number of deliveries that it has received and not committed.
    pub uncommitted: u64,
    /// The current problems of the collector; empty if it is healthy.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<Problem>,
    /// Time until the next heartbeat, in milliseconds.
    pub every_ms: u32,
    /// When the heartbeat was written, by the collector's clock.
    pub at: Timestamp,
}

impl CollectorHeartbeat {
    /// Whether a message is a collector's heartbeat, by its `type`.
    pub fn is_one(message: &Message) -> bool {
        message.properties.kind.as_deref() == Some(COLLECTOR_KIND)
    }

    /// How long after this heartbeat the collector counts as alive: three periods, of at most a
    /// minute each, and one second.
    pub fn holds_for(&self) -> Duration {
        let every = self.every_ms.min(LONGEST_PERIOD_MS);
        Duration::from_millis(u64::from(every)) * 3 + Duration::from_secs(1)
    }

    /// Encodes the heartbeat.
    pub fn encode(&self) -> Message {
        versioned::encode(self, COLLECTOR_KIND, &self.collector)
    }

    /// Decodes a heartbeat. Fails on another version and on more than 64 KiB.
    pub fn decode(message: &Message) -> Result<Self, Malformed> {
        versioned::decode(message, "a collector's heartbeat", MAX_BYTES)
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

    /// The sample of docs/protocol.md.
    #[test]
    fn version_1_has_the_documented_bytes() {
        let message = heartbeat().encode();
        let golden = r#"{"v":1,"collector":"host:9","version":"0.1.0","store":"0b0e9c5c-4a77-4f0e-8c3e-0d5a6f1b2c3d","store_created":"1970-01-01T00:00:01Z","consuming":true,"uncommitted":12,"every_ms":2000,"at":"1970-01-01T00:00:02Z"}"#;
        assert_eq!(std::str::from_utf8(&message.body).unwrap(), golden);
        assert!(CollectorHeartbeat::is_one(&message));
        assert_eq!(CollectorHeartbeat::decode(&message), Ok(heartbeat()));
    }

    #[test]
    fn an_unknown_version_is_refused() {
        let message = Message { body: r#"{"v":2}"#.into(), ..Message::default() };
        let expected = Malformed("a collector's heartbeat of unknown version 2".to_owned());
        assert_eq!(CollectorHeartbeat::decode(&message), Err(expected));
    }

    #[test]
    fn a_long_period_does_not_keep_a_collector_alive_for_days() {
        let long = CollectorHeartbeat { every_ms: u32::MAX, ..heartbeat() };
        assert_eq!(long.holds_for(), Duration::from_secs(181));
    }

    proptest! {
        #[test]
        fn the_decoder_does_not_panic_on_any_bytes(body in any::<Vec<u8>>()) {
            drop(CollectorHeartbeat::decode(&Message { body: body.into(), ..Message::default() }));
        }
    }
}
