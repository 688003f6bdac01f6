//! What all workers must hear: cancel requests, as JSON on the topic exchange `control`.
//!
//! Best effort: nobody may be listening, and whoever was away asks the collector for what it missed
//! ([`super::Query::Cancels`]). The cancel request itself lies in the collector's store.

use serde::{Deserialize, Serialize};

use super::message::{Message, Properties};
use super::{Codec, Malformed};
use crate::names::{BatchId, TaskId};

/// AMQP's `type` of a control message.
pub const CONTROL_KIND: &str = "garenne.control";
/// The routing key of cancel requests.
pub const CANCEL_KEY: &str = "cancel";
const VERSION: u32 = 1;
/// Nothing that is said here is longer.
const MAX_CONTROL_BYTES: usize = 4 * 1024 * 1024;

/// What is to be cancelled.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CancelTarget {
    /// One task.
    Task(TaskId),
    /// All tasks of a batch, those included that are submitted later.
    Batch(BatchId),
}

/// A cancel request that the collector keeps until it has taken effect.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CancelRequest {
    /// Its place in the collector's list; later cancel requests have higher numbers.
    pub seq: u64,
    /// What is to be cancelled.
    #[serde(flatten)]
    pub target: CancelTarget,
    /// Why; becomes the error text of what is cancelled.
    pub reason: String,
}

/// A control message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Control {
    /// These cancel requests are new.
    Cancel(Vec<CancelRequest>),
}

#[derive(Serialize, Deserialize)]
struct ControlV1 {
    v: u32,
    cancel: Vec<CancelRequest>,
}

impl Control {
    /// The routing key.
    pub const fn key(&self) -> &'static str {
        match self {
            Self::Cancel(_) => CANCEL_KEY,
        }
    }

    /// Writes it.
    pub fn encode(&self, app_id: &str) -> Message {
        let Self::Cancel(requests) = self;
        let body = serde_json::to_vec(&ControlV1 { v: VERSION, cancel: requests.clone() });
        let properties = Properties {
            content_type: Some(Codec::Json.content_type().to_owned()),
            kind: Some(CONTROL_KIND.to_owned()),
            app_id: Some(app_id.to_owned()),
            ..Properties::default()
        };
        // Plain data always encodes.
        Message { properties, headers: vec![], body: body.unwrap_or_default().into() }
    }

    /// Reads one.
    pub fn decode(message: &Message) -> Result<Self, Malformed> {
        if message.body.len() > MAX_CONTROL_BYTES {
            return Err(Malformed::new(format_args!("{} bytes of control", message.body.len())));
        }
        let read: ControlV1 = serde_json::from_slice(&message.body).map_err(Malformed::new)?;
        if read.v != VERSION {
            return Err(Malformed::new(format_args!("control of version {}", read.v)));
        }
        Ok(Self::Cancel(read.cancel))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The golden sample of version 1; docs/protocol.md shows it.
    #[test]
    fn version_1_looks_like_this() {
        let control = Control::Cancel(vec![
            CancelRequest {
                seq: 17,
                target: CancelTarget::Task(TaskId::new("order-17").unwrap()),
                reason: "wrong month".to_owned(),
            },
            CancelRequest {
                seq: 18,
                target: CancelTarget::Batch(BatchId::new("b-1").unwrap()),
                reason: "all of it".to_owned(),
            },
        ]);
        let message = control.encode("me");
        let golden = r#"{"v":1,"cancel":[{"seq":17,"task":"order-17","reason":"wrong month"},{"seq":18,"batch":"b-1","reason":"all of it"}]}"#;
        assert_eq!(std::str::from_utf8(&message.body).unwrap(), golden);
        assert_eq!(Control::decode(&message), Ok(control));
    }

    #[test]
    fn another_version_is_refused_by_number() {
        let message =
            Message { body: r#"{"v":2,"cancel":[]}"#.into(), ..Control::Cancel(vec![]).encode("") };
        assert_eq!(Control::decode(&message), Err(Malformed("control of version 2".to_owned())));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic(body in any::<Vec<u8>>()) {
            drop(Control::decode(&Message { body: body.into(), ..Message::default() }));
        }
    }
}
