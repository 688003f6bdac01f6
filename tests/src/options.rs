//! Every option of a submission does what it says: queue, delay, retries, timeout, expires, id, priority.

use std::time::Duration;

use garenne_common::{DeadReason, QueueName, RetryPolicy, Status, TaskId, TaskResult, Timestamp};
use garenne_producer::{Handle, Producer, Submission, SubmitError};
use serde_json::{Value, json};

use crate::harness::{Soon, Warren, soon};

fn task(name: &str, args: Value) -> Submission<Value> {
    Submission::dynamic(name, args).unwrap()
}

/// Fast retries, so that tests need not wait for them.
fn quick(attempts: u32) -> RetryPolicy {
    let base = Duration::from_millis(50);
    RetryPolicy { max_attempts: attempts, base, ..RetryPolicy::DEFAULT }
}

async fn run(producer: &Producer, submission: Submission<Value>) -> TaskResult {
    producer.submit(submission).await.unwrap().result().soon("the task ends").await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_queue_has_its_own_workers() {
    let warren = Warren::new().await;
    let (_default, _cpu) = tokio::join!(
        warren.worker().arg("--name").arg("generalist").start(),
        warren.worker().arg("--name").arg("specialist").queues("cpu,gpu").start(),
    );
    let producer = warren.producer().await;
    for (queue, worker) in [("default", "generalist"), ("cpu", "specialist"), ("gpu", "specialist")]
    {
        let result = run(&producer, task("garenne.echo", json!(1)).queue(queue).unwrap()).await;
        assert_eq!((result.queue.as_str(), &*result.worker), (queue, worker));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_queue_that_does_not_exist_is_an_error_and_no_lost_task() {
    let warren = Warren::new().await;
    let producer = warren.producer().await;
    let submission = task("garenne.echo", json!(1)).queue("nowhere").unwrap();
    let error = producer.submit(submission).await.unwrap_err();
    let queue = QueueName::new("nowhere").unwrap();
    assert_eq!(error, SubmitError::UnknownQueue { queue });
    assert!(error.to_string().contains("start a worker that serves it"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn delays_are_never_short() {
    let warren = Warren::new().await;
    let _worker = warren.worker().start().await;
    let producer = warren.producer().await;
    let mut delayed: Vec<(Duration, Timestamp, Handle<Value>)> = vec![];
    for millis in [1, 100, 350, 1_000, 2_700] {
        let delay = Duration::from_millis(millis);
        let submission = task("garenne.echo", json!(millis)).delay(delay);
        let before = Timestamp::now();
        delayed.push((delay, before, producer.submit(submission).await.unwrap()));
    }
    for (delay, before, handle) in delayed {
        let result = handle.result().soon("a delayed task ends").await.unwrap();
        let waited = result.started_at.since(before);
        assert!(waited >= delay, "{waited:?} is shorter than {delay:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn retries_are_as_many_as_asked_for() {
    let warren = Warren::new().await;
    let _worker = warren.worker().start().await;
    let producer = warren.producer().await;
    let failing = || task("garenne.fail", json!({}));
    for (submission, attempts) in [
        (failing().retries(0), 1),
        (failing().retry_policy(quick(1)), 1),
        (failing().retry_policy(quick(3)), 3),
    ] {
        let result = run(&producer, submission).await;
        assert_eq!((result.status, result.attempt), (Status::Failed, attempts));
        assert_eq!(result.reason, Some(DeadReason::RetriesExhausted));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_beyond_its_time_limit_is_cut_and_its_slot_is_free() {
    let warren = Warren::new().await;
    let _worker = warren.worker().set("worker.concurrency", 1).start().await;
    let producer = warren.producer().await;
    let endless = task("garenne.sleep", json!({ "millis": 600_000 }));
    let limit = Duration::from_millis(200);
    let result = run(&producer, endless.timeout(limit).retries(0)).await;
    assert_eq!(result.reason, Some(DeadReason::TimedOut));
    let took = result.finished_at.since(result.started_at);
    assert!(took >= limit, "{took:?}");
    assert_eq!(run(&producer, task("garenne.echo", json!(1))).await.status, Status::Succeeded);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_worker_s_own_time_limit_holds_for_tasks_that_bring_none() {
    let warren = Warren::new().await;
    let _worker = warren.worker().set("worker.task_timeout", "150ms").start().await;
    let producer = warren.producer().await;
    let endless = task("garenne.sleep", json!({ "millis": 600_000 })).retries(0);
    assert_eq!(run(&producer, endless).await.reason, Some(DeadReason::TimedOut));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_task_is_given_up_without_an_attempt() {
    let warren = Warren::new().await;
    let producer = warren.producer().await;
    let span = Duration::from_millis(200);
    let handle = producer.submit(task("garenne.echo", json!(1)).expires_in(span)).await.unwrap();
    let after = Timestamp::now().plus(span);
    soon("its time has passed", async || (Timestamp::now() > after).then_some(())).await;
    let _worker = warren.worker().start().await;
    let result = handle.result().soon("the task is given up").await.unwrap();
    assert_eq!((result.reason, result.attempt), (Some(DeadReason::Expired), 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_id_ends_once_however_often_it_is_submitted() {
    let warren = Warren::new().await;
    // One slot: tasks run in the order of their submission.
    let worker = warren.worker().set("worker.concurrency", 1);
    let (_worker, _collector) = tokio::join!(worker.start(), warren.collector().start());
    let producer = warren.producer().await;
    let id = TaskId::new("order 17/été").unwrap();
    for n in 1..=3 {
        let again = task("garenne.echo", json!(n)).id(id.clone());
        assert_eq!(producer.submit_detached(again).await.unwrap(), id);
    }
    let last = run(&producer, task("garenne.echo", json!("last"))).await;
    soon("everything is stored", async || {
        let results = producer.results(std::slice::from_ref(&last.id)).await.unwrap();
        (results.len() == 1).then_some(())
    })
    .await;
    let stored = producer.results(std::slice::from_ref(&id)).await.unwrap().remove(0);
    assert_eq!(stored.output.unwrap().to_json_value(), json!(1), "the first result counts");
    assert_eq!(producer.totals().await.unwrap().results, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_can_read_a_waiting_message() {
    let warren = Warren::new().await;
    let (amqp, producer) = tokio::join!(warren.amqp(), warren.producer());
    let submission = task("garenne.echo", json!({ "a": 1 })).priority(7).traceparent("00-ab-cd-01");
    let id = producer.submit_detached(submission).await.unwrap();
    let topology = warren.config().broker.topology();
    let mut queue = amqp.tap(&topology.task_queue(&QueueName::default())).await;
    let message = queue.next().await;
    let properties = message.properties;
    assert_eq!(properties.kind.as_deref(), Some("garenne.echo"));
    assert_eq!(properties.message_id.as_deref(), Some(id.as_str()));
    assert_eq!(properties.content_type.as_deref(), Some("application/json"));
    assert_eq!(properties.priority, Some(7));
    assert!(properties.app_id.is_some() && properties.timestamp.is_some(), "{properties:?}");
    assert_eq!(message.body, &br#"{"a":1}"#[..]);
}

#[tokio::test(flavor = "multi_thread")]
async fn contradictions_are_refused_before_anything_is_sent() {
    let warren = Warren::new().await;
    let producer = warren.producer().await;
    let sound = || task("garenne.echo", json!(1));
    let minute = Duration::from_mins(1);
    for (wrong, names) in [
        (sound().delay(Duration::from_hours(24 * 60)), "60 days"),
        (sound().delay(minute).expires_in(minute), "expires"),
        (sound().timeout(Duration::ZERO), "timeout"),
        (sound().retry_policy(quick(0)), "max_attempts"),
        (sound().retry_policy(RetryPolicy { factor: f64::NAN, ..quick(2) }), "factor"),
    ] {
        let error = producer.submit(wrong).await.unwrap_err();
        assert!(matches!(&error, SubmitError::Invalid(text) if text.contains(names)), "{error:?}");
    }
    assert!(Submission::dynamic("a b", 1).is_err());
    assert!(sound().queue("a/b").is_err());
    assert_eq!(warren.amqp().await.waiting().await, 0);
}
