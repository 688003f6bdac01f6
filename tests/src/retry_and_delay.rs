//! A failed attempt is followed by the next one, after a wait in the broker, until the budget is used up
//! (promise 3); panics and time limits are failures like any other.

use std::time::Duration;

use garenne_common::wire::{Report, RetryNote, TaskState};
use garenne_common::{DeadReason, RetryPolicy, Status, Task};
use garenne_producer::{OutputError, Retried, Submission};
use garenne_worker::{Context, TaskError, Worker};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::harness::{SOON, Soon, Warren, message, soon};

fn quick(attempts: u32) -> RetryPolicy {
    let base = Duration::from_millis(50);
    RetryPolicy { max_attempts: attempts, base, ..RetryPolicy::DEFAULT }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_failures_and_a_success_are_three_attempts() {
    let warren = Warren::new().await;
    let _crew = warren.crew().await;
    let producer = warren.producer().await;
    let mut notes = producer.retry_notes();
    let failing = Submission::dynamic("garenne.fail", json!({ "times": 2, "message": "not yet" }));
    let handle = producer.submit(failing.unwrap().retry_policy(quick(5))).await.unwrap();
    let id = handle.id().clone();
    let result = handle.result().soon("the third attempt succeeds").await.unwrap();
    assert_eq!((result.status, result.attempt), (Status::Succeeded, 3));
    for attempt in [1, 2] {
        let Some(Retried::Note(note)) = notes.next().soon("a note").await else { panic!() };
        assert_eq!((note.attempt, note.error.as_str()), (attempt, "not yet"));
    }
    let attempts = soon("the collector has recorded both failures", async || {
        let query = format!("SELECT attempt FROM attempts WHERE task = '{id}' ORDER BY attempt");
        let recorded: Vec<i64> = warren.rows(&query);
        (recorded.len() == 2).then_some(recorded)
    });
    assert_eq!(attempts.await, [1, 2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_waiting_retry_is_known_to_the_collector() {
    let warren = Warren::new().await;
    let _crew = warren.crew().await;
    let producer = warren.producer().await;
    let slow =
        RetryPolicy { base: Duration::from_hours(1), max: Duration::from_hours(1), ..quick(2) };
    let failing = Submission::dynamic("garenne.fail", json!({})).unwrap().retry_policy(slow);
    let id = producer.submit_detached(failing).await.unwrap();
    let note: RetryNote =
        soon("the note is stored", async || match producer.task_state(&id).await.unwrap() {
            TaskState::Retrying { last } => Some(last),
            TaskState::Unknown => None,
            other => panic!("{other:?}"),
        })
        .await;
    assert!(note.delay() >= Duration::from_mins(30), "{note:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_used_up_budget_is_a_dead_letter_a_record_and_a_typed_failure() {
    let warren = Warren::new().await;
    let _crew = warren.crew().await;
    let producer = warren.producer().await;
    let failing = Submission::dynamic("garenne.fail", json!({ "message": "no luck" })).unwrap();
    let handle = producer.submit(failing.retry_policy(quick(2))).await.unwrap();
    let id = handle.id().clone();
    let error = handle.output().soon("it is given up").await.unwrap_err();
    let OutputError::Failed { reason, error, attempt, .. } = error else { panic!("{error:?}") };
    assert_eq!(reason, Some(DeadReason::RetriesExhausted));
    assert_eq!((error.as_str(), attempt), ("no luck", 2));
    let letter = soon("the letter is stored", async || producer.dead(&id).await.unwrap()).await;
    assert_eq!(letter.reason, DeadReason::RetriesExhausted);
    let args = letter.args.map(|args| args.to_json_value());
    assert_eq!(args, Some(json!({ "message": "no luck" })), "the task is kept whole");
    let TaskState::Finished { result } = producer.task_state(&id).await.unwrap() else { panic!() };
    assert_eq!((result.status, result.attempt), (Status::Failed, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn fatal_failures_panics_and_time_limits_end_as_what_they_are() {
    let warren = Warren::new().await;
    let _worker = warren.worker().set("worker.concurrency", 1).start().await;
    let producer = warren.producer().await;
    let fail = |args| Submission::dynamic("garenne.fail", args).unwrap().retry_policy(quick(2));
    let sleep = Submission::dynamic("garenne.sleep", json!({ "millis": 600_000 })).unwrap();
    for (submission, reason, attempts) in [
        (fail(json!({ "fatal": true })), DeadReason::Fatal, 1),
        (fail(json!({ "panic": true })), DeadReason::Panicked, 2),
        (sleep.retry_policy(quick(2)).timeout(Duration::from_millis(100)), DeadReason::TimedOut, 2),
    ] {
        let handle = producer.submit(submission).await.unwrap();
        let result = handle.result().soon("it is given up").await.unwrap();
        assert_eq!((result.reason, result.attempt), (Some(reason), attempts), "{result:?}");
    }
}

#[derive(Serialize, Deserialize)]
struct Busy {
    wait: u64,
}

impl Task for Busy {
    const NAME: &'static str = "test.busy";
    type Output = u64;
}

async fn busy(context: Context, task: Busy) -> Result<u64, TaskError> {
    let wait = Duration::from_millis(task.wait);
    if context.attempt() == 1 { Err(TaskError::retry_after(wait, "busy")) } else { Ok(7) }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_waits_for_its_own_delay_and_not_for_the_earlier_one_besides() {
    let warren = Warren::new().await;
    let builder = Worker::builder(warren.config()).register::<Busy, _, _>(busy);
    let running = warren.work(builder).await;
    let (amqp, producer) = tokio::join!(warren.amqp(), warren.producer());
    let hour = Duration::from_hours(1);
    let submission = Submission::new(Busy { wait: 3_600_000 }).delay(Duration::from_millis(300));
    producer.submit_detached(submission.retry_policy(quick(2))).await.unwrap();
    let route = warren.config().broker.topology().delay_route(hour).unwrap();
    let waiting = amqp.tap(&route.exchange).await.next().await;
    let names = waiting.headers.iter().map(|(name, _)| name.to_string());
    let (mut marks, others): (Vec<_>, Vec<_>) =
        names.partition(|name| name.starts_with("garenne-delay-"));
    marks.sort_unstable_by(|a, b| b.cmp(a));
    assert_eq!(marks, route.marks);
    let spent = others.iter().find(|name| name.contains("death"));
    assert_eq!(spent, None, "what the broker wrote on the way is left behind");
    running.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handler_may_say_how_long_the_next_attempt_must_wait() {
    let warren = Warren::new().await;
    let builder = Worker::builder(warren.config()).register::<Busy, _, _>(busy);
    let running = warren.work(builder).await;
    let (amqp, producer) = tokio::join!(warren.amqp(), warren.producer());
    let mut reports = amqp.results().await;
    // The policy alone would retry within 50 ms.
    let submission = Submission::new(Busy { wait: 800 }).retry_policy(quick(2));
    let id = producer.submit_detached(submission).await.unwrap();
    let Report::Retrying(note) = reports.reports().await.remove(0) else { panic!() };
    let result = reports.result().await;
    assert_eq!((&result.id, result.attempt), (&id, 2));
    assert!(result.started_at.since(note.at) >= Duration::from_millis(800), "{result:?}");
    running.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blocking_handler_fails_panics_and_overruns_like_an_async_one() {
    #[derive(Serialize, Deserialize)]
    struct Grind(String);
    impl Task for Grind {
        const NAME: &'static str = "test.grind";
        type Output = String;
    }
    fn grind(context: &Context, Grind(how): Grind) -> Result<String, TaskError> {
        assert!(how != "panic", "as asked");
        while how == "hang" && !context.is_cancelled() {
            std::thread::park_timeout(Duration::from_millis(5));
        }
        if how == "fail" { Err(TaskError::fatal("as asked")) } else { Ok(how) }
    }
    let warren = Warren::new().await;
    let builder = Worker::builder(warren.config()).register_blocking::<Grind, _>(grind);
    let running = warren.work(builder).await;
    let producer = warren.producer().await;
    for (how, reason) in [
        ("fail", Some(DeadReason::Fatal)),
        ("panic", Some(DeadReason::Panicked)),
        ("hang", Some(DeadReason::TimedOut)),
        ("work", None),
    ] {
        let limit = if how == "hang" { Duration::from_millis(500) } else { SOON };
        let submission = Submission::new(Grind(how.to_owned())).retries(0).timeout(limit);
        let result =
            producer.submit(submission).await.unwrap().result().soon("it ends").await.unwrap();
        assert_eq!(result.reason, reason, "{how}: {result:?}");
    }
    running.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_keeps_what_its_sender_wrote() {
    let warren = Warren::new().await;
    let _worker = warren.worker().start().await;
    let amqp = warren.amqp().await;
    let mut task = message("garenne.fail", "t-1", &json!({ "times": 1 }));
    let text = |text: &str| garenne_common::wire::HeaderValue::Text(text.to_owned());
    task.set_header("x-mine", text("kept"));
    task.set_header("x-garenne-retry-base-ms", text("1"));
    task.set_header("x-garenne-max-attempts", text("1"));
    task.set_header("x-garenne-batch", text("b-1"));
    amqp.task(task.clone()).await;
    let letter = amqp.dead().await.letter().await;
    assert_eq!(letter.message.header("x-mine"), Some(&text("kept")));
    assert_eq!(letter.batch().unwrap().as_str(), "b-1");
    // Under its old id it would be what it is, a settled task that came again.
    task.properties.message_id = Some("t-2".to_owned());
    task.set_header("x-garenne-max-attempts", text("2"));
    amqp.task(task).await;
    let result = amqp.results().await.result().await;
    assert_eq!((result.attempt, result.batch.unwrap().as_str()), (2, "b-1"));
}
