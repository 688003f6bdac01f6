//! Bad input never stops a worker (promise 6): it goes to the dead letters whole, with a reason, and the
//! next task runs.

use std::collections::HashMap;

use garenne_common::DeadReason;
use garenne_common::wire::HeaderValue;
use serde_json::{Value, json};

use crate::harness::{Amqp, Foreign, Warren, message};

/// What a sender gets wrong, why it is given up, and what the error must name.
fn cases() -> Vec<(Value, DeadReason, &'static str)> {
    use DeadReason::{Expired, Malformed, UnknownTask};
    let good = || json!({ "type": "garenne.echo", "message_id": "x" });
    let body = |body: &str| json!({ "properties": good(), "body": body });
    let property = |name: &str, value: Value| {
        let mut properties = good();
        properties[name] = value;
        json!({ "properties": properties, "body": "{}" })
    };
    let header = |name: &str, value: Value| json!({ "properties": good(), "body": "{}", "headers": { name: value } });
    vec![
        (property("type", Value::Null), Malformed, "type (the task name) is missing"),
        (property("type", json!("a b")), Malformed, "task name"),
        (property("type", json!("no.such_task")), UnknownTask, "no.such_task"),
        (body(""), Malformed, "not JSON"),
        (body("{\"text\": \"a"), Malformed, "not JSON"),
        (body("{} {}"), Malformed, "not JSON"),
        (json!({ "properties": good(), "body_hex": "22ff22" }), Malformed, "not JSON"),
        (property("content_type", json!("text/plain")), Malformed, "text/plain"),
        (property("content_encoding", json!("gzip")), Malformed, "gzip"),
        (property("message_id", json!("a\u{1b}[31m")), Malformed, "task id"),
        (property("message_id", json!("x".repeat(200))), Malformed, "task id"),
        (
            json!({ "properties": { "type": "text.count_words" }, "body": "{\"wrong\": 1}" }),
            Malformed,
            "wrong arguments",
        ),
        (
            json!({ "properties": { "type": "file.sha256", "message_id": "bin",
                    "content_type": "application/x-bincode" }, "body_hex": "fdffffffffffffffff" }),
            Malformed,
            "wrong arguments",
        ),
        (header("x-garenne-attempt", json!("many")), Malformed, "x-garenne-attempt"),
        (header("x-garenne-max-attempts", json!(-1)), Malformed, "x-garenne-max-attempts"),
        (header("x-garenne-timeout-ms", json!(true)), Malformed, "x-garenne-timeout-ms"),
        (header("x-garenne-retry-factor", json!("NaN")), Malformed, "x-garenne-retry-factor"),
        (header("x-garenne-batch", json!(7)), Malformed, "x-garenne-batch"),
        (header("x-garenne-reply-format", json!("morse")), Malformed, "morse"),
        (header("x-garenne-expires-at-ms", json!(1_000)), Expired, "1970"),
        (
            json!({ "properties": good(), "body": "{}", "many_headers": 6000 }),
            Malformed,
            "too large",
        ),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn every_mistake_becomes_a_dead_letter_with_its_reason() {
    let warren = Warren::new().await;
    let _worker = warren.worker().start().await;
    let amqp = warren.amqp().await;
    let cases = cases();
    let messages = cases.iter().enumerate().map(|(number, (message, ..))| {
        let mut message = message.clone();
        message["headers"]["case"] = json!(number);
        addressed(&warren, message)
    });
    Foreign::new(warren.url()).publish(messages.collect(), 0).await;

    let (mut dead, mut letters) = (amqp.dead().await, HashMap::new());
    while letters.len() < cases.len() {
        let letter = dead.letter().await;
        let Some(HeaderValue::Int(case)) = letter.message.header("case").cloned() else {
            panic!("a letter lost its headers: {letter:?}")
        };
        assert!(letters.insert(case, letter).is_none(), "case {case} twice");
    }
    for (number, (sent, reason, names)) in (0_i64..).zip(&cases) {
        let letter = &letters[&number];
        assert_eq!(letter.reason, *reason, "{sent}: {letter:?}");
        assert!(letter.error.contains(names), "{sent}: {}", letter.error);
        let body = sent["body"].as_str().unwrap_or_default();
        if sent.get("body_hex").is_none() {
            assert_eq!(letter.message.body, body.as_bytes(), "the letter is whole");
        }
    }
    goes_on(&amqp).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn odd_but_sound_messages_run() {
    let warren = Warren::new().await;
    let _worker = warren.worker().start().await;
    let amqp = warren.amqp().await;
    let odd = |more: Value| {
        let mut message = json!({ "properties": { "type": "garenne.echo" }, "body": "7" });
        for (key, value) in more.as_object().unwrap() {
            message[key] = value.clone();
        }
        addressed(&warren, message)
    };
    let messages = json!([
        odd(
            json!({ "headers": { "deep": { "er": [1, { "x": null }] }, "x-garenne-attempt": "2" } })
        ),
        odd(json!({ "many_headers": 2000 })),
        odd(json!({ "properties": { "type": "garenne.echo", "reply_to": "nobody.reads.this",
                "content_type": "Application/JSON; charset=utf-8", "content_encoding": "utf-8",
                "expiration": "60000", "priority": 9, "user_id": "guest", "timestamp": 1 } })),
        odd(json!({ "headers": { "x-garenne-attempt": 0 } })),
    ]);
    let count = messages.as_array().unwrap().len();
    Foreign::new(warren.url()).publish(messages, 0).await;
    let mut results = amqp.results().await;
    let mut succeeded = 0;
    while succeeded < count {
        for report in results.reports().await {
            let garenne_common::wire::Report::Finished(result) = report else {
                panic!("{report:?}")
            };
            assert_eq!(result.output.unwrap().to_json_value(), json!(7));
            succeeded += 1;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_are_no_text_where_text_belongs_do_not_stop_the_worker() {
    let warren = Warren::new().await;
    let _worker = warren.worker().start().await;
    let amqp = warren.amqp().await;
    let properties = json!({ "type": "garenne.echo" });
    let not_utf8 = |header: &str| {
        let bytes = json!({ header: "fffe41" });
        let message = json!({ "properties": properties, "header_bytes": bytes, "body": "1" });
        addressed(&warren, message)
    };
    let messages =
        json!([not_utf8("x-mine"), not_utf8("traceparent"), not_utf8("x-garenne-attempt")]);
    Foreign::new(warren.url()).publish(messages, 0).await;
    assert_eq!(amqp.dead().await.letter().await.reason, DeadReason::Malformed);
    goes_on(&amqp).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_without_an_id_gets_one_and_runs_once() {
    let warren = Warren::new().await;
    let _worker = warren.worker().start().await;
    let amqp = warren.amqp().await;
    let mut task = message("garenne.echo", "", &json!("hello"));
    task.properties.message_id = None;
    amqp.task(task).await;
    let mut results = amqp.results().await;
    let result = results.result().await;
    assert_eq!(result.id.as_str().len(), 36, "a UUID: {}", result.id);
    // Whatever a second run sent would come before the result of this later task.
    amqp.task(message("garenne.echo", "later", &json!(1))).await;
    assert_eq!(results.result().await.id.as_str(), "later");
}

fn addressed(warren: &Warren, mut message: Value) -> Value {
    message["exchange"] = json!(warren.config().broker.topology().tasks_exchange());
    message["key"] = json!("default");
    message
}

/// The worker still runs sound tasks.
async fn goes_on(amqp: &Amqp) {
    amqp.task(message("garenne.echo", "after-all-that", &json!(1))).await;
    let mut results = amqp.results().await;
    while results.result().await.id.as_str() != "after-all-that" {}
}
