//! Reports: what workers and producers tell the collector, many in one message.
//!
//! Between Rust processes a bundle is one version byte and bincode; a producer in another language
//! sends a JSON array of the same reports. The structs of a version are apart from the domain types,
//! so that a change of those is not silently a change of the protocol.

use std::fmt;
use std::marker::PhantomData;
use std::time::Duration;

use bytes::Bytes;
use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::codec::{Codec, Payload, from_bincode, to_bincode};
use super::lease::{Fence, LeaseChange, LeaseNote};
use super::message::{Message, Properties};
use super::{MAX_BODY_BYTES, MAX_JSON_BYTES, MAX_REPORTS, Malformed, within};
use crate::names::{BatchId, QueueName, TaskId, TaskName};
use crate::outcome::{DeadReason, Status, TaskResult};
use crate::timestamp::Timestamp;

/// AMQP `type` of a bundle of reports.
pub const BUNDLE_KIND: &str = "garenne.reports";
/// AMQP `type` of a plain reply.
pub const REPLY_KIND: &str = "garenne.result";
const BUNDLE_CONTENT_TYPE: &str = "application/x-garenne-reports";
const VERSION_1: u8 = 1;

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "report", rename_all = "snake_case")]
pub enum Report {
    /// A task ended.
    Finished(TaskResult),
    /// An attempt failed and the next one waits in the broker.
    Retrying(RetryNote),
    /// A batch was opened; its members follow.
    BatchOpened {
        /// Which batch.
        batch: BatchId,
        /// When.
        at: Timestamp,
        /// When it ends as abandoned if it was not sealed.
        deadline: Timestamp,
    },
    /// All members of a batch are submitted.
    BatchSealed {
        /// Which batch.
        batch: BatchId,
        /// How many tasks it has.
        count: u64,
        /// When.
        at: Timestamp,
    },
    /// What a worker says of a lease it holds.
    Lease(LeaseNote),
    /// A task ended that ran under a lease.
    FinishedUnderLease {
        /// Which execution.
        fence: Fence,
        /// How it ended.
        result: TaskResult,
    },
}

/// An attempt that failed while its task goes on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RetryNote {
    /// Which task.
    pub id: TaskId,
    /// What kind of task.
    pub name: TaskName,
    /// The batch it belongs to.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub batch: Option<BatchId>,
    /// The attempt that failed.
    pub attempt: u32,
    /// How it failed.
    pub error: String,
    /// When the next attempt may start.
    pub next_at: Timestamp,
    /// Who ran it.
    pub worker: String,
    /// When it failed.
    pub at: Timestamp,
}

/// Writes reports as one message. The caller keeps the bundle below [`MAX_BODY_BYTES`].
pub fn encode(reports: &[Report], app_id: &str) -> Result<Message, super::CodecError> {
    let bundle: Vec<ReportV1<'_>> = reports.iter().map(ReportV1::from).collect();
    let mut body = vec![VERSION_1];
    body.extend(to_bincode(&bundle)?);
    let properties = Properties {
        content_type: Some(BUNDLE_CONTENT_TYPE.to_owned()),
        kind: Some(BUNDLE_KIND.to_owned()),
        app_id: Some(app_id.to_owned()),
        ..Properties::default()
    };
    Ok(Message { properties, headers: vec![], body: body.into() })
}

/// Reads a bundle, or the JSON array of another language.
pub fn decode(message: &Message) -> Result<Vec<Report>, Malformed> {
    let content_type = message.properties.content_type.as_deref().unwrap_or_default();
    if Codec::from_content_type(content_type) == Some(Codec::Json) {
        within("a bundle of reports in JSON", &message.body, MAX_JSON_BYTES)?;
        let bundle: Few<Report> = serde_json::from_slice(&message.body).map_err(Malformed::new)?;
        return Ok(bundle.0);
    }
    within("a bundle of reports", &message.body, MAX_BODY_BYTES)?;
    match message.body.split_first() {
        Some((&VERSION_1, rest)) => {
            let bundle: Few<ReportV1Owned> = from_bincode(rest)?;
            bundle.0.into_iter().map(Report::try_from).collect()
        }
        Some((version, _)) => Err(Malformed::new(format_args!("reports of version {version}"))),
        None => Err(Malformed::new("an empty bundle of reports")),
    }
}

/// A list that is refused where it becomes too long: four bytes can be a report of some hundred.
struct Few<T>(Vec<T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Few<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_seq(FewVisitor(PhantomData))
    }
}

struct FewVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for FewVisitor<T> {
    type Value = Few<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of at most {MAX_REPORTS} reports")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Few<T>, A::Error> {
        let mut few = vec![];
        while let Some(item) = list.next_element()? {
            if few.len() == MAX_REPORTS {
                return Err(serde::de::Error::invalid_length(few.len() + 1, &self));
            }
            few.push(item);
        }
        Ok(Few(few))
    }
}

/// The reply that any client can read: one JSON message for one result.
pub fn encode_reply(result: &TaskResult, correlation_id: Option<&str>, app_id: &str) -> Message {
    let properties = Properties {
        content_type: Some(Codec::Json.content_type().to_owned()),
        kind: Some(REPLY_KIND.to_owned()),
        message_id: Some(result.id.to_string()),
        correlation_id: Some(correlation_id.unwrap_or(result.id.as_str()).to_owned()),
        app_id: Some(app_id.to_owned()),
        timestamp: Some(result.finished_at.as_millis() / 1000),
        ..Properties::default()
    };
    // Every field is text, a number or checked JSON, so this cannot fail; an empty object would still
    // be a reply.
    let body = serde_json::to_vec(result).unwrap_or_else(|_| b"{}".to_vec());
    Message { properties, headers: vec![], body: body.into() }
}

/// How many bytes a report adds to a bundle, roughly and never too few by much.
pub fn weight(report: &Report) -> usize {
    match report {
        Report::Finished(result) | Report::FinishedUnderLease { result, .. } => {
            let output = result.output.as_ref().map_or(0, |output| output.bytes.len());
            300 + output + result.error.as_ref().map_or(0, String::len)
        }
        Report::Retrying(note) => 300 + note.error.len(),
        Report::BatchOpened { .. } | Report::BatchSealed { .. } | Report::Lease(_) => 200,
    }
}

/// Version 1 on the wire. Fields are positional: never reorder, never remove, add variants at the end.
#[derive(Serialize)]
enum ReportV1<'a> {
    Finished(ResultV1<&'a str, &'a [u8]>),
    Retrying(RetryV1<&'a str>),
    BatchOpened { batch: &'a str, at: u64, deadline: u64 },
    BatchSealed { batch: &'a str, count: u64, at: u64 },
    Lease(LeaseV1<&'a str>),
    FinishedUnderLease(FenceV1<&'a str>, ResultV1<&'a str, &'a [u8]>),
}

#[derive(Deserialize)]
enum ReportV1Owned {
    Finished(ResultV1<String, Vec<u8>>),
    Retrying(RetryV1<String>),
    BatchOpened { batch: String, at: u64, deadline: u64 },
    BatchSealed { batch: String, count: u64, at: u64 },
    Lease(LeaseV1<String>),
    FinishedUnderLease(FenceV1<String>, ResultV1<String, Vec<u8>>),
}

#[derive(Serialize, Deserialize)]
struct ResultV1<S, B> {
    id: S,
    name: S,
    queue: S,
    batch: Option<S>,
    status: Status,
    output: Option<(Codec, B)>,
    error: Option<S>,
    reason: Option<S>,
    attempt: u32,
    redelivered: bool,
    worker: S,
    started_at: u64,
    finished_at: u64,
}

#[derive(Serialize, Deserialize)]
struct RetryV1<S> {
    id: S,
    name: S,
    batch: Option<S>,
    attempt: u32,
    error: S,
    next_at: u64,
    worker: S,
    at: u64,
}

#[derive(Serialize, Deserialize)]
struct FenceV1<S> {
    number: u64,
    execution: S,
}

#[derive(Serialize, Deserialize)]
struct LeaseV1<S> {
    id: S,
    fence: FenceV1<S>,
    change: LeaseChange,
    at: u64,
}

impl<'a> From<&'a TaskResult> for ResultV1<&'a str, &'a [u8]> {
    fn from(result: &'a TaskResult) -> Self {
        Self {
            id: result.id.as_str(),
            name: result.name.as_str(),
            queue: result.queue.as_str(),
            batch: result.batch.as_ref().map(BatchId::as_str),
            status: result.status,
            output: result.output.as_ref().map(|out| (out.codec, out.bytes.as_ref())),
            error: result.error.as_deref(),
            reason: result.reason.map(DeadReason::as_str),
            attempt: result.attempt,
            redelivered: result.redelivered,
            worker: &result.worker,
            started_at: result.started_at.as_millis(),
            finished_at: result.finished_at.as_millis(),
        }
    }
}

impl<'a> From<&'a Fence> for FenceV1<&'a str> {
    fn from(fence: &'a Fence) -> Self {
        Self { number: fence.number, execution: &fence.execution }
    }
}

impl From<FenceV1<String>> for Fence {
    fn from(fence: FenceV1<String>) -> Self {
        Self { number: fence.number, execution: fence.execution }
    }
}

impl<'a> From<&'a Report> for ReportV1<'a> {
    fn from(report: &'a Report) -> Self {
        match report {
            Report::Finished(result) => Self::Finished(result.into()),
            Report::Retrying(note) => Self::Retrying(RetryV1 {
                id: note.id.as_str(),
                name: note.name.as_str(),
                batch: note.batch.as_ref().map(BatchId::as_str),
                attempt: note.attempt,
                error: &note.error,
                next_at: note.next_at.as_millis(),
                worker: &note.worker,
                at: note.at.as_millis(),
            }),
            Report::BatchOpened { batch, at, deadline } => Self::BatchOpened {
                batch: batch.as_str(),
                at: at.as_millis(),
                deadline: deadline.as_millis(),
            },
            Report::BatchSealed { batch, count, at } => {
                Self::BatchSealed { batch: batch.as_str(), count: *count, at: at.as_millis() }
            }
            Report::Lease(note) => Self::Lease(LeaseV1 {
                id: note.id.as_str(),
                fence: (&note.fence).into(),
                change: note.change,
                at: note.at.as_millis(),
            }),
            Report::FinishedUnderLease { fence, result } => {
                Self::FinishedUnderLease(fence.into(), result.into())
            }
        }
    }
}

impl TryFrom<ReportV1Owned> for Report {
    type Error = Malformed;

    fn try_from(report: ReportV1Owned) -> Result<Self, Malformed> {
        Ok(match report {
            ReportV1Owned::Finished(result) => Self::Finished(result.try_into()?),
            ReportV1Owned::Retrying(note) => Self::Retrying(RetryNote {
                id: TaskId::new(&note.id)?,
                name: TaskName::new(&note.name)?,
                batch: note.batch.as_deref().map(BatchId::new).transpose()?,
                attempt: note.attempt,
                error: note.error,
                next_at: Timestamp::from_millis(note.next_at),
                worker: note.worker,
                at: Timestamp::from_millis(note.at),
            }),
            ReportV1Owned::BatchOpened { batch, at, deadline } => Self::BatchOpened {
                batch: BatchId::new(&batch)?,
                at: Timestamp::from_millis(at),
                deadline: Timestamp::from_millis(deadline),
            },
            ReportV1Owned::BatchSealed { batch, count, at } => Self::BatchSealed {
                batch: BatchId::new(&batch)?,
                count,
                at: Timestamp::from_millis(at),
            },
            ReportV1Owned::Lease(note) => Self::Lease(LeaseNote {
                id: TaskId::new(&note.id)?,
                fence: note.fence.into(),
                change: note.change,
                at: Timestamp::from_millis(note.at),
            }),
            ReportV1Owned::FinishedUnderLease(fence, result) => {
                Self::FinishedUnderLease { fence: fence.into(), result: result.try_into()? }
            }
        })
    }
}

impl TryFrom<ResultV1<String, Vec<u8>>> for TaskResult {
    type Error = Malformed;

    fn try_from(result: ResultV1<String, Vec<u8>>) -> Result<Self, Malformed> {
        let reason = result.reason.map(|code| {
            DeadReason::from_code(&code)
                .ok_or_else(|| Malformed::new(format_args!("dead reason {code:?} is not known")))
        });
        Ok(Self {
            id: TaskId::new(&result.id)?,
            name: TaskName::new(&result.name)?,
            queue: QueueName::new(&result.queue)?,
            batch: result.batch.as_deref().map(BatchId::new).transpose()?,
            status: result.status,
            output: result
                .output
                .map(|(codec, bytes)| Payload { codec, bytes: Bytes::from(bytes) }),
            error: result.error,
            reason: reason.transpose()?,
            attempt: result.attempt,
            redelivered: result.redelivered,
            worker: result.worker,
            started_at: Timestamp::from_millis(result.started_at),
            finished_at: Timestamp::from_millis(result.finished_at),
        })
    }
}

impl RetryNote {
    /// How long the task waits before its next attempt.
    pub fn delay(&self) -> Duration {
        self.next_at.since(self.at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn result(status: Status, error: Option<String>, output: Option<Vec<u8>>) -> TaskResult {
        TaskResult {
            id: TaskId::new("t-1").unwrap(),
            name: TaskName::new("text.count_words").unwrap(),
            queue: QueueName::default(),
            batch: Some(BatchId::new("b-1").unwrap()),
            status,
            output: output.map(|bytes| Payload { codec: Codec::Bincode, bytes: bytes.into() }),
            reason: error.as_ref().map(|_| DeadReason::Fatal),
            error,
            attempt: 2,
            redelivered: true,
            worker: "host:7".to_owned(),
            started_at: Timestamp::from_millis(1_000),
            finished_at: Timestamp::from_millis(1_250),
        }
    }

    fn all_kinds() -> Vec<Report> {
        let batch = BatchId::new("b-1").unwrap();
        let at = Timestamp::from_millis(5);
        let fence = Fence { number: 2, execution: "e".to_owned() };
        vec![
            Report::Finished(result(Status::Succeeded, None, Some(vec![1, 2]))),
            Report::Retrying(RetryNote {
                id: TaskId::new("t-2").unwrap(),
                name: TaskName::new("a").unwrap(),
                batch: None,
                attempt: 1,
                error: "no".to_owned(),
                next_at: Timestamp::from_millis(1005),
                worker: "w".to_owned(),
                at,
            }),
            Report::BatchOpened { batch: batch.clone(), at, deadline: at },
            Report::BatchSealed { batch, count: 3, at },
            Report::Lease(LeaseNote {
                id: TaskId::new("t-3").unwrap(),
                fence: fence.clone(),
                change: LeaseChange::Renewed,
                at,
            }),
            Report::FinishedUnderLease { fence, result: result(Status::Cancelled, None, None) },
        ]
    }

    #[test]
    fn both_forms_carry_every_kind() {
        let mut reports = all_kinds();
        let bundle = encode(&reports, "test").unwrap();
        assert_eq!(decode(&bundle), Ok(reports.clone()));

        // JSON cannot carry a bincode output, as the documentation says.
        let Report::Finished(result) = &mut reports[0] else { panic!() };
        result.output = Some(Payload::encode(Codec::Json, &[1, 2]).unwrap());
        let mut json = bundle;
        json.properties.content_type = Some("application/json".to_owned());
        json.body = serde_json::to_vec(&reports).unwrap().into();
        assert_eq!(decode(&json), Ok(reports));
    }

    /// Golden bytes of version 1: when this fails, the protocol changed and needs a new version byte.
    #[test]
    fn version_1_looks_like_this() {
        let bundle = encode(&all_kinds(), "test").unwrap();
        let hex: String = bundle.body.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, include_str!("golden/reports.v1.hex").trim());
    }

    #[test]
    fn a_bundle_that_would_fill_the_memory_is_refused_on_the_way() {
        // A sealed batch without a name, as often as 16 MiB hold it.
        let count = MAX_BODY_BYTES / 4 - 10;
        let mut body = vec![VERSION_1, 252];
        body.extend(u32::try_from(count).unwrap().to_le_bytes());
        body.extend([3, 0, 0, 0].repeat(count));
        let refused = decode(&Message { body: body.into(), ..Message::default() });
        assert!(refused.unwrap_err().0.contains("at most 10000 reports"));
    }

    #[test]
    fn another_version_is_refused_by_number() {
        let mut bundle = encode(&all_kinds(), "test").unwrap();
        bundle.body = [&[9], &bundle.body[1..]].concat().into();
        assert_eq!(decode(&bundle), Err(Malformed("reports of version 9".to_owned())));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic(body in any::<Vec<u8>>(), json in any::<bool>()) {
            let content_type = json.then(|| "application/json".to_owned());
            let properties = Properties { content_type, ..Properties::default() };
            let body = if json { body } else { [vec![VERSION_1], body].concat() };
            drop(decode(&Message { properties, headers: vec![], body: body.into() }));
        }

        #[test]
        fn results_survive_the_bundle(error in any::<Option<String>>(), output in any::<Vec<u8>>()) {
            let report = Report::Finished(result(Status::Failed, error, Some(output)));
            let bundle = encode(std::slice::from_ref(&report), "test").unwrap();
            prop_assert_eq!(decode(&bundle), Ok(vec![report]));
        }
    }
}
