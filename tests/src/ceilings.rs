//! A task that asks to be retried for ever gets no more than its worker allows, and its dead letter says
//! which limit ended it.

use std::collections::HashMap;

use garenne_common::DeadReason;
use garenne_common::wire::{HeaderValue, Message, Report};
use serde_json::json;

use crate::harness::{Service, Soon, Warren, message};

/// What no policy of ours would ask for: retries without end and without a pause.
fn endless(id: &str) -> Message {
    let mut message = message("garenne.fail", id, &json!({ "message": "again" }));
    message.set_header("x-garenne-max-attempts", HeaderValue::Int(4_294_967_295));
    message.set_header("x-garenne-retry-base-ms", HeaderValue::Int(0));
    message
}

async fn dies(worker: Service<'_>, warren: &Warren, task: Message) -> (String, Message) {
    let _worker = worker.start().await;
    let amqp = warren.amqp().await;
    let mut dead = amqp.dead().await;
    amqp.task(task).await;
    let letter = dead.letter().soon("the task is given up").await;
    assert_eq!(letter.reason, DeadReason::RetriesExhausted);
    assert!(letter.error.ends_with("again"), "{}", letter.error);
    (letter.error, letter.message)
}

fn attempt(message: &Message) -> Option<&HeaderValue> {
    message.header("x-garenne-attempt")
}

#[tokio::test(flavor = "multi_thread")]
async fn attempts_have_a_ceiling() {
    let warren = Warren::new().await;
    let worker = warren.worker().set("worker.max_attempts", 12);
    let worker = worker.set("worker.min_retry_delay", "0s");
    let (error, message) = dies(worker, &warren, endless("t-1")).await;
    assert!(error.contains("attempt 12") && error.contains("worker.max_attempts is 12"), "{error}");
    assert_eq!(attempt(&message), Some(&HeaderValue::Int(12)));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_time_of_retrying_has_a_ceiling_whatever_the_sender_says_of_its_age() {
    let warren = Warren::new().await;
    // After the tenth attempt the pause alone would outlast it, so nothing here is a matter of time.
    let worker = warren.worker().set("worker.max_task_age", "1h");
    let worker = worker.set("worker.min_retry_delay", "2h");
    let mut task = endless("t-1");
    let future = HeaderValue::Int(4_102_444_800_000);
    task.set_header("x-garenne-first-attempt-at-ms", future.clone());
    let (error, message) = dies(worker, &warren, task).await;
    assert!(
        error.contains("attempt 10") && error.contains("worker.max_task_age is 3600s"),
        "{error}"
    );
    assert_eq!(attempt(&message), Some(&HeaderValue::Int(10)));
    let first = message.header("x-garenne-first-attempt-at-ms");
    assert!(
        first.is_some_and(|first| *first != future),
        "the worker's own clock counts: {first:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn many_quick_retries_slow_down_by_default() {
    let warren = Warren::new().await;
    let _worker = warren.worker().start().await;
    let (amqp, mut pauses) = (warren.amqp().await, HashMap::new());
    let mut results = amqp.results().await;
    amqp.task(endless("t-1")).await;
    while pauses.len() < 11 {
        for report in results.reports().soon("it is retried").await {
            if let Report::Retrying(note) = report {
                pauses.insert(note.attempt, note.next_at.since(note.at));
            }
        }
    }
    for (attempt, pause) in pauses {
        let expected = u64::from(attempt >= 10);
        assert_eq!(pause.as_secs(), expected, "after attempt {attempt}: {pause:?}");
    }
}
