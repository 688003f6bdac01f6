//! A collector that cannot do its work acknowledges nothing and says so: in its log, in its heartbeat,
//! and by `garenne doctor`.

use std::fs;
use std::time::Duration;

use garenne_common::wire::{CollectorHeartbeat, Report};
use garenne_common::{BatchId, Timestamp};
use rusqlite::Connection;

use crate::harness::{Amqp, Process, Soon, Tap, Warren, eventually, soon};

const LONG: Duration = Duration::from_mins(1);

fn sealed(batch: &str) -> [Report; 1] {
    let (batch, at) = (BatchId::new(batch).unwrap(), Timestamp::now());
    [Report::BatchSealed { batch, count: 0, at }]
}

/// The next heartbeat of a collector that is as wanted.
async fn until(
    heartbeats: &mut Tap,
    what: &str,
    wanted: impl Fn(&CollectorHeartbeat) -> bool,
) -> CollectorHeartbeat {
    eventually(LONG, what, async || {
        let message = heartbeats.next().await;
        let heartbeat = CollectorHeartbeat::decode(&message).ok()?;
        wanted(&heartbeat).then_some(heartbeat)
    })
    .await
}

fn has(heartbeat: &CollectorHeartbeat, code: &str) -> bool {
    heartbeat.problems.iter().any(|problem| problem.code == code)
}

async fn waiting(warren: &Warren, amqp: &Amqp) -> u32 {
    amqp.admin.depth(&warren.config().broker.topology().results()).await.unwrap().unwrap()
}

/// A doctor who finds everything else well must find this.
async fn doctor_names(warren: &Warren, problem: &str) {
    let _worker = warren.worker().start().await;
    let ended = warren.garenne(&["doctor", "--output", "json"]).await;
    assert_eq!(ended.code, Some(1), "{ended:#?}");
    let report = ended.json();
    let checks = report["checks"].as_array().unwrap();
    let bad: Vec<_> = checks.iter().filter(|check| check["state"] == "bad").collect();
    let named = |check: &serde_json::Value| check["detail"].as_str().unwrap().contains(problem);
    assert!(!bad.is_empty() && bad.iter().any(|check| named(check)), "{report:#}");
    assert!(bad.iter().all(|check| check["check"] == "collector"), "{report:#}");
}

/// What was delivered to it and not acknowledged is back in the queue.
async fn killed_with_unacknowledged(warren: &Warren, amqp: &Amqp, collector: Process) {
    collector.kill().await;
    soon("the report is back in the queue", async || {
        (waiting(warren, amqp).await == 1).then_some(())
    })
    .await;
}

/// Without the check after the commit the report is acknowledged, and gone with the file.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_acknowledged_into_a_store_that_was_deleted() {
    let warren = Warren::new().await;
    let mut collector = warren.collector().start().await;
    let amqp = warren.amqp().await;
    let mut heartbeats = amqp.heartbeats().await;
    for suffix in ["", "-wal", "-shm"] {
        fs::remove_file(warren.path(&format!("store.sqlite3{suffix}"))).unwrap();
    }
    amqp.reports(&sealed("b-1")).await;
    collector.logged("was deleted, moved or replaced").await;
    until(&mut heartbeats, "it says so", |beat| has(beat, "store_failing")).await;
    killed_with_unacknowledged(&warren, &amqp, collector).await;
    let producer = warren.producer().await;
    let _second = warren.collector().start().await;
    let batch = BatchId::new("b-1").unwrap();
    let summary = producer.wait_batch(&batch).soon("the report came again").await.unwrap();
    assert_eq!(summary.total, Some(0));
}

/// The latest commits lie in the log: without it they are gone as well.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_without_its_log_is_noticed_while_nothing_comes_and_so_is_its_return() {
    let warren = Warren::new().await;
    let _collector = warren.collector().start().await;
    let amqp = warren.amqp().await;
    let mut heartbeats = amqp.heartbeats().await;
    let (log, away) = (warren.path("store.sqlite3-wal"), warren.path("away"));
    fs::rename(&log, &away).unwrap();
    until(&mut heartbeats, "it says so", |beat| has(beat, "store_unreadable")).await;
    amqp.reports(&sealed("b-1")).await;
    until(&mut heartbeats, "it stores nothing", |beat| has(beat, "store_failing")).await;
    fs::rename(&away, &log).unwrap();
    until(&mut heartbeats, "it is well again", |beat| beat.problems.is_empty()).await;
    let batch = BatchId::new("b-1").unwrap();
    let producer = warren.producer().await;
    assert!(producer.batch_status(&batch).await.unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_locked_store_is_told_although_no_result_waits_in_the_queue() {
    let warren = Warren::new().await;
    let _collector = warren.collector().start().await;
    let amqp = warren.amqp().await;
    let mut heartbeats = amqp.heartbeats().await;
    let store = Connection::open(warren.path("store.sqlite3")).unwrap();
    store.execute_batch("BEGIN IMMEDIATE").unwrap();
    amqp.reports(&sealed("b-1")).await;
    let beat = until(&mut heartbeats, "it says that nothing is committed", |beat| {
        has(beat, "commit_stalled") && has(beat, "store_failing")
    })
    .await;
    assert_eq!(beat.uncommitted, 1);
    assert_eq!(waiting(&warren, &amqp).await, 0);
    doctor_names(&warren, "store_failing").await;
    store.execute_batch("ROLLBACK").unwrap();
    let well = until(&mut heartbeats, "it is well again", |beat| beat.problems.is_empty()).await;
    assert_eq!(well.uncommitted, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_stores_only_the_older_is_filled_until_it_is_gone() {
    let warren = Warren::new().await;
    let amqp = warren.amqp().await;
    let mut heartbeats = amqp.heartbeats().await;
    let older = warren.collector().arg("--name=older").start().await;
    let younger = warren.collector().arg("--name=younger");
    let younger = younger.set("collector.store", warren.path("other.sqlite3").display());
    let mut younger = younger.start().await;
    younger.logged("another, older store").await;
    let beat = until(&mut heartbeats, "the younger stands back", |beat| !beat.consuming).await;
    assert_eq!(beat.collector, "younger");
    assert!(has(&beat, "other_store"), "{beat:?}");
    let results = warren.config().broker.topology().results();
    soon("one consumer is left", async || {
        let status = amqp.admin.queue_status(&results).await.unwrap().unwrap();
        (status.consumers == 1).then_some(())
    })
    .await;
    for n in 0..50 {
        amqp.reports(&sealed(&format!("b-{n}"))).await;
    }
    let count = "SELECT COUNT(*) FROM batches";
    soon("the older has all", async || (warren.rows::<i64>(count) == [50]).then_some(())).await;
    doctor_names(&warren, "other_store").await;
    older.kill().await;
    amqp.reports(&sealed("b-x")).await;
    let beat = until(&mut heartbeats, "the younger begins", |beat| {
        beat.collector == "younger" && beat.consuming
    })
    .await;
    assert!(!has(&beat, "other_store"), "{beat:?}");
    let producer = warren.producer().await;
    let batch = BatchId::new("b-x").unwrap();
    producer.wait_batch(&batch).soon("the younger takes what comes now").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn results_that_nobody_collects_are_a_problem() {
    let warren = Warren::new().await;
    warren.collector().start().await.kill().await;
    warren.amqp().await.reports(&sealed("b-1")).await;
    let ended = warren.garenne(&["--deadline", "1s", "doctor", "--output", "json"]).await;
    assert_eq!(ended.code, Some(1), "{ended:#?}");
    let report = ended.json();
    let mut checks = report["checks"].as_array().unwrap().iter();
    let results = checks.find(|check| check["check"] == "results").unwrap();
    assert_eq!(results["state"], "bad", "{report:#}");
}

/// A frozen process consumes as far as the broker can tell, and only its heartbeats are missing.
#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_without_a_heartbeat_is_named() {
    let warren = Warren::new().await;
    let (worker, _collector) = warren.crew().await;
    worker.signal(nix::sys::signal::Signal::SIGSTOP);
    let ended = warren.garenne(&["doctor", "--output", "json"]).await;
    assert_eq!(ended.code, Some(1), "{ended:#?}");
    assert!(ended.stdout.contains("sent no heartbeat"), "{ended:#?}");
}
