//! Nothing that is stored breaks the listing of the rest, however deeply it is nested; and a body that
//! is too large for a worker is refused before it is parsed.

use garenne_common::wire::{DeadLetter, Message, Payload, Report};
use garenne_common::{
    BatchId, Codec, DeadReason, QueueName, Status, TaskId, TaskName, TaskResult, Timestamp,
};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::harness::{Ended, Warren, message, soon};

fn nested(depth: usize) -> String {
    format!("{}{}", "[".repeat(depth), "]".repeat(depth))
}

fn with_body(id: &str, body: impl Into<Vec<u8>>) -> Message {
    Message { body: body.into().into(), ..message("no.such", id, &Value::Null) }
}

/// As a worker in another language may report it.
fn result(id: &str, status: Status, output: Option<String>, error: Option<String>) -> Report {
    Report::Finished(TaskResult {
        id: TaskId::new(id).unwrap(),
        name: TaskName::new("a.b").unwrap(),
        queue: QueueName::default(),
        batch: Some(BatchId::new("b-1").unwrap()),
        status,
        output: output.map(|text| Payload { codec: Codec::Json, bytes: text.into_bytes().into() }),
        reason: error.as_ref().map(|_| DeadReason::Fatal),
        error,
        attempt: 1,
        redelivered: false,
        worker: "w".into(),
        started_at: Timestamp::from_millis(1),
        finished_at: Timestamp::from_millis(2),
        fingerprint: None,
    })
}

/// On a busy machine an answer of megabytes takes its time.
async fn patient(warren: &Warren, command: &[&str]) -> Ended {
    warren.garenne(&[command, &["--deadline", "30s"]].concat()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_nested_deeply_hides_nothing_else() {
    let warren = Warren::new().await;
    let _collector = warren.collector().start().await;
    let amqp = warren.amqp().await;
    let dead = warren.config().broker.topology().dead();
    let bodies = [1, 100, 101, 120, 126, 127, 128, 1_500]
        .map(|depth| (format!("deep-{depth}"), nested(depth)));
    // A body whose text in JSON is six times as long.
    let control = std::iter::repeat_n(("control".to_owned(), "\u{1}".repeat(1 << 20)), 1);
    let bodies: Vec<_> = bodies.into_iter().chain(control).collect();
    for (id, body) in &bodies {
        let message = with_body(id, body.as_str());
        let unknown = DeadReason::UnknownTask;
        let letter = DeadLetter::new(&message, "default", unknown, "nobody knows it", "w");
        amqp.publish(&dead, "", letter.encode()).await;
    }
    let ended = [
        result("out", Status::Succeeded, Some(nested(126)), None),
        result("failed", Status::Failed, Some(nested(126)), Some("x".repeat(2 << 20))),
    ];
    amqp.reports(&ended).await;
    soon("everything is stored", async || {
        let letters = warren.rows::<u32>("SELECT count(*) FROM dead_letters");
        let results = warren.rows::<u32>("SELECT count(*) FROM results");
        (letters == [u32::try_from(bodies.len()).unwrap()] && results == [2]).then_some(())
    })
    .await;

    let list = patient(&warren, &["dead", "list", "-o", "json"]).await.json();
    assert_eq!(list.as_array().unwrap().len(), bodies.len());
    patient(&warren, &["dead", "list"]).await.ok();
    let export = patient(&warren, &["dead", "export"]).await.ok();
    assert_eq!(export.lines().count(), bodies.len());
    for (id, body) in &bodies {
        let shown = patient(&warren, &["dead", "show", id, "-o", "json"]).await.json();
        assert_eq!(shown["message"]["body_text"], json!(body), "{id}");
        let text = patient(&warren, &["dead", "show", id]).await.ok();
        let depth = body.matches('[').count();
        assert_eq!(text.contains("nested too deeply"), depth > 100, "{id}");
        patient(&warren, &["task", "show", id]).await.ok();
        patient(&warren, &["task", "show", id, "-o", "json"]).await.json();
    }
    for task in ["out", "failed"] {
        patient(&warren, &["task", "show", task, "-o", "json"]).await.json();
    }
    let batch = patient(&warren, &["batch", "show", "b-1", "-o", "json"]).await.json();
    assert_eq!(batch["failures"][0]["id"], "failed");
    // What workers would refuse is refused, line by line, and the rest goes.
    let replayed = patient(&warren, &["dead", "replay", "--all", "--yes"]).await;
    assert_eq!((replayed.code, replayed.stdout.lines().count()), (Some(1), bodies.len()));
    soon("what workers would take was replayed", async || {
        let left =
            warren.rows::<u32>("SELECT count(*) FROM dead_letters WHERE replayed_as IS NULL");
        (left == [7]).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_refuse_what_no_answer_could_show() {
    let warren = Warren::new().await;
    let _worker = warren.worker().start().await;
    let amqp = warren.amqp().await;
    let (mut dead, mut results) = (amqp.dead().await, amqp.results().await);
    let echo = |id: &str, depth| Message {
        body: nested(depth).into_bytes().into(),
        ..message("garenne.echo", id, &Value::Null)
    };
    amqp.task(echo("deep", 101)).await;
    let letter = dead.letter().await;
    assert_eq!((letter.id.as_str(), letter.reason), ("deep", DeadReason::Malformed));
    assert!(letter.error.contains("100 levels"), "{}", letter.error);
    amqp.task(echo("fine", 100)).await;
    assert_eq!(results.result().await.id.as_str(), "fine");
    let producer = warren.producer().await;
    let args: Value = serde_json::from_str(&nested(101)).unwrap();
    let submission = garenne_producer::Submission::dynamic("garenne.echo", args).unwrap();
    let error = producer.submit(submission).await.unwrap_err().to_string();
    assert!(error.contains("100 levels"), "{error}");
}

/// In MiB.
fn peak_of(process: Pid) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1024
}

#[tokio::test(flavor = "multi_thread")]
async fn large_bodies_are_refused_before_they_are_parsed() {
    let warren = Warren::new().await;
    let amqp = warren.amqp().await;
    let zeros = format!("[0{}]", ",0".repeat(7 * 1024 * 1024 - 1));
    let mut dead = amqp.dead().await;
    for n in 0..16 {
        let body = zeros.clone().into_bytes().into();
        let large = Message { body, ..message("garenne.echo", &format!("l-{n}"), &Value::Null) };
        amqp.task(large).await;
    }
    // One within a bundle of small ones, too.
    let tasks = [("b-0", "1".to_owned()), ("b-1", format!("\"{}\"", "x".repeat(1024 * 1024)))];
    let tasks = tasks.map(|(id, body)| {
        let message =
            Message { body: body.into_bytes().into(), ..message("garenne.echo", id, &Value::Null) };
        garenne_common::wire::task::decode(&message, &QueueName::default()).unwrap().unwrap()
    });
    amqp.task(garenne_common::wire::bundle::encode(&tasks, "tests").unwrap()).await;
    let worker = warren.worker().set("worker.concurrency", 16).start().await;
    for _ in 0..17 {
        let letter = dead.letter().await;
        assert_eq!(letter.reason, DeadReason::Malformed);
        assert!(letter.error.contains("worker.max_body"), "{}", letter.error);
    }
    assert_eq!(amqp.results().await.result().await.id.as_str(), "b-0");
    let peak = peak_of(worker.id());
    // The bodies alone are 224 MiB; parsed they take some 1,700.
    assert!(peak < 800, "{peak} MiB");
}
