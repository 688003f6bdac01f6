//! Version 2 of a bundle: its layout, encoding and decoding.
//!
//! The results of one worker repeat the names of task, queue, batch and worker. These are written
//! once, as heads, and a result refers to its head by number. Decoding borrows from the body: a
//! result costs one allocation for its id, and another one if it carries an error.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize, Serializer};

use super::super::codec::{Codec, CodecError, Payload, append_bincode, from_bincode};
use super::super::lease::{Fence, LeaseChange, LeaseNote};
use super::super::malformed::Malformed;
use super::bounded::Bounded;
use super::model::{Report, RetryNote};
use crate::fingerprint::Fingerprint;
use crate::names::{BatchId, QueueName, TaskId, TaskName};
use crate::outcome::{DeadReason, Status, TaskResult};
use crate::timestamp::Timestamp;

/// The first byte of a body.
pub(super) const VERSION: u8 = 2;
/// Typical size of a result in bytes; an estimate, so that the buffer seldom grows.
const TYPICAL_BYTES: usize = 100;

/// Encodes reports as a body.
pub(super) fn encode(reports: &[Report]) -> Result<Vec<u8>, CodecError> {
    let mut heads = Heads::default();
    let written = reports.iter().map(|report| heads.report(report)).collect();
    let mut body = Vec::with_capacity(TYPICAL_BYTES * (reports.len() + 1));
    body.push(VERSION);
    append_bincode(&BundleV2 { heads: Bounded(heads.list), reports: Bounded(written) }, &mut body)?;
    Ok(body)
}

/// Decodes a body. Outputs are slices of it and keep all of it in memory.
pub(super) fn decode(body: &Bytes) -> Result<Vec<Report>, Malformed> {
    let bundle: BundleV2<'_> = from_bincode(body.get(1..).unwrap_or_default())?;
    let heads =
        bundle.heads.0.into_iter().map(ResultHead::try_from).collect::<Result<Vec<_>, _>>()?;
    let reading = Reading { heads, body };
    bundle.reports.0.into_iter().map(|report| reading.report(report)).collect()
}

/// Fields are positional: never reorder, never remove, add variants at the end.
#[derive(Serialize, Deserialize)]
struct BundleV2<'a> {
    #[serde(borrow)]
    heads: Bounded<HeadV2<'a>>,
    #[serde(borrow)]
    reports: Bounded<ReportV2<'a>>,
}

/// The fields that the results of one worker have in common.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct HeadV2<'a> {
    name: &'a str,
    queue: &'a str,
    #[serde(borrow)]
    batch: Option<&'a str>,
    worker: &'a str,
}

#[derive(Serialize, Deserialize)]
enum ReportV2<'a> {
    #[serde(borrow)]
    Finished(ResultV2<'a>),
    #[serde(borrow)]
    Retrying(RetryV2<'a>),
    BatchOpened {
        batch: &'a str,
        at: u64,
        deadline: u64,
    },
    BatchSealed {
        batch: &'a str,
        count: u64,
        at: u64,
    },
    #[serde(borrow)]
    Lease(LeaseV2<'a>),
    FinishedUnderLease(#[serde(borrow)] FenceV2<'a>, #[serde(borrow)] ResultV2<'a>),
    /// A result with the fingerprint of its task.
    FingerprintedFinished(u64, #[serde(borrow)] ResultV2<'a>),
    FingerprintedFinishedUnderLease(
        u64,
        #[serde(borrow)] FenceV2<'a>,
        #[serde(borrow)] ResultV2<'a>,
    ),
    Conflict {
        id: &'a str,
        queried: u64,
    },
}

#[derive(Serialize, Deserialize)]
struct ResultV2<'a> {
    head: u32,
    id: &'a str,
    status: Status,
    #[serde(borrow)]
    output: Option<(Codec, Blob<'a>)>,
    #[serde(borrow)]
    error: Option<&'a str>,
    #[serde(borrow)]
    reason: Option<&'a str>,
    attempt: u32,
    redelivered: bool,
    started_at: u64,
    /// Milliseconds from start to end; negative if a clock was set back in between.
    took: i64,
}

/// Bytes that are encoded as a whole; serde would encode a slice one number at a time.
#[derive(Deserialize)]
struct Blob<'a>(#[serde(borrow)] &'a [u8]);

#[derive(Serialize, Deserialize)]
struct RetryV2<'a> {
    id: &'a str,
    name: &'a str,
    #[serde(borrow)]
    batch: Option<&'a str>,
    attempt: u32,
    error: &'a str,
    next_at: u64,
    worker: &'a str,
    at: u64,
}

#[derive(Serialize, Deserialize)]
struct FenceV2<'a> {
    number: u64,
    execution: &'a str,
}

#[derive(Serialize, Deserialize)]
struct LeaseV2<'a> {
    id: &'a str,
    #[serde(borrow)]
    fence: FenceV2<'a>,
    change: LeaseChange,
    at: u64,
}

impl Serialize for Blob<'_> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_bytes(self.0)
    }
}

/// The heads of a bundle that is being encoded.
#[derive(Default)]
struct Heads<'a> {
    list: Vec<HeadV2<'a>>,
    numbers: HashMap<HeadV2<'a>, u32>,
    /// The head of the previous result. Neighbours usually share it, and then nothing is hashed.
    last: Option<(HeadV2<'a>, u32)>,
}

impl<'a> Heads<'a> {
    fn number(&mut self, result: &'a TaskResult) -> u32 {
        let head = HeadV2 {
            name: result.name.as_str(),
            queue: result.queue.as_str(),
            batch: result.batch.as_ref().map(BatchId::as_str),
            worker: &result.worker,
        };
        if let Some((_, number)) = self.last.filter(|(last, _)| *last == head) {
            return number;
        }
        let next = u32::try_from(self.list.len()).unwrap_or(u32::MAX);
        let number = *self.numbers.entry(head).or_insert(next);
        if number == next {
            self.list.push(head);
        }
        self.last = Some((head, number));
        number
    }

    fn result(&mut self, result: &'a TaskResult) -> ResultV2<'a> {
        let (started_at, finished_at) =
            (result.started_at.as_millis(), result.finished_at.as_millis());
        ResultV2 {
            head: self.number(result),
            id: result.id.as_str(),
            status: result.status,
            output: result.output.as_ref().map(|out| (out.codec, Blob(&out.bytes))),
            error: result.error.as_deref(),
            reason: result.reason.map(DeadReason::as_str),
            attempt: result.attempt,
            redelivered: result.redelivered,
            started_at,
            took: finished_at.wrapping_sub(started_at).cast_signed(),
        }
    }

    fn report(&mut self, report: &'a Report) -> ReportV2<'a> {
        match report {
            Report::Finished(result) => match result.fingerprint {
                None => ReportV2::Finished(self.result(result)),
                Some(it) => ReportV2::FingerprintedFinished(it.as_u64(), self.result(result)),
            },
            Report::Retrying(note) => ReportV2::Retrying(note.into()),
            Report::BatchOpened { batch, at, deadline } => ReportV2::BatchOpened {
                batch: batch.as_str(),
                at: at.as_millis(),
                deadline: deadline.as_millis(),
            },
            Report::BatchSealed { batch, count, at } => {
                ReportV2::BatchSealed { batch: batch.as_str(), count: *count, at: at.as_millis() }
            }
            Report::Lease(note) => ReportV2::Lease(LeaseV2 {
                id: note.id.as_str(),
                fence: (&note.fence).into(),
                change: note.change,
                at: note.at.as_millis(),
            }),
            Report::FinishedUnderLease { fence, result } => match result.fingerprint {
                None => ReportV2::FinishedUnderLease(fence.into(), self.result(result)),
                Some(it) => ReportV2::FingerprintedFinishedUnderLease(
                    it.as_u64(),
                    fence.into(),
                    self.result(result),
                ),
            },
            Report::Conflict { id, queried } => {
                ReportV2::Conflict { id: id.as_str(), queried: queried.as_u64() }
            }
        }
    }
}

impl<'a> From<&'a RetryNote> for RetryV2<'a> {
    fn from(note: &'a RetryNote) -> Self {
        Self {
            id: note.id.as_str(),
            name: note.name.as_str(),
            batch: note.batch.as_ref().map(BatchId::as_str),
            attempt: note.attempt,
            error: &note.error,
            next_at: note.next_at.as_millis(),
            worker: &note.worker,
            at: note.at.as_millis(),
        }
    }
}

impl<'a> From<&'a Fence> for FenceV2<'a> {
    fn from(fence: &'a Fence) -> Self {
        Self { number: fence.number, execution: &fence.execution }
    }
}

/// A decoded head, validated once for all its results.
struct ResultHead {
    name: TaskName,
    queue: QueueName,
    batch: Option<BatchId>,
    worker: Arc<str>,
}

/// A bundle that is being decoded.
struct Reading<'a> {
    heads: Vec<ResultHead>,
    body: &'a Bytes,
}

impl Reading<'_> {
    fn report(&self, report: ReportV2<'_>) -> Result<Report, Malformed> {
        Ok(match report {
            ReportV2::Finished(result) => Report::Finished(self.result(&result)?),
            ReportV2::Retrying(note) => Report::Retrying(note.try_into()?),
            ReportV2::BatchOpened { batch, at, deadline } => Report::BatchOpened {
                batch: BatchId::new(batch)?,
                at: Timestamp::from_millis(at),
                deadline: Timestamp::from_millis(deadline),
            },
            ReportV2::BatchSealed { batch, count, at } => Report::BatchSealed {
                batch: BatchId::new(batch)?,
                count,
                at: Timestamp::from_millis(at),
            },
            ReportV2::Lease(note) => Report::Lease(LeaseNote {
                id: TaskId::new(note.id)?,
                fence: note.fence.into(),
                change: note.change,
                at: Timestamp::from_millis(note.at),
            }),
            ReportV2::FinishedUnderLease(fence, result) => {
                Report::FinishedUnderLease { fence: fence.into(), result: self.result(&result)? }
            }
            ReportV2::FingerprintedFinished(number, result) => {
                Report::Finished(self.fingerprinted(number, &result)?)
            }
            ReportV2::FingerprintedFinishedUnderLease(number, fence, result) => {
                let result = self.fingerprinted(number, &result)?;
                Report::FinishedUnderLease { fence: fence.into(), result }
            }
            ReportV2::Conflict { id, queried } => {
                Report::Conflict { id: TaskId::new(id)?, queried: Fingerprint::from_u64(queried) }
            }
        })
    }

    fn fingerprinted(&self, number: u64, result: &ResultV2<'_>) -> Result<TaskResult, Malformed> {
        let result = self.result(result)?;
        Ok(TaskResult { fingerprint: Some(Fingerprint::from_u64(number)), ..result })
    }

    fn result(&self, result: &ResultV2<'_>) -> Result<TaskResult, Malformed> {
        let head = usize::try_from(result.head).ok().and_then(|number| self.heads.get(number));
        let head = head.ok_or_else(|| {
            Malformed::new(format_args!(
                "a result refers to head {}, which is missing",
                result.head
            ))
        })?;
        Ok(TaskResult {
            id: TaskId::new(result.id)?,
            name: head.name.clone(),
            queue: head.queue.clone(),
            batch: head.batch.clone(),
            status: result.status,
            output: result.output.as_ref().map(|(codec, output)| self.payload(*codec, output)),
            error: result.error.map(str::to_owned),
            reason: result.reason.map(dead_reason).transpose()?,
            attempt: result.attempt,
            redelivered: result.redelivered,
            worker: Arc::clone(&head.worker),
            started_at: Timestamp::from_millis(result.started_at),
            finished_at: Timestamp::from_millis(
                result.started_at.wrapping_add(result.took.cast_unsigned()),
            ),
            fingerprint: None,
        })
    }

    fn payload(&self, codec: Codec, output: &Blob<'_>) -> Payload {
        // The output was borrowed from this body, so it is a part of it.
        Payload { codec, bytes: self.body.slice_ref(output.0) }
    }
}

fn dead_reason(code: &str) -> Result<DeadReason, Malformed> {
    DeadReason::from_code(code)
        .ok_or_else(|| Malformed::new(format_args!("unknown dead-letter reason {code:?}")))
}

impl TryFrom<HeadV2<'_>> for ResultHead {
    type Error = Malformed;

    fn try_from(head: HeadV2<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            name: TaskName::new(head.name)?,
            queue: QueueName::new(head.queue)?,
            batch: head.batch.map(BatchId::new).transpose()?,
            worker: head.worker.into(),
        })
    }
}

impl TryFrom<RetryV2<'_>> for RetryNote {
    type Error = Malformed;

    fn try_from(note: RetryV2<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            id: TaskId::new(note.id)?,
            name: TaskName::new(note.name)?,
            batch: note.batch.map(BatchId::new).transpose()?,
            attempt: note.attempt,
            error: note.error.to_owned(),
            next_at: Timestamp::from_millis(note.next_at),
            worker: note.worker.to_owned(),
            at: Timestamp::from_millis(note.at),
        })
    }
}

impl From<FenceV2<'_>> for Fence {
    fn from(fence: FenceV2<'_>) -> Self {
        Self { number: fence.number, execution: fence.execution.to_owned() }
    }
}
