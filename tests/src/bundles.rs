//! Bundles are only the way of tasks to a worker: each task in one keeps its own fate, a worker that
//! dies in the middle of one loses nothing and counts nothing twice, and none keeps a worker busy while
//! others are idle (promises 2 to 5).

use std::collections::HashSet;
use std::time::{Duration, Instant};

use futures_util::{StreamExt, TryStreamExt, stream};
use garenne_common::wire::{Message, bundle, task};
use garenne_common::{DeadReason, QueueName, RetryPolicy, Status, TaskId, TaskResult, Timestamp};
use garenne_producer::{Handle, Submission, SubmitError};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::harness::{Proxy, Sends, Soon, Warren, effects, message, soon, supervise};

/// Processes die and are started again, on a machine that does other things besides.
const PATIENCE: Duration = Duration::from_mins(2);

fn work(name: &str, args: Value) -> Submission<Value> {
    Submission::dynamic(name, args).unwrap()
}

fn echo(value: u32) -> Submission<Value> {
    work("garenne.echo", json!(value))
}

fn sleep(millis: u64) -> Submission<Value> {
    work("garenne.sleep", json!({ "millis": millis }))
}

fn effect(millis: u64) -> Submission<Value> {
    work("test.effect", json!({ "millis": millis })).retry_policy(RetryPolicy::NONE)
}

fn handles(outcomes: Vec<Result<Handle<Value>, SubmitError>>) -> Vec<Handle<Value>> {
    outcomes.into_iter().map(Result::unwrap).collect()
}

async fn ended(handles: Vec<Handle<Value>>) -> Vec<TaskResult> {
    let results = stream::iter(handles).then(Handle::result).try_collect();
    results.within(PATIENCE, "all of them end").await.unwrap()
}

/// A bundle of echoes, as a message.
fn bundle_of(ids: &[&str]) -> Message {
    let decode = |id| task::decode(&message("garenne.echo", id, &json!(id)), &QueueName::default());
    let tasks: Vec<_> = ids.iter().map(|id| decode(id).unwrap().unwrap()).collect();
    bundle::encode(&tasks, "garenne-tests").unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn many_tasks_travel_in_few_messages_and_each_has_its_own_end() {
    let warren = Warren::new().await;
    let (producer, amqp) = (warren.producer().await, warren.amqp().await);
    let quick = RetryPolicy { base: Duration::from_millis(20), ..RetryPolicy::retries(2) };
    let mut submissions: Vec<_> = (0..300).map(echo).collect();
    submissions.push(work("garenne.fail", json!({ "fatal": true })));
    submissions.push(work("garenne.fail", json!({ "times": 1 })).retry_policy(quick));
    submissions
        .push(work("garenne.fail", json!({ "panic": true })).retry_policy(RetryPolicy::NONE));
    submissions.push(sleep(60_000).timeout(Duration::from_millis(50)).retries(0));
    submissions.push(work("no.such.task", json!({})));
    submissions.push(echo(1).expires_in(Duration::from_millis(1)));
    let handles = handles(producer.submit_many(submissions).await);
    assert!(amqp.waiting().await <= 4, "{} messages", amqp.waiting().await);
    let (_worker, _collector) = warren.crew().await;
    let mut handles = handles.into_iter();
    for (number, handle) in handles.by_ref().take(300).enumerate() {
        assert_eq!(handle.output().soon("an echo ends").await, Ok(json!(number)));
    }
    let mut rest: Vec<_> = handles.collect();
    let unknown = rest.remove(4);
    let state = async || producer.dead(unknown.id()).await.unwrap();
    let letter = soon("it is parked", async || state().await).await;
    assert_eq!(letter.reason, DeadReason::UnknownTask);
    let ends = ended(rest).await;
    let ends: Vec<_> = ends.iter().map(|end| (end.status, end.reason, end.attempt)).collect();
    let failed = |reason, attempt| (Status::Failed, Some(reason), attempt);
    let expected = [
        failed(DeadReason::Fatal, 1),
        (Status::Succeeded, None, 2),
        failed(DeadReason::Panicked, 1),
        failed(DeadReason::TimedOut, 1),
        failed(DeadReason::Expired, 0),
    ];
    assert_eq!(ends, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_killed_in_the_middle_of_a_bundle_loses_nothing() {
    const TASKS: u64 = 60;
    let warren = Warren::new().await;
    let toml = effects::command(&warren);
    let worker = || warren.worker().toml(&toml);
    let (first, _collector) = tokio::join!(worker().start(), warren.collector().start());
    let producer = warren.producer().await;
    let batch = producer.batch().await.unwrap();
    let submitted = batch.submit_many_detached((0..TASKS).map(|_| effect(50))).await;
    assert!(submitted.iter().all(Result::is_ok));
    let sealed = batch.seal().await.unwrap();
    let some = "SELECT count(*) FROM results";
    soon("some are done", async || (warren.rows::<i64>(some)[0] >= 8).then_some(())).await;
    first.kill().await;
    let second = worker().start().await;
    let summary = sealed.wait().within(PATIENCE, "all end").await.unwrap();
    assert_eq!((summary.total, summary.succeeded), (Some(TASKS), TASKS));
    let done = effects::done(&warren);
    let distinct: HashSet<_> = done.iter().collect();
    assert_eq!(distinct.len() as u64, TASKS, "each ran");
    assert!(done.len() < distinct.len() * 2, "{} executions of {TASKS}", done.len());
    assert!(second.stderr().contains("a bundle came again"), "it was split");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_that_kills_its_process_is_found_in_its_bundle() {
    let warren = Warren::new().await;
    let _collector = warren.collector().start().await;
    let producer = warren.producer().await;
    let batch = producer.batch().await.unwrap();
    let mut tasks: Vec<_> = (0..20).map(echo).collect();
    tasks.insert(10, work("garenne.crash", json!({ "how": "abort" })));
    let submitted = batch.submit_many_detached::<Value, _>(tasks).await;
    assert!(submitted.iter().all(Result::is_ok));
    let sealed = batch.seal().await.unwrap();
    let workers = supervise(1, |_| warren.worker().arg("--faults"));
    let summary = tokio::select! {
        () = workers => unreachable!("the supervisor never ends"),
        summary = sealed.wait().within(PATIENCE, "all end") => summary.unwrap(),
    };
    assert_eq!((summary.succeeded, summary.failed), (20, 1));
    let reasons: Vec<String> = warren.rows("SELECT reason FROM dead_letters");
    assert_eq!(reasons, ["crashed"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_line_in_the_middle_of_a_bundle_repeats_nothing_in_the_same_worker() {
    let warren = Warren::new().await;
    let line = Proxy::to(warren.url()).await;
    let worker = warren.worker().url(&line.url(warren.url())).toml(&effects::command(&warren));
    // Replies are best effort; what the cut takes along, the collector knows.
    let (worker, _collector) = tokio::join!(worker.start(), warren.collector().start());
    let producer = warren.producer().await;
    let handles = handles(producer.submit_many((0..40).map(|_| effect(80))).await);
    soon("it is at work", async || (effects::done(&warren).len() >= 8).then_some(())).await;
    line.cut();
    assert!(ended(handles).await.iter().all(|end| end.status == Status::Succeeded));
    assert_eq!(effects::done(&warren).len(), 40);
    assert!(worker.stderr().contains("a bundle came again"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_that_waits_in_a_bundle_can_be_cancelled() {
    let warren = Warren::new().await;
    let worker = warren.worker().set("worker.slots", 1).set("worker.cancel_sync_timeout", "5s");
    let (_worker, _collector) = tokio::join!(worker.start(), warren.collector().start());
    let producer = warren.producer().await;
    let mut handles = handles(producer.submit_many([sleep(4_000), sleep(1), echo(1)]).await);
    let (echo, mut slow) = (handles.pop().unwrap(), handles.remove(0));
    soon("the first one runs", async || (warren.amqp().await.waiting().await == 0).then_some(()))
        .await;
    let id = handles[0].id().clone();
    producer.cancel_tasks(&[id], Some("enough"), Duration::ZERO).await.unwrap();
    let cancelled = handles.remove(0).result().soon("it ends").await.unwrap();
    assert_eq!((cancelled.status, cancelled.attempt), (Status::Cancelled, 0));
    let still = slow.ended_within(Duration::from_millis(1)).await;
    assert!(still.is_err(), "it did not wait for the slot");
    assert_eq!(echo.output().soon("the echo ends").await, Ok(json!(1)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopping_worker_gives_back_what_it_has_not_begun_of_a_bundle() {
    let warren = Warren::new().await;
    let mut first = warren.worker().set("worker.slots", 2).arg("--name=first").start().await;
    let (producer, amqp) = (warren.producer().await, warren.amqp().await);
    let handles = handles(producer.submit_many((0..50).map(|_| sleep(300))).await);
    soon("it has the bundle", async || (amqp.waiting().await == 0).then_some(())).await;
    first.signal(Signal::SIGTERM);
    assert!(first.ended(PATIENCE).await.success());
    assert!(amqp.waiting().await > 0);
    let second = warren.worker().set("worker.slots", 50).arg("--name=second").start().await;
    let ends = ended(handles).await;
    assert!(ends.iter().all(|end| end.attempt == 1), "{ends:#?}");
    assert!(!ends.iter().any(|end| end.redelivered), "{ends:#?}");
    assert!(ends.iter().filter(|end| &*end.worker == "second").count() >= 40);
    assert!(!second.stderr().contains("a bundle came again"), "nothing is under suspicion");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopping_worker_hands_nothing_back_while_the_broker_still_sends() {
    let warren = Warren::new().await;
    let line = Proxy::to(warren.url()).await;
    let first = warren.worker().url(&line.url(warren.url())).set("worker.slots", 2);
    let toml = effects::command(&warren);
    let mut first = first.toml(&toml).arg("--name=first").start().await;
    let producer = warren.producer().await;
    let slow = (0..2).map(|_| effect(5_000));
    let mut slow = handles(producer.submit_many(slow.chain((0..48).map(echo))).await);
    let mut quick = slow.split_off(2);
    soon("it is at work", async || (effects::done(&warren).len() == 2).then_some(())).await;
    line.hold(Sends::Cancels);
    first.signal(Signal::SIGTERM);
    line.caught().await;
    let second = warren.worker().set("worker.slots", 50).toml(&toml);
    let _second = second.arg("--name=second").start().await;
    // What was handed back before would have run by now: these ended long after it.
    assert!(ended(slow).await.iter().all(|end| &*end.worker == "first"));
    let early = quick[0].ended_within(Duration::from_millis(100)).await;
    assert!(early.is_err(), "{early:?}");
    let last = quick[47].ended_within(Duration::from_millis(100)).await;
    assert!(last.is_err(), "{last:?}");
    line.cut();
    assert!(ended(quick).await.iter().all(|end| &*end.worker == "second"));
    assert!(first.ended(PATIENCE).await.success());
}

/// Two workers with one slot each and one bundle for both: what is slow in it must not make one of
/// them busy while the other has nothing to do.
async fn share(millis: &[u64]) -> (Duration, Vec<usize>) {
    let warren = Warren::new().await;
    let worker = |name: &str| warren.worker().set("worker.slots", 1).arg("--name").arg(name);
    let (_one, _two) = tokio::join!(worker("one").start(), worker("two").start());
    let producer = warren.producer().await;
    let begun = Instant::now();
    let handles = handles(producer.submit_many(millis.iter().map(|millis| sleep(*millis))).await);
    let ends = ended(handles).await;
    let took = begun.elapsed();
    let ran = |name: &str| ends.iter().filter(|end| *end.worker == *name).count();
    (took, vec![ran("one"), ran("two")])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bundle_of_slow_tasks_is_shared_with_an_idle_worker() {
    let (took, ran) = share(&[200; 30]).await;
    assert!(ran.iter().all(|tasks| *tasks >= 8), "{ran:?}");
    assert!(took < Duration::from_millis(200 * 30 * 3 / 4), "{took:?}, alone it takes 6 s");
}

#[tokio::test(flavor = "multi_thread")]
async fn quick_tasks_do_not_wait_behind_a_slow_one_in_their_bundle() {
    let mut millis = vec![1; 40];
    millis.insert(3, 4_000);
    let (took, ran) = share(&millis).await;
    assert!(took < Duration::from_millis(5_500), "{took:?}");
    let most = ran.iter().max().unwrap();
    assert!((30..=40).contains(most), "{ran:?}: the other worker has all but the slow one's");
}

#[tokio::test(flavor = "multi_thread")]
async fn tasks_that_were_seen_to_be_slow_travel_alone() {
    let warren = Warren::new().await;
    let mut worker = warren.worker().set("worker.slots", 8).start().await;
    let (producer, amqp) = (warren.producer().await, warren.amqp().await);
    let first = handles(producer.submit_many((0..8).map(|_| sleep(100))).await);
    ended(first).await;
    worker.signal(Signal::SIGTERM);
    worker.ended(PATIENCE).await;
    let _second = handles(producer.submit_many((0..8).map(|_| sleep(100))).await);
    let each = async || (amqp.waiting().await == 8).then_some(());
    soon("each is a message", each).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bundle_can_wait_in_the_broker() {
    let warren = Warren::new().await;
    let _worker = warren.worker().start().await;
    let producer = warren.producer().await;
    let delay = Duration::from_millis(1_500);
    let before = Timestamp::now();
    let handles = handles(producer.submit_many((0..100).map(|n| echo(n).delay(delay))).await);
    for end in ended(handles).await {
        assert!(end.started_at.since(before) >= delay, "{end:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_yields_now_and_then_waits_for_no_company() {
    let warren = Warren::new().await;
    let _worker = warren.worker().start().await;
    let producer = warren.producer().await;
    let (yielded, tasks) = tokio::sync::mpsc::channel(1);
    let tasks = stream::unfold(tasks, async |mut tasks| Some((tasks.recv().await?, tasks)));
    let mut submitted = std::pin::pin!(producer.submit_all::<Value, _>(tasks));
    for number in 0..3 {
        yielded.send(echo(number)).await.unwrap();
        let handle = submitted.next().soon("it is submitted").await.unwrap().unwrap();
        assert_eq!(handle.output().soon("it ends").await, Ok(json!(number)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_task_of_a_bundle_without_a_queue_ends_as_unrouted() {
    let warren = Warren::new().await;
    let _collector = warren.collector().start().await;
    let (producer, amqp) = (warren.producer().await, warren.amqp().await);
    let tasks = warren.config().broker.topology().tasks_exchange();
    amqp.publish(&tasks, "gone", bundle_of(&["t-1", "t-2"])).await;
    for id in ["t-1", "t-2"] {
        let id = TaskId::new(id).unwrap();
        let letter = soon("it has a letter", async || producer.dead(&id).await.unwrap());
        assert_eq!(letter.await.reason, DeadReason::Unrouted);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bundle_that_cannot_be_read_is_one_dead_letter() {
    let warren = Warren::new().await;
    let _worker = warren.worker().start().await;
    let amqp = warren.amqp().await;
    let whole = bundle_of(&["t-1", "t-2"]);
    let cut = Message { body: whole.body.slice(..whole.body.len() - 1), ..whole.clone() };
    amqp.task(cut).await;
    let mut dead = amqp.dead().await;
    let letter = dead.letter().soon("it is given up").await;
    assert_eq!(letter.reason, DeadReason::Malformed);
    assert!(letter.error.contains("ends too early"), "{}", letter.error);
    // And the worker goes on.
    amqp.task(whole).await;
    let mut results = amqp.results().await;
    let mut ids = [results.result().await.id, results.result().await.id].map(|id| id.to_string());
    ids.sort();
    assert_eq!(ids, ["t-1", "t-2"]);
}
