//! The fuzz targets, one function per decoder. A panic is a finding; other invariants are asserted.
//!
//! The programs in `fuzz_targets/` run them under libFuzzer. The tests (`tests/src/fuzz.rs`) run
//! them on the corpus and on mutations of it, which needs no nightly compiler. The input of a
//! target that decodes a whole message is the length of the content header in two bytes, the
//! content header, and the body.

use std::fmt::Debug;

use garenne_collector::store::{open_envelope, seal_envelope};
use garenne_common::broker::parse_message;
use garenne_common::wire::{
    Codec, DeadLetter, Lease, Message, Notice, Payload, Properties, Query, Report, Response,
    bundle, frames, report, task,
};
use garenne_common::{DeadReason, QueueName};

/// A target, which must not panic on any bytes.
pub(crate) type Target = fn(&[u8]);

/// Every target by name; the name is also that of its directory in `corpus/`.
pub(crate) const TARGETS: &[(&str, Target)] = &[
    ("properties", properties),
    ("task", task_message),
    ("bundle", task_bundle),
    ("dead", dead_letter),
    ("lease", lease),
    ("reports_bincode", reports_bincode),
    ("reports_json", reports_json),
    ("notice", notice),
    ("query", query),
    ("response", response),
    ("payload", payload),
    ("envelope", envelope),
];

const HEADER_FRAME: u8 = 2;

/// The message in an input, screened and parsed like one from the broker.
fn message(bytes: &[u8]) -> Option<Message> {
    let (length, bytes) = bytes.split_first_chunk::<2>()?;
    let (header, body) = bytes.split_at_checked(u16::from_be_bytes(*length).into())?;
    let mut header = header.to_vec();
    let followed = frames::screen(HEADER_FRAME, &mut header);
    let message = parse_message(&header, body.to_vec());
    assert!(message.is_some() || !followed, "a header that was screened to its end can be parsed");
    message
}

fn of_body(body: &[u8], content_type: &str) -> Message {
    let content_type = Some(content_type.to_owned());
    let properties = Properties { content_type, ..Properties::default() };
    Message { properties, headers: vec![], body: body.to_vec().into() }
}

/// Compares the debug text of two values, since a header may be NaN, which is not equal to itself.
fn same(one: &impl Debug, other: &impl Debug) {
    assert_eq!(format!("{one:?}"), format!("{other:?}"));
}

/// Screening, and that the client library parses screened headers.
pub(crate) fn properties(bytes: &[u8]) {
    if let Some((kind, frame)) = bytes.split_first() {
        frames::screen(*kind, &mut frame.to_vec());
    }
    message(bytes);
}

/// A task: what is accepted can be encoded and decoded again.
pub(crate) fn task_message(bytes: &[u8]) {
    let Some(message) = message(bytes) else { return };
    let queue = QueueName::default();
    match task::decode(&message, &queue) {
        Ok(Some(task)) => {
            let again = task::decode(&task::encode(&task, "fuzz"), &queue);
            // Times are not compared: AMQP's integers are signed, so large ones are reduced.
            assert!(matches!(again, Ok(Some(again)) if again.id == task.id));
            task.options.retry.delay_after(task.attempt, 1.0);
        }
        Ok(None) => {
            let (id, message) = task::assign_id(&message);
            let named = task::decode(&message, &queue);
            assert!(matches!(named, Ok(Some(task)) if task.id == id));
        }
        Err(malformed) => {
            let letter =
                DeadLetter::new(&message, "q", DeadReason::Malformed, &malformed.0, "fuzz");
            same(&DeadLetter::decode(&letter.encode()), &letter);
        }
    }
}

/// A bundle of tasks: what is accepted can be encoded and decoded again, together and as single
/// tasks.
pub(crate) fn task_bundle(bytes: &[u8]) {
    let (message, queue) = (of_body(bytes, "application/x-garenne-tasks"), QueueName::default());
    let Ok(tasks) = bundle::decode(&message, &queue) else { return };
    let Ok(again) = bundle::encode(&tasks, "fuzz") else { panic!("decoded tasks can be encoded") };
    assert_eq!(bundle::decode(&again, &queue).as_ref(), Ok(&tasks));
    assert!(
        matches!(bundle::singles(&message, &queue), Ok(singles) if singles.len() == tasks.len())
    );
}

/// A dead letter: nothing is refused, and the letter survives a round trip.
pub(crate) fn dead_letter(bytes: &[u8]) {
    let Some(message) = message(bytes) else { return };
    let letter = DeadLetter::decode(&message);
    same(&DeadLetter::decode(&letter.encode()), &letter);
    letter.to_result();
    if let Ok(envelope) = seal_envelope(&letter.message) {
        let opened = open_envelope(&envelope, letter.message.body.clone());
        same(&opened.ok(), &Some(letter.message));
    }
}

/// A lease.
pub(crate) fn lease(bytes: &[u8]) {
    let Some(message) = message(bytes) else { return };
    let Ok(lease) = Lease::decode(&message) else { return };
    let again = Lease::decode(&lease.encode()).map(|lease| (lease.id, lease.fence.execution));
    assert_eq!(again, Ok((lease.id, lease.fence.execution)));
}

/// A bundle of reports in bincode, including the version byte.
pub(crate) fn reports_bincode(bytes: &[u8]) {
    reports(&of_body(bytes, "application/x-garenne-reports"));
}

/// A bundle of reports in JSON.
pub(crate) fn reports_json(bytes: &[u8]) {
    reports(&of_body(bytes, "application/json"));
}

fn reports(message: &Message) {
    let Ok(reports) = report::decode(message) else { return };
    let again = report::encode(&reports, "fuzz").map(|message| report::decode(&message));
    same(&again, &Ok::<_, ()>(Ok::<_, ()>(reports.clone())));
    for report in &reports {
        report::weight(report);
        if let Report::Finished(result) = report {
            report::encode_reply(result, None, "fuzz");
        }
    }
}

/// A done notice.
pub(crate) fn notice(bytes: &[u8]) {
    let Ok(notice) = Notice::decode(&of_body(bytes, "application/json")) else { return };
    assert!(notice.key().len() <= 255);
    if let Notice::Batch(batch) = &notice {
        batch.ended();
    }
    same(&Notice::decode(&notice.encode("fuzz")), &Ok::<_, ()>(notice));
}

/// A query to the collector.
pub(crate) fn query(bytes: &[u8]) {
    let Ok(query) = Query::decode(&of_body(bytes, "application/json")) else { return };
    same(&Query::decode(&query.encode("r", "c", 1)), &Ok::<_, ()>(query));
}

/// A response of the collector.
pub(crate) fn response(bytes: &[u8]) {
    let Ok(response) = Response::decode(&of_body(bytes, "application/json")) else { return };
    same(&Response::decode(&response.encode("c")), &Ok::<_, ()>(response));
}

/// Arguments and outputs; the first byte selects the codec.
pub(crate) fn payload(bytes: &[u8]) {
    let Some((codec, bytes)) = bytes.split_first() else { return };
    let codec = if codec % 2 == 0 { Codec::Json } else { Codec::Bincode };
    let payload = Payload { codec, bytes: bytes.to_vec().into() };
    drop(payload.decode::<serde_json::Value>());
    drop(payload.decode::<(String, Vec<u64>, Option<Vec<String>>)>());
    drop(payload.decode::<std::collections::HashMap<String, (i16, f32)>>());
    payload.to_json_value();
    drop(serde_json::to_string(&payload));
}

/// The message of a dead letter as the store keeps it.
pub(crate) fn envelope(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(message) = open_envelope(text, some_body()) else { return };
    let sealed = seal_envelope(&message).ok();
    let opened = sealed.and_then(|sealed| open_envelope(&sealed, some_body()).ok());
    same(&opened, &Some(message));
}

fn some_body() -> bytes::Bytes {
    bytes::Bytes::from_static(b"{}")
}
