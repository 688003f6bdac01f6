//! Bundles are only the way of tasks to a worker: each task in one keeps its own fate, a worker that
//! dies in the middle of one loses nothing and counts nothing twice, and none keeps a worker busy while
//! others are idle (promises 2 to 5).

use std::collections::HashSet;
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt, stream};
use garenne_common::wire::{Message, bundle, task};
use garenne_common::{DeadReason, QueueName, RetryPolicy, Status, TaskId, TaskResult, Timestamp};
use garenne_producer::{Handle, Submission, SubmitError};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::harness::effects::{self, Gate};
use crate::harness::{Process, Proxy, Sends, Soon, Warren, message, soon, supervise};

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

/// So many tasks, of which the first eight end at once and the others are held.
fn eight_quick(tasks: u64, gate: &Gate) -> impl Iterator<Item = Submission<Value>> {
    (0..tasks).map(|number| if number < 8 { effect(0) } else { gate.task() })
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
    let gate = Gate::shut(&warren, "rest");
    let submitted = batch.submit_many_detached(eight_quick(TASKS, &gate)).await;
    assert!(submitted.iter().all(Result::is_ok));
    let sealed = batch.seal().await.unwrap();
    let some = "SELECT count(*) FROM results";
    soon("some are done", async || (warren.rows::<i64>(some)[0] == 8).then_some(())).await;
    effects::begun(&warren, 12).await;
    first.kill().await;
    gate.open();
    let second = worker().start().await;
    let summary = sealed.wait().within(PATIENCE, "all end").await.unwrap();
    assert_eq!((summary.total, summary.succeeded), (Some(TASKS), TASKS));
    let done = effects::done(&warren);
    let distinct: HashSet<_> = done.iter().collect();
    assert_eq!(distinct.len() as u64, TASKS, "each ran");
    assert!(done.len() < distinct.len() * 2, "{} executions of {TASKS}", done.len());
    assert!(
        second.stderr().contains("splitting a bundle that was delivered before"),
        "it was split"
    );
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
    let (mut worker, _collector) = tokio::join!(worker.start(), warren.collector().start());
    let producer = warren.producer().await;
    let gate = Gate::shut(&warren, "rest");
    let handles = handles(producer.submit_many(eight_quick(40, &gate)).await);
    effects::begun(&warren, 12).await;
    line.cut();
    worker.logged("splitting a bundle that was delivered before").await;
    gate.open();
    assert!(ended(handles).await.iter().all(|end| end.status == Status::Succeeded));
    assert_eq!(effects::done(&warren).len(), 40);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_that_waits_in_a_bundle_can_be_cancelled() {
    let warren = Warren::new().await;
    let worker =
        warren.worker().set("worker.concurrency", 1).set("worker.cancel_sync_timeout", "60s");
    let worker = worker.toml(&effects::command(&warren));
    let (_worker, _collector) = tokio::join!(worker.start(), warren.collector().start());
    let producer = warren.producer().await;
    let gate = Gate::shut(&warren, "first");
    let mut handles = handles(producer.submit_many([gate.task(), sleep(1), echo(1)]).await);
    let echo = handles.pop().unwrap();
    effects::begun(&warren, 1).await;
    let id = handles[1].id().clone();
    producer.cancel_tasks(&[id], Some("enough"), Duration::ZERO).await.unwrap();
    // It does not wait for the slot.
    let cancelled = handles.remove(1).result().soon("it ends").await.unwrap();
    assert_eq!((cancelled.status, cancelled.attempt), (Status::Cancelled, 0));
    gate.open();
    assert_eq!(echo.output().soon("the echo ends").await, Ok(json!(1)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopping_worker_gives_back_what_it_has_not_begun_of_a_bundle() {
    let warren = Warren::new().await;
    let (toml, gate) = (effects::command(&warren), Gate::shut(&warren, "begun"));
    let first = warren.worker().toml(&toml).set("worker.concurrency", 2).arg("--name=first");
    let mut first = first.start().await;
    let (producer, amqp) = (warren.producer().await, warren.amqp().await);
    let tasks = (0..50).map(|number| if number < 2 { gate.task() } else { echo(number) });
    let handles = handles(producer.submit_many(tasks).await);
    effects::begun(&warren, 2).await;
    soon("it has the bundle", async || (amqp.waiting().await == 0).then_some(())).await;
    first.signal(Signal::SIGTERM);
    soon("the rest is back", async || (amqp.waiting().await > 0).then_some(())).await;
    gate.open();
    assert!(first.ended(PATIENCE).await.success());
    let second = warren.worker().set("worker.concurrency", 50).arg("--name=second").start().await;
    let ends = ended(handles).await;
    assert!(ends.iter().all(|end| end.attempt == 1), "{ends:#?}");
    assert!(!ends.iter().any(|end| end.redelivered), "{ends:#?}");
    assert_eq!(ends.iter().filter(|end| &*end.worker == "second").count(), 48);
    assert!(
        !second.stderr().contains("splitting a bundle that was delivered before"),
        "nothing is under suspicion"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopping_worker_hands_nothing_back_while_the_broker_still_sends() {
    let warren = Warren::new().await;
    let line = Proxy::to(warren.url()).await;
    let first = warren.worker().url(&line.url(warren.url())).set("worker.concurrency", 2);
    let toml = effects::command(&warren);
    let mut first = first.toml(&toml).arg("--name=first").start().await;
    let producer = warren.producer().await;
    let gate = Gate::shut(&warren, "slow");
    let slow = (0..2).map(|_| gate.task());
    let mut slow = handles(producer.submit_many(slow.chain((0..48).map(echo))).await);
    let mut quick = slow.split_off(2);
    effects::begun(&warren, 2).await;
    line.hold(Sends::Cancels);
    first.signal(Signal::SIGTERM);
    line.caught().await;
    let second = warren.worker().set("worker.concurrency", 50).toml(&toml);
    let _second = second.arg("--name=second").start().await;
    // What was handed back before would run there as this does, which the first one may be sent too.
    soon("the second one takes what comes", async || {
        let mut probe = producer.submit(echo(0)).await.unwrap();
        probe.ended_within(Duration::from_secs(1)).await.is_ok().then_some(())
    })
    .await;
    let early = quick[0].ended_within(Duration::from_millis(100)).await;
    assert!(early.is_err(), "{early:?}");
    let last = quick[47].ended_within(Duration::from_millis(100)).await;
    assert!(last.is_err(), "{last:?}");
    gate.open();
    assert!(ended(slow).await.iter().all(|end| &*end.worker == "first"));
    line.cut();
    assert!(ended(quick).await.iter().all(|end| &*end.worker == "second"));
    assert!(first.ended(PATIENCE).await.success());
}

/// Two workers with one slot each, for one bundle: what is slow in it must not make one of them busy
/// while the other has nothing to do. They fetch nothing ahead: what one hands on must not come back to
/// wait behind its slow task.
async fn two_workers(warren: &Warren) -> (Process, Process) {
    let toml = effects::command(warren);
    let worker =
        || warren.worker().toml(&toml).set("worker.concurrency", 1).set("worker.prefetch", 1);
    tokio::join!(worker().arg("--name=one").start(), worker().arg("--name=two").start())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bundle_of_slow_tasks_is_shared_with_an_idle_worker() {
    let warren = Warren::new().await;
    let _workers = two_workers(&warren).await;
    let (producer, gate) = (warren.producer().await, Gate::shut(&warren, "slow"));
    let handles = handles(producer.submit_many((0..30).map(|_| gate.task())).await);
    // The one that got the bundle runs one task, and the other one has got some of the rest.
    effects::begun(&warren, 2).await;
    gate.open();
    let ends = ended(handles).await;
    let ran: HashSet<&str> = ends.iter().map(|end| &*end.worker).collect();
    assert_eq!(ran.len(), 2, "{ran:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn quick_tasks_do_not_wait_behind_a_slow_one_in_their_bundle() {
    let warren = Warren::new().await;
    let _workers = two_workers(&warren).await;
    let (producer, gate) = (warren.producer().await, Gate::shut(&warren, "slow"));
    let tasks = (0..41).map(|number| if number == 3 { gate.task() } else { echo(number) });
    let mut quick = handles(producer.submit_many(tasks).await);
    let slow = quick.remove(3);
    // All of them, while the slow one keeps one of the workers.
    assert_eq!(ended(quick).await.len(), 40);
    gate.open();
    slow.result().soon("the slow one ends").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn tasks_that_were_seen_to_be_slow_travel_alone() {
    let warren = Warren::new().await;
    let mut worker = warren.worker().set("worker.concurrency", 8).start().await;
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
