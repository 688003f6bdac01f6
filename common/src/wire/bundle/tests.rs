//! Bundles survive a round trip, damaged ones are refused, and the bytes are those of the protocol.

use super::*;
use proptest::prelude::*;

fn queue() -> QueueName {
    QueueName::default()
}

fn task(id: &str, name: &str) -> TaskMessage {
    TaskMessage {
        id: TaskId::new(id).unwrap(),
        name: TaskName::new(name).unwrap(),
        queue: queue(),
        args: Payload { codec: Codec::Json, bytes: format!("{{\"n\":{id:?}}}").into() },
        attempt: 1,
        batch: Some(BatchId::new("b-1").unwrap()),
        reply: Some(ReplyTo {
            queue: "reply".into(),
            correlation_id: None,
            format: ReplyFormat::Bundle,
        }),
        options: Options::default(),
        submitted_at: Some(Timestamp::from_millis(1_700_000_000_123)),
        traceparent: None,
        fingerprint: None,
    }
}

fn some() -> Vec<TaskMessage> {
    let mut tasks = vec![task("t-1", "a.b"), task("t-2", "a.b"), task("t-3", "c.d")];
    tasks[1].options.expires_at = Some(Timestamp::from_millis(1_700_000_001_000));
    tasks[2].options.retry = RetryPolicy::retries(7);
    tasks[2].options.timeout = Some(Duration::from_millis(1_500));
    tasks[2].options.soft_timeout = Some(Duration::from_secs(1));
    tasks[2].args = Payload { codec: Codec::Bincode, bytes: vec![1, 2, 3].into() };
    tasks[2].batch = None;
    tasks[2].reply = None;
    tasks[2].traceparent = Some("00-1-2-01".into());
    tasks
}

fn body(bytes: impl Into<Bytes>) -> Message {
    Message { body: bytes.into(), ..encode(&some(), "test").unwrap() }
}

fn reason(message: &Message) -> String {
    decode(message, &queue()).unwrap_err().0
}

#[test]
fn tasks_survive_a_round_trip() {
    let mut tasks = some();
    for task in &mut tasks {
        task.options.priority = Some(3);
    }
    tasks[1].fingerprint = Some(crate::Fingerprint::from_u64(7));
    let bundle = encode(&tasks, "test").unwrap();
    assert!(is_one(&bundle));
    assert_eq!(bundle.properties.priority, Some(3));
    assert_eq!(decode(&bundle, &queue()), Ok(tasks));
}

#[test]
fn a_task_that_leaves_its_bundle_equals_a_task_submitted_alone() {
    let tasks = some();
    let singles = singles(&encode(&tasks, "test").unwrap(), &queue()).unwrap();
    let alone: Vec<Message> = tasks.iter().map(|task| task::encode(task, "test")).collect();
    assert_eq!(singles, alone);
    assert_eq!(task::decode(&singles[1], &queue()), Ok(Some(tasks[1].clone())));
}

#[test]
fn common_fields_of_tasks_are_written_once() {
    let one = encode(&[task("t-1", "a.b")], "test").unwrap().body.len();
    let tasks: Vec<_> = (0..100).map(|n| task(&format!("t-{n}"), "a.b")).collect();
    let hundred = encode(&tasks, "test").unwrap().body.len();
    assert!(hundred < one + 100 * 30, "{one} and {hundred} bytes");
    assert!(hundred < tasks.iter().map(weight).sum::<usize>());
}

/// If this fails, the protocol has changed and needs a new version byte.
#[test]
fn version_1_has_its_golden_bytes() {
    let bundle = encode(&some(), "test").unwrap();
    let hex: String = bundle.body.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(hex, include_str!("../golden/tasks.v1.hex").trim());
}

#[test]
fn each_violation_has_its_own_reason() {
    let whole = encode(&some(), "test").unwrap().body;
    assert!(reason(&body(Bytes::new())).contains("empty"));
    assert!(reason(&body([&[9], &whole[1..]].concat())).contains("version 9"));
    assert!(reason(&body([&whole[..], &[0]].concat())).contains("1 trailing bytes"));
    for length in 1..whole.len() {
        assert!(decode(&body(whole.slice(..length)), &queue()).is_err(), "{length}");
    }
    let mut unprintable = some();
    unprintable[0].reply.as_mut().unwrap().queue = "a\u{7}b".into();
    assert!(reason(&encode(&unprintable, "test").unwrap()).contains("reply_to"));
    unprintable[0].reply.as_mut().unwrap().queue = "q".repeat(256).into();
    assert!(reason(&encode(&unprintable, "test").unwrap()).contains("longer"));
    let mut message = encode(&some(), "test").unwrap();
    message.set_header(headers::HANDED_ON, HeaderValue::Int(1));
    assert!(reason(&message).contains("x-garenne-handed-on is the integer 1"));
}

#[test]
fn too_many_tasks_are_refused_before_they_are_decoded() {
    let count = |heads: usize, tasks: usize| {
        let mut bytes = vec![VERSION_1];
        append_bincode(&(heads, tasks), &mut bytes).unwrap();
        reason(&body(bytes))
    };
    assert!(count(1, MAX_TASKS + 1).contains("1001 tasks"));
    assert!(count(1, usize::MAX).contains("tasks with 1 heads"));
    assert!(count(3, 2).contains("3 heads"));
    assert!(count(0, 0).contains("0 tasks"));
}

#[test]
fn a_bundle_that_was_given_back_stays_marked() {
    let mut bundle = encode(&some(), "test").unwrap();
    assert!(!is_handed_on(&bundle));
    mark_handed_on(&mut bundle);
    assert!(is_handed_on(&bundle));
    assert!(is_handed_on(&task::for_republish(&bundle)));
}

proptest! {
    #[test]
    fn the_decoder_does_not_panic_on_any_bytes(bytes in any::<Vec<u8>>()) {
        drop(decode(&body([vec![VERSION_1], bytes].concat()), &queue()));
    }

    #[test]
    fn a_changed_byte_loses_no_task_silently(place in 0..200_usize, byte in any::<u8>()) {
        let mut bytes = encode(&some(), "test").unwrap().body.to_vec();
        let place = place % bytes.len();
        bytes[place] = byte;
        if let Ok(tasks) = decode(&body(bytes), &queue()) {
            prop_assert_eq!(tasks.len(), 3);
        }
    }

    #[test]
    fn any_tasks_survive_a_round_trip(
        rows in prop::collection::vec(
            ("[a-zA-Z0-9 é-]{1,40}", "[a-z.]{1,3}", any::<Vec<u8>>(), any::<Option<u32>>()),
            1..40,
        ),
    ) {
        let tasks: Vec<_> = rows.into_iter().map(|(id, name, args, at)| TaskMessage {
            args: Payload { codec: Codec::Bincode, bytes: args.into() },
            submitted_at: at.map(|at| Timestamp::from_millis(at.into())),
            ..task(&id, &name)
        }).collect();
        prop_assert_eq!(decode(&encode(&tasks, "test").unwrap(), &queue()), Ok(tasks));
    }
}

#[test]
fn fingerprints_must_be_as_many_as_tasks() {
    for (texts, sound) in [(",,", true), (",", false), (",,,", false), ("x,,", false)] {
        let mut message = encode(&some(), "test").unwrap();
        message.set_header(headers::FINGERPRINTS, HeaderValue::Text(texts.to_owned()));
        assert_eq!(decode(&message, &queue()).is_ok(), sound, "{texts}");
    }
}
