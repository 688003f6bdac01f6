//! Stopping loses nothing (promise 8): running work ends, other work goes back, and neither costs an
//! attempt.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use garenne_common::{QueueName, Status};
use garenne_producer::Submission;
use nix::sys::signal::Signal;
use serde_json::json;

use crate::harness::effects::{self, Gate, HELD};
use crate::harness::{Process, SOON, Soon, Warren, message, soon, time_passes};

fn sleep(millis: u64) -> Submission<serde_json::Value> {
    Submission::dynamic("garenne.sleep", json!({ "millis": millis })).unwrap()
}

/// Waits until so many tasks are in the queue.
async fn waiting(warren: &Warren, count: u32) {
    let amqp = warren.amqp().await;
    let what = format!("{count} tasks wait in the queue");
    soon(&what, async || (amqp.waiting().await == count).then_some(())).await;
}

/// Waits until the queue is empty because everything in it was delivered.
async fn delivered(warren: &Warren) {
    waiting(warren, 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_finishes_what_runs_and_hands_back_the_rest() {
    let warren = Warren::new().await;
    let (toml, gate) = (effects::command(&warren), Gate::shut(&warren, "all"));
    let worker = |concurrency: usize, name: &str| {
        warren.worker().toml(&toml).set("worker.concurrency", concurrency).arg("--name").arg(name)
    };
    let mut first = worker(2, "first").set("worker.prefetch", 10).start().await;
    let producer = warren.producer().await;
    let mut handles = vec![];
    for _ in 0..6 {
        handles.push(producer.submit(gate.task()).await.unwrap());
    }
    effects::begun(&warren, 2).await;
    delivered(&warren).await;
    first.signal(Signal::SIGTERM);
    waiting(&warren, 4).await;
    let _second = worker(8, "second").start().await;
    effects::begun(&warren, 6).await;
    gate.open();
    let mut workers = vec![];
    for handle in handles {
        let result = handle.result().soon("it ends").await.unwrap();
        assert_eq!(result.attempt, 1, "{result:?}");
        if &*result.worker == "first" {
            assert!(!result.redelivered, "it was finished, not run again: {result:?}");
        }
        workers.push(result.worker.to_string());
    }
    workers.sort_unstable();
    assert_eq!(workers, ["first", "first", "second", "second", "second", "second"]);
    assert_eq!(first.ended(SOON).await.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_handed_back_goes_at_once_and_does_not_wait_for_what_runs() {
    let warren = Warren::new().await;
    let gate = Gate::shut(&warren, "long");
    let worker = warren.worker().toml(&effects::command(&warren)).set("worker.concurrency", 1);
    let mut worker = worker.set("worker.prefetch", 9).start().await;
    let amqp = warren.amqp().await;
    let producer = warren.producer().await;
    let long = producer.submit(gate.task()).await.unwrap();
    effects::begun(&warren, 1).await;
    for n in 0..3 {
        amqp.task(message("garenne.echo", &format!("t-{n}"), &json!(n))).await;
    }
    delivered(&warren).await;
    worker.signal(Signal::SIGTERM);
    // While the long one runs.
    waiting(&warren, 3).await;
    gate.open();
    let result = long.result().soon("the long one ends").await.unwrap();
    assert_eq!(result.status, Status::Succeeded, "{result:?}");
    assert!(worker.ended(SOON).await.success());
}

/// A worker whose one task would run for minutes, told to stop; then its task, back in the queue.
async fn interrupt(grace: &str, stop: impl AsyncFnOnce(&mut Process)) {
    let warren = Warren::new().await;
    let mut worker = warren.worker().arg("--grace").arg(grace).start().await;
    let amqp = warren.amqp().await;
    amqp.task(message("garenne.sleep", "t-1", &json!({ "millis": 600_000 }))).await;
    delivered(&warren).await;
    stop(&mut worker).await;
    assert_eq!(worker.ended(SOON).await.code(), Some(0));
    let topology = warren.config().broker.topology();
    let mut queue = amqp.tap(&topology.task_queue(&QueueName::default())).await;
    let task = queue.next().await;
    assert_eq!(task.properties.message_id.as_deref(), Some("t-1"));
    assert_eq!(task.header("x-garenne-attempt"), None, "an interruption costs no attempt");
    assert_eq!(amqp.admin.depth(&topology.dead()).await.unwrap(), Some(0));
    assert_eq!(amqp.admin.depth(&topology.results()).await.unwrap(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_outlasts_the_grace_period_goes_back_unharmed() {
    interrupt("300ms", async |worker| worker.signal(Signal::SIGTERM)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_does_not_wait() {
    interrupt("10m", async |worker| {
        worker.signal(Signal::SIGTERM);
        worker.logged(r#""message":"draining""#).await;
        worker.signal(Signal::SIGINT);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_processes_stop_at_once() {
    let warren = Warren::new().await;
    let (mut worker, mut collector) = warren.crew().await;
    for process in [&mut worker, &mut collector] {
        assert_eq!(process.terminate(SOON).await.code(), Some(0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopping_worker_sends_the_last_results_before_it_goes() {
    let warren = Warren::new().await;
    let mut worker = warren.worker().set("worker.concurrency", 50).start().await;
    let amqp = warren.amqp().await;
    for n in 0..50 {
        amqp.task(message("garenne.sleep", &format!("t-{n}"), &json!({ "millis": 700 }))).await;
    }
    delivered(&warren).await;
    assert!(worker.terminate(SOON).await.success());
    let mut results = amqp.results().await;
    let mut ended = 0;
    while ended < 50 {
        ended += results.reports().soon("the results were sent").await.len();
    }
    assert_eq!(amqp.waiting().await, 0, "and their tasks are acknowledged");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopping_worker_says_what_it_waits_for() {
    let warren = Warren::new().await;
    let gate = Gate::shut(&warren, "long");
    let mut worker = warren.worker().toml(&effects::command(&warren)).start().await;
    let amqp = warren.amqp().await;
    amqp.task(message(HELD, "t-long", &gate.args())).await;
    effects::begun(&warren, 1).await;
    worker.signal(Signal::SIGTERM);
    let line = worker.logged("still waiting for running tasks").await;
    let named = line.contains(&format!("{HELD} t-long ("));
    assert!(named && line.contains("\"tasks\":1"), "{line}");
    gate.open();
    assert!(worker.ended(SOON).await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rolling_restart_under_load_changes_no_outcome() {
    let warren = Warren::new().await;
    let _collector = warren.collector().start().await;
    let worker = |n: u32| warren.worker().arg(format!("--name=w{n}")).set("worker.concurrency", 4);
    let mut workers = vec![];
    for n in 0..3 {
        workers.push(worker(n).start().await);
    }
    let producer = warren.producer().await;
    let batch = producer.batch().await.unwrap();
    let restarted = AtomicBool::new(false);
    let stream = async {
        let mut handles = vec![];
        while !restarted.load(Ordering::Relaxed) {
            handles.push(batch.submit(sleep(20 + handles.len() as u64 % 80)).await.unwrap());
        }
        handles
    };
    let mut newer = vec![];
    let restarts = async {
        for (n, mut old) in (3..).zip(workers) {
            assert!(old.terminate(SOON).await.success());
            // It takes tasks before the next one goes.
            newer.push(worker(n).start().await);
        }
        restarted.store(true, Ordering::Relaxed);
    };
    let (handles, ()) = tokio::join!(stream, restarts);
    let count = handles.len() as u64;
    for handle in handles {
        let result = handle.result().soon("every task ends").await.unwrap();
        assert_eq!((result.status, result.attempt), (Status::Succeeded, 1), "{result:?}");
    }
    let summary = batch.seal().await.unwrap().wait().soon("the batch ends").await.unwrap();
    assert_eq!((summary.succeeded, summary.failed, summary.total), (count, 0, Some(count)));
}

/// Starts and stops so many workers, four at once and each at a random moment of its life, under tasks
/// of which some outlast the grace period; returns how long each took to exit and what it logged, the
/// slowest last.
pub(crate) async fn terminate_often(count: usize) -> Vec<(Duration, String)> {
    let warren = Warren::new().await;
    let _collector = warren.collector().start().await;
    let producer = warren.producer().await;
    let (left, over) = (AtomicUsize::new(count), AtomicBool::new(false));
    let lane = |seed: u64| {
        let (warren, left, over) = (&warren, &left, &over);
        async move {
            let mut moment = seed;
            let mut took = vec![];
            while left
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1))
                .is_ok()
            {
                // A small generator: the moments must differ, and nothing else is asked of them.
                moment = moment.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let mut worker = warren.worker().arg("--grace=1s").spawn();
                time_passes(Duration::from_millis(moment >> 33 & 1_023)).await;
                let begun = Instant::now();
                worker.signal(Signal::SIGTERM);
                let status = worker.ended(SOON).await;
                took.push((begun.elapsed(), worker.stderr()));
                // Before it listens to signals it dies of them, and has taken nothing yet.
                let listened = worker.stderr().contains("starting");
                assert!(status.success() || !listened, "{status:?}");
            }
            over.store(true, Ordering::Relaxed);
            took
        }
    };
    let stream = async {
        let mut handles = vec![];
        while !over.load(Ordering::Relaxed) {
            let millis = if handles.len() % 50 == 0 { 3_000 } else { handles.len() as u64 % 300 };
            handles.push(producer.submit(sleep(millis)).await.unwrap());
            time_passes(Duration::from_millis(15)).await;
        }
        handles
    };
    let (handles, one, two, three, four) = tokio::join!(stream, lane(1), lane(2), lane(3), lane(4));
    let _last = warren.worker().set("worker.concurrency", 100).start().await;
    for handle in handles {
        let patience = Duration::from_mins(1);
        let result = handle.result().within(patience, "no task is lost").await.unwrap();
        assert_eq!((result.status, result.attempt), (Status::Succeeded, 1), "{result:?}");
    }
    let mut took = [one, two, three, four].concat();
    took.sort_unstable();
    took
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_at_any_moment_ends_a_worker_and_loses_nothing() {
    terminate_often(20).await;
}
