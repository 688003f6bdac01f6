//! Reports of workers and producers to the collector, many in one message.
//!
//! A bundle is one version byte and bincode; clients in other languages send a JSON array of the
//! same reports. The structs of a version are separate from the domain types, so that changing
//! those does not silently change the protocol.

mod bounded;
mod model;
mod v2;

use serde::Deserialize;
use serde_json::value::RawValue;

use self::bounded::Bounded;
pub use self::model::{Report, RetryNote};
use super::codec::{Codec, CodecError};
use super::lease::Fence;
use super::malformed::{MAX_BODY_BYTES, MAX_JSON_BYTES, Malformed, within};
use super::message::{Message, Properties};
use crate::outcome::TaskResult;

/// AMQP `type` of a bundle of reports.
pub const BUNDLE_KIND: &str = "garenne.reports";
/// AMQP `type` of a plain reply.
pub const REPLY_KIND: &str = "garenne.result";
const BUNDLE_CONTENT_TYPE: &str = "application/x-garenne-reports";

/// Encodes reports as one message. The caller keeps the bundle below [`MAX_BODY_BYTES`], by
/// [`weight`]. `app_id` is the name of the publishing process.
pub fn encode(reports: &[Report], app_id: &str) -> Result<Message, CodecError> {
    let body = v2::encode(reports)?;
    let properties = Properties {
        content_type: Some(BUNDLE_CONTENT_TYPE.to_owned()),
        kind: Some(BUNDLE_KIND.to_owned()),
        app_id: Some(app_id.to_owned()),
        ..Properties::default()
    };
    Ok(Message { properties, headers: vec![], body: body.into() })
}

/// Decodes a bundle or a JSON array of reports. The outputs in a bundle are slices of its body and
/// keep all of it in memory.
pub fn decode(message: &Message) -> Result<Vec<Report>, Malformed> {
    let content_type = message.properties.content_type.as_deref().unwrap_or_default();
    if Codec::from_content_type(content_type) == Some(Codec::Json) {
        within("a bundle of reports in JSON", &message.body, MAX_JSON_BYTES)?;
        let bundle: Bounded<&RawValue> =
            serde_json::from_slice(&message.body).map_err(Malformed::new)?;
        let reports = bundle.0.into_iter().map(|report| from_json(report.get()));
        return reports.collect::<Result<_, _>>().map_err(Malformed::new);
    }
    within("a bundle of reports", &message.body, MAX_BODY_BYTES)?;
    match message.body.first() {
        Some(&v2::VERSION) => v2::decode(&message.body),
        Some(version) => Err(Malformed::new(format_args!("reports of unknown version {version}"))),
        None => Err(Malformed::new("an empty bundle of reports")),
    }
}

/// Decodes one report in JSON. Reports with outputs are not decoded by their derived
/// implementation: that buffers the fields of a tagged enum, and a buffered number becomes a float.
fn from_json(json: &str) -> Result<Report, serde_json::Error> {
    #[derive(Deserialize)]
    struct ReportTag<'a> {
        #[serde(borrow)]
        report: std::borrow::Cow<'a, str>,
    }
    #[derive(Deserialize)]
    struct UnderLease {
        fence: Fence,
        result: TaskResult,
    }
    let ReportTag { report } = serde_json::from_str(json)?;
    Ok(match &*report {
        "finished" => Report::Finished(serde_json::from_str(json)?),
        "finished_under_lease" => {
            let UnderLease { fence, result } = serde_json::from_str(json)?;
            Report::FinishedUnderLease { fence, result }
        }
        _ => serde_json::from_str(json)?,
    })
}

/// Encodes the plain reply: one JSON message for one result. Without a `correlation_id` the reply
/// has the id of the task.
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
    // A reply names the batch by its id, since its reader must not get the key.
    let public = result.batch.as_ref().map(|batch| batch.public().into_owned());
    let result = TaskResult { batch: public, ..result.clone() };
    // Every field is text, a number or checked JSON, so encoding does not fail.
    let body = serde_json::to_vec(&result).unwrap_or_else(|_| b"{}".to_vec());
    Message { properties, headers: vec![], body: body.into() }
}

/// Size of a report in a bundle, in bytes: approximate, and never much too small.
pub fn weight(report: &Report) -> usize {
    match report {
        Report::Finished(result) | Report::FinishedUnderLease { result, .. } => {
            let output = result.output.as_ref().map_or(0, |output| output.bytes.len());
            300 + output + result.error.as_ref().map_or(0, String::len)
        }
        Report::Retrying(note) => 300 + note.error.len(),
        Report::BatchOpened { .. }
        | Report::BatchSealed { .. }
        | Report::Conflict { .. }
        | Report::Lease(_) => 200,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fingerprint::Fingerprint;
    use crate::names::{BatchId, QueueName, TaskId, TaskName};
    use crate::outcome::{DeadReason, Status};
    use crate::timestamp::Timestamp;
    use crate::wire::codec::Payload;
    use crate::wire::lease::{LeaseChange, LeaseNote};
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
            worker: "host:7".into(),
            started_at: Timestamp::from_millis(1_000),
            finished_at: Timestamp::from_millis(1_250),
            fingerprint: None,
        }
    }

    #[test]
    fn fingerprints_and_conflicts_survive_a_round_trip() {
        let fingerprint = Some(Fingerprint::from_u64(7));
        let result = TaskResult { fingerprint, ..result(Status::Succeeded, None, Some(vec![1])) };
        let fence = Fence { number: 2, execution: "e".to_owned() };
        let conflict =
            Report::Conflict { id: TaskId::new("t").unwrap(), queried: Fingerprint::from_u64(9) };
        let reports = [
            Report::Finished(result.clone()),
            Report::FinishedUnderLease { fence, result },
            conflict,
        ];
        assert_eq!(decode(&encode(&reports, "w").unwrap()), Ok(reports.to_vec()));
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
    fn both_formats_carry_every_report() {
        let mut reports = all_kinds();
        let bundle = encode(&reports, "test").unwrap();
        assert_eq!(decode(&bundle), Ok(reports.clone()));

        // JSON cannot carry a bincode output.
        let Report::Finished(result) = &mut reports[0] else { panic!() };
        result.output = Some(Payload::encode(Codec::Json, &[1, 2]).unwrap());
        let mut json = bundle;
        json.properties.content_type = Some("application/json".to_owned());
        json.body = serde_json::to_vec(&reports).unwrap().into();
        assert_eq!(decode(&json), Ok(reports));
    }

    /// If this fails, the protocol has changed and needs a new version byte.
    #[test]
    fn version_2_has_its_golden_bytes() {
        let bundle = encode(&all_kinds(), "test").unwrap();
        let hex: String = bundle.body.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, include_str!("golden/reports.v2.hex").trim());
    }

    #[test]
    fn decoding_stops_at_the_limit_of_reports() {
        // Sealed batches with an empty id, as many as fit into 16 MiB.
        let count = MAX_BODY_BYTES / 4 - 10;
        let mut body = vec![v2::VERSION, 0, 252];
        body.extend(u32::try_from(count).unwrap().to_le_bytes());
        body.extend([3, 0, 0, 0].repeat(count));
        let refused = decode(&Message { body: body.into(), ..Message::default() });
        assert!(refused.unwrap_err().0.contains("at most 10000 reports"));
    }

    #[test]
    fn an_unknown_version_is_refused() {
        let mut bundle = encode(&all_kinds(), "test").unwrap();
        bundle.body = [&[9], &bundle.body[1..]].concat().into();
        assert_eq!(decode(&bundle), Err(Malformed("reports of unknown version 9".to_owned())));
    }

    #[test]
    fn a_result_whose_head_is_missing_is_malformed() {
        let one = Report::Finished(result(Status::Succeeded, None, None));
        let mut bundle = encode(&[one], "test").unwrap();
        let mut body = bundle.body.to_vec();
        // The only head is followed by the number of reports, the variant and the head's number.
        let place = body.windows(3).rposition(|bytes| bytes == [1, 0, 0]).unwrap() + 2;
        body[place] = 1;
        bundle.body = body.into();
        assert!(decode(&bundle).unwrap_err().0.contains("head 1, which is missing"));
    }

    #[test]
    fn common_fields_of_results_are_written_once() {
        let one = Report::Finished(result(Status::Succeeded, None, None));
        let size = |count| encode(&vec![one.clone(); count], "test").unwrap().body.len();
        assert_eq!(size(3) - size(2), size(2) - size(1));
        assert!(size(2) - size(1) < 20, "{}", size(2) - size(1));
    }

    proptest! {
        #[test]
        fn the_decoder_does_not_panic_on_any_bytes(
            body in any::<Vec<u8>>(), json in any::<bool>(),
        ) {
            let content_type = json.then(|| "application/json".to_owned());
            let properties = Properties { content_type, ..Properties::default() };
            let body = if json { body } else { [vec![v2::VERSION], body].concat() };
            drop(decode(&Message { properties, headers: vec![], body: body.into() }));
        }

        #[test]
        fn results_survive_a_round_trip(
            error in any::<Option<String>>(),
            output in any::<Vec<u8>>(),
            workers in prop::collection::vec("[ab]{0,2}", 0..9),
            times in any::<(u64, u64)>(),
        ) {
            let report = |worker: String| {
                let mut result = result(Status::Failed, error.clone(), Some(output.clone()));
                result.batch = result.batch.filter(|_| worker.len() != 1);
                result.worker = worker.into();
                result.started_at = Timestamp::from_millis(times.0);
                result.finished_at = Timestamp::from_millis(times.1);
                Report::Finished(result)
            };
            let reports: Vec<_> = workers.into_iter().map(report).collect();
            let bundle = encode(&reports, "test").unwrap();
            prop_assert_eq!(decode(&bundle), Ok(reports));
        }
    }
}
