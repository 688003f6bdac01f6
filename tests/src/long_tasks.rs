//! Tasks that may run longer than the broker waits for an acknowledgement run under a lease: the
//! collector keeps them, and gives them to another worker when theirs falls silent (promises 2 to 4).
//!
//! The broker's patience is a few seconds here, by the workers' own setting.

use std::fs;
use std::time::Duration;

use garenne_common::Status;
use garenne_common::wire::HeaderValue;
use garenne_producer::Submission;
use nix::sys::signal::Signal;
use serde_json::json;

use crate::harness::{Process, SOON, Soon, Warren, eventually, message, soon, time_passes};

const LONG: Duration = Duration::from_mins(2);

/// A worker that needs a lease for every task, with a short term. Its command writes the fence of each
/// execution into a file, runs until the test [lets it go](let_go), and has its fence for output.
async fn worker(warren: &Warren, name: &str) -> Process {
    let file = warren.path("fences").display().to_string();
    // The file goes with its test, which must leave no process behind.
    let held = format!("[ -e {file} ] && [ ! -e {file}.all ] && [ ! -e {file}.$GARENNE_FENCE ]");
    let run = format!("while {held}; do sleep 0.1; done; echo $GARENNE_FENCE");
    let script = format!("echo $GARENNE_FENCE >> {file}; {run}");
    let toml = format!("[worker.commands.\"test.fence\"]\nargv = [\"sh\", \"-c\", \"{script}\"]\n");
    let worker = warren.worker().toml(&toml).set("worker.name", name).set("worker.concurrency", 2);
    let worker = worker.set("broker.consumer_timeout", "2s").set("worker.task_timeout", "5m");
    // The broker keeps no task for a frozen worker for longer than two of these.
    let worker = worker.set("broker.heartbeat", "2s").set("worker.grace", "1s");
    worker.set("worker.lease_term", "5s").set("log.filter", "garenne_worker=debug").start().await
}

fn task() -> Submission<serde_json::Value> {
    Submission::dynamic("test.fence", json!({})).unwrap()
}

/// Lets the first, second, ... execution end.
fn let_go(warren: &Warren, number: usize) {
    let fence = &fences(warren)[number - 1];
    warren.file(&format!("fences.{fence}"), "");
}

/// Waits until so many executions have begun.
async fn begun(warren: &Warren, count: usize) {
    let what = format!("{count} executions have begun");
    eventually(LONG, &what, async || (fences(warren).len() >= count).then_some(())).await;
}

fn fences(warren: &Warren) -> Vec<String> {
    let text = fs::read_to_string(warren.path("fences")).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

fn leases(warren: &Warren, state: &str) -> usize {
    warren.rows::<String>(&format!("SELECT id FROM leases WHERE state = '{state}'")).len()
}

/// Waits until the collector keeps one task that has begun to run.
async fn leased(warren: &Warren) {
    soon("the lease is kept", async || (leases(warren, "held") == 1).then_some(())).await;
    begun(warren, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_worker_s_task_runs_elsewhere_under_a_higher_fence() {
    let warren = Warren::new().await;
    let (first, _collector) = tokio::join!(worker(&warren, "first"), warren.collector().start());
    let producer = warren.producer().await;
    let handle = producer.submit(task()).await.unwrap();
    leased(&warren).await;
    first.kill().await;
    let _second = worker(&warren, "second").await;
    begun(&warren, 2).await;
    let_go(&warren, 2);
    let result = handle.result().within(LONG, "it runs again").await.unwrap();
    assert_eq!((result.attempt, &*result.worker), (1, "second"));
    assert_eq!(fences(&warren), ["1", "2"]);
    soon("the lease is over", async || (leases(&warren, "held") == 0).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewed_lease_outlives_its_term_and_a_restart_of_the_collector() {
    let warren = Warren::new().await;
    let (_worker, collector) = tokio::join!(worker(&warren, "w"), warren.collector().start());
    let producer = warren.producer().await;
    let handle = producer.submit(task()).await.unwrap();
    leased(&warren).await;
    // Longer than the term: its renewals wait in the queue meanwhile.
    collector.kill().await;
    time_passes(Duration::from_secs(6)).await;
    let _collector = warren.collector().start().await;
    time_passes(Duration::from_secs(6)).await;
    let_go(&warren, 1);
    handle.result().within(LONG, "it ends").await.unwrap();
    assert_eq!(fences(&warren), ["1"], "nobody else was given the task");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_wakes_up_after_its_lease_has_no_say_any_more() {
    let warren = Warren::new().await;
    let (mut first, _collector) =
        tokio::join!(worker(&warren, "first"), warren.collector().start());
    let producer = warren.producer().await;
    let id = producer.submit_detached(task()).await.unwrap();
    leased(&warren).await;
    first.freeze();
    let _second = worker(&warren, "second").await;
    begun(&warren, 2).await;
    // The command of the first ends while its worker sleeps, so its result is the earlier one.
    let_go(&warren, 1);
    first.signal(Signal::SIGCONT);
    first.logged(r#""message":"succeeded""#).await;
    // What it reports later is stored by now, and so that was read.
    let others = format!("SELECT id FROM results WHERE worker = 'first' AND id <> '{id}'");
    eventually(LONG, "the first one is heard again", async || {
        let echo = Submission::<serde_json::Value>::dynamic("garenne.echo", 1).unwrap();
        producer.submit_detached(echo).await.unwrap();
        (!warren.rows::<String>(&others).is_empty()).then_some(())
    })
    .await;
    // On a busy machine the second lease may lapse too, and a third execution have the say.
    warren.file("fences.all", "");
    let ids = std::slice::from_ref(&id);
    let ended = async || producer.results(ids).await.unwrap().pop();
    let output = eventually(LONG, "it ends", ended).await.output.unwrap().to_json_value();
    assert_ne!(output.to_string(), fences(&warren)[0], "the outcome is that of a higher fence");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_draining_worker_hands_a_leased_task_back_at_no_cost() {
    let warren = Warren::new().await;
    let (mut first, _collector) =
        tokio::join!(worker(&warren, "first"), warren.collector().start());
    let producer = warren.producer().await;
    let handle = producer.submit(task()).await.unwrap();
    leased(&warren).await;
    let second = worker(&warren, "second");
    let (status, _second) = tokio::join!(first.terminate(SOON), second);
    assert!(status.success());
    begun(&warren, 2).await;
    let_go(&warren, 2);
    let result = handle.result().within(LONG, "it runs again").await.unwrap();
    assert_eq!((result.attempt, result.redelivered), (1, false));
    assert_eq!(fences(&warren), ["1", "2"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_whose_every_worker_falls_silent_is_given_up() {
    let warren = Warren::new().await;
    let (first, _collector) = tokio::join!(worker(&warren, "first"), warren.collector().start());
    let mut task = message("test.fence", "poison", &json!({}));
    // One less than its crash budget and the tolerance allow.
    task.set_header("x-garenne-lapses", HeaderValue::Int(12));
    warren.amqp().await.task(task).await;
    leased(&warren).await;
    first.kill().await;
    let _second = worker(&warren, "second").await;
    let ended = "SELECT reason || ' by ' || worker FROM results";
    let ended = async || warren.rows::<String>(ended).pop();
    assert_eq!(eventually(LONG, "it is given up", ended).await, "crashed by second");
    let error: String = warren.rows("SELECT error FROM dead_letters").remove(0);
    assert!(error.contains("delivered 14 times and never settled"), "{error}");
    assert_eq!(fences(&warren), ["1"], "it did not run again");
}

#[tokio::test(flavor = "multi_thread")]
async fn retries_and_dead_letters_end_their_lease() {
    let warren = Warren::new().await;
    let (_worker, _collector) = tokio::join!(worker(&warren, "w"), warren.collector().start());
    let producer = warren.producer().await;
    let again = Submission::dynamic("garenne.fail", json!({ "times": 1 })).unwrap();
    let fatal = Submission::dynamic("garenne.fail", json!({ "fatal": true })).unwrap();
    let again = producer.submit(again).await.unwrap().result();
    let again = again.within(LONG, "the second attempt succeeds").await.unwrap();
    assert_eq!((again.attempt, again.status), (2, Status::Succeeded));
    let fatal = producer.submit(fatal).await.unwrap().result();
    let fatal = fatal.within(LONG, "it is given up").await.unwrap();
    assert_eq!(fatal.status, Status::Failed);
    let stored = async || (warren.rows::<i64>("SELECT COUNT(*) FROM results") == [2]).then_some(());
    soon("both are stored", stored).await;
    assert_eq!(warren.rows::<i64>("SELECT COUNT(*) FROM leases"), [0]);
}
