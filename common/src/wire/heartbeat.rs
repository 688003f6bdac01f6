//! Heartbeats of workers: JSON on the fanout exchange `heartbeats`, every few seconds.
//!
//! Best effort: a lost heartbeat is followed by the next one, and no decision rests on a single
//! missing one.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::malformed::Malformed;
use super::message::Message;
use super::versioned;
use crate::health::Problem;
use crate::names::{QueueName, TaskName};
use crate::timestamp::Timestamp;

/// AMQP `type` of a worker's heartbeat.
pub const HEARTBEAT_KIND: &str = "garenne.heartbeat";
/// The shortest period that a worker may be configured with.
pub const SHORTEST: Duration = Duration::from_millis(100);
/// The longest period that a worker may be configured with.
pub const LONGEST: Duration = Duration::from_mins(1);
/// Largest heartbeat, in bytes; enough for a worker with thousands of tasks.
const MAX_HEARTBEAT_BYTES: usize = 1024 * 1024;

/// One heartbeat of a worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// The name of the worker, as in its results.
    pub worker: String,
    /// The version of Garenne that the worker was built from.
    pub version: String,
    /// The queues that the worker serves.
    pub queues: Vec<QueueName>,
    /// The names of the tasks that the worker has handlers for.
    pub tasks: Vec<TaskName>,
    /// Maximum number of tasks that the worker runs at the same time.
    pub concurrency: u32,
    /// Number of attempts that run now.
    pub running: u32,
    /// Number of blocking handlers that have not returned although their attempts have ended. Each
    /// reduces the concurrency by one until it returns.
    #[serde(default)]
    pub stuck_handlers: u32,
    /// Whether the worker is stopping and takes no more tasks.
    pub draining: bool,
    /// The current problems of the worker; empty if it is healthy.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<Problem>,
    /// Time until the next heartbeat, in milliseconds.
    pub every_ms: u32,
    /// When the heartbeat was written, by the worker's clock.
    pub at: Timestamp,
}

impl Heartbeat {
    /// How long after this heartbeat the worker counts as alive: three periods and one second. A
    /// period that `worker.heartbeat` does not allow is limited to the allowed range.
    pub fn holds_for(&self) -> Duration {
        let every = Duration::from_millis(u64::from(self.every_ms)).clamp(SHORTEST, LONGEST);
        every * 3 + Duration::from_secs(1)
    }

    /// Encodes the heartbeat.
    pub fn encode(&self) -> Message {
        versioned::encode(self, HEARTBEAT_KIND, &self.worker)
    }

    /// Decodes a heartbeat. Fails on another version and on more than 1 MiB.
    pub fn decode(message: &Message) -> Result<Self, Malformed> {
        versioned::decode(message, "a heartbeat", MAX_HEARTBEAT_BYTES)
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

    /// The sample of docs/protocol.md.
    #[test]
    fn version_1_has_the_documented_bytes() {
        let message = heartbeat().encode();
        let golden = r#"{"v":1,"worker":"host:7","version":"0.1.0","queues":["default"],"tasks":["text.count_words"],"concurrency":8,"running":3,"stuck_handlers":0,"draining":false,"every_ms":2000,"at":"1970-01-01T00:00:01Z"}"#;
        assert_eq!(std::str::from_utf8(&message.body).unwrap(), golden);
        assert_eq!(Heartbeat::decode(&message), Ok(heartbeat()));
    }

    #[test]
    fn an_unknown_version_is_refused() {
        let message = Message { body: r#"{"v":2}"#.into(), ..Message::default() };
        let expected = Malformed("a heartbeat of unknown version 2".to_owned());
        assert_eq!(Heartbeat::decode(&message), Err(expected));
    }

    proptest! {
        #[test]
        fn the_decoder_does_not_panic_on_any_bytes(body in any::<Vec<u8>>()) {
            drop(Heartbeat::decode(&Message { body: body.into(), ..Message::default() }));
        }
    }
}
