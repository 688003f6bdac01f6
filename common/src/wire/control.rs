//! Control messages: cancel requests for all workers, as JSON on the topic exchange `control`.
//!
//! Best effort: a broadcast reaches only workers that are connected; others query the collector for
//! what they have missed ([`super::Query::Cancels`]). The collector's store keeps the requests.

use serde::{Deserialize, Serialize};

use super::codec::Codec;
use super::malformed::{Malformed, within};
use super::message::{Message, Properties};
use crate::names::{BatchId, TaskId};

/// AMQP `type` of a control message.
pub const CONTROL_KIND: &str = "garenne.control";
/// The routing key of cancel requests.
pub const CANCEL_KEY: &str = "cancel";
const VERSION: u32 = 1;
/// Largest control message, in bytes.
const MAX_CONTROL_BYTES: usize = 4 * 1024 * 1024;

/// The subject of a cancel request.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CancelTarget {
    /// One task.
    Task(TaskId),
    /// All tasks of a batch, including those that are submitted later.
    Batch(BatchId),
}

/// A cancel request that the collector keeps until it has taken effect.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CancelRequest {
    /// Sequence number in the collector's list; later requests have higher numbers.
    pub seq: u64,
    /// The task or batch to cancel.
    #[serde(flatten)]
    pub target: CancelTarget,
    /// Why; becomes the error text of the cancelled tasks.
    pub reason: String,
}

/// A control message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Control {
    /// New cancel requests.
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

    /// Encodes the message. `app_id` is the name of the publishing process.
    pub fn encode(&self, app_id: &str) -> Message {
        let Self::Cancel(requests) = self;
        let body = serde_json::to_vec(&ControlV1 { v: VERSION, cancel: requests.clone() });
        let properties = Properties {
            content_type: Some(Codec::Json.content_type().to_owned()),
            kind: Some(CONTROL_KIND.to_owned()),
            app_id: Some(app_id.to_owned()),
            ..Properties::default()
        };
        // Structs of text and numbers always encode.
        Message { properties, headers: vec![], body: body.unwrap_or_default().into() }
    }

    /// Decodes a control message. Fails on another version and on more than 4 MiB.
    pub fn decode(message: &Message) -> Result<Self, Malformed> {
        within("a control message", &message.body, MAX_CONTROL_BYTES)?;
        let ControlV1 { v, cancel } =
            serde_json::from_slice(&message.body).map_err(Malformed::new)?;
        if v != VERSION {
            return Err(Malformed::new(format_args!("a control message of unknown version {v}")));
        }
        Ok(Self::Cancel(cancel))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The sample of docs/protocol.md.
    #[test]
    fn version_1_has_the_documented_bytes() {
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
    fn an_unknown_version_is_refused() {
        let message =
            Message { body: r#"{"v":2,"cancel":[]}"#.into(), ..Control::Cancel(vec![]).encode("") };
        let expected = Malformed("a control message of unknown version 2".to_owned());
        assert_eq!(Control::decode(&message), Err(expected));
    }

    proptest! {
        #[test]
        fn the_decoder_does_not_panic_on_any_bytes(body in any::<Vec<u8>>()) {
            drop(Control::decode(&Message { body: body.into(), ..Message::default() }));
        }
    }
}
