//! Executions can repeat, outcomes cannot (promise 4), and what the collector has acknowledged survives
//! whatever happens to its process.

use std::collections::HashSet;
use std::time::Duration;

use futures_util::{TryStreamExt, stream};
use garenne_common::wire::{Message, Notice, Properties, Report, TaskState, report};
use garenne_common::{BatchId, Status, TaskId, Timestamp};
use garenne_producer::{Producer, Submission};
use rusqlite::Connection;
use serde_json::json;

use crate::harness::{Proxy, SOON, Sends, Soon, Warren, message, soon};

async fn stored(producer: &Producer, count: u64) {
    let what = format!("{count} results are stored");
    soon(&what, async || (producer.totals().await.ok()?.results >= count).then_some(())).await;
}

/// A task that ran while nobody collected, and the bundle that says so.
async fn uncollected(warren: &Warren) -> Vec<Report> {
    let amqp = warren.amqp().await;
    let _worker = warren.worker().start().await;
    amqp.task(message("garenne.echo", "t-1", &json!("first"))).await;
    amqp.results().await.reports().await
}

#[tokio::test(flavor = "multi_thread")]
async fn results_survive_a_stop_and_a_kill() {
    let warren = Warren::new().await;
    let (_worker, mut collector) = warren.crew().await;
    let producer = warren.producer().await;
    let submission = Submission::dynamic("garenne.echo", "kept").unwrap();
    let id = producer.submit_detached(submission).await.unwrap();
    stored(&producer, 1).await;
    assert!(collector.terminate(SOON).await.success());
    let second = warren.collector().start().await;
    assert!(matches!(producer.task_state(&id).await.unwrap(), TaskState::Finished { .. }));
    second.kill().await;
    let _third = warren.collector().start().await;
    assert!(matches!(producer.task_state(&id).await.unwrap(), TaskState::Finished { .. }));
    assert_eq!(producer.totals().await.unwrap().results, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_result_is_acknowledged_only_after_it_is_stored() {
    let warren = Warren::new().await;
    let collector = warren.collector().start().await;
    let (amqp, producer) = tokio::join!(warren.amqp(), warren.producer());
    let store = Connection::open(warren.path("store.sqlite3")).unwrap();
    // Nobody else can commit until this ends.
    store.execute_batch("BEGIN IMMEDIATE").unwrap();
    let (batch, at) = (BatchId::new("b-1").unwrap(), Timestamp::now());
    amqp.reports(&[Report::BatchSealed { batch: batch.clone(), count: 0, at }]).await;
    let results = warren.config().broker.topology().results();
    soon("the collector has taken the report", async || {
        (amqp.admin.depth(&results).await.unwrap() == Some(0)).then_some(())
    })
    .await;
    // An answer shows that it had the time to acknowledge, had it wanted to.
    assert_eq!(producer.batch_status(&batch).await.unwrap(), None);
    collector.kill().await;
    store.execute_batch("ROLLBACK").unwrap();
    let _second = warren.collector().start().await;
    let summary = producer.wait_batch(&batch).soon("the report came again").await.unwrap();
    assert_eq!(summary.total, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_acknowledges_nothing_and_loses_nothing() {
    const TASKS: u64 = 2_000;
    let warren = Warren::new().await;
    let collector = warren.collector().files_up_to(1_024).start();
    let (_worker, mut collector) = tokio::join!(warren.worker().start(), collector);
    let producer = warren.producer().await;
    let bulky = || Submission::dynamic("garenne.echo", "x".repeat(2_000)).unwrap();
    let tasks = stream::iter((0..TASKS).map(|_| bulky()));
    let ids: Vec<_> = producer.submit_all_detached(tasks).try_collect().await.unwrap();
    // It says so, goes on trying, and can still be stopped.
    collector.logged("not stored").await;
    assert!(collector.terminate(SOON).await.success());
    let mut next = warren.collector().files_up_to(1_024).start().await;
    next.logged("not stored").await;
    next.room();
    next.logged("storing again").await;
    stored(&producer, TASKS).await;
    assert_eq!(producer.totals().await.unwrap().results, ids.len() as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_notice_is_forgotten_only_after_it_is_published() {
    let warren = Warren::new().await;
    let line = Proxy::to(warren.url()).await;
    let collector = warren.collector().url(&line.url(warren.url())).start().await;
    let (amqp, producer) = tokio::join!(warren.amqp(), warren.producer());
    let mut notices = amqp.notices().await;
    // An answer: from here on the collector has nothing to publish but the notice.
    producer.totals().await.unwrap();
    line.hold(Sends::To("notices"));
    let (batch, at) = (BatchId::new("b-1").unwrap(), Timestamp::now());
    amqp.reports(&[Report::BatchSealed { batch: batch.clone(), count: 0, at }]).await;
    line.caught().await;
    collector.kill().await;
    let _second = warren.collector().start().await;
    let notice = Notice::decode(&notices.next().await).unwrap();
    assert!(matches!(notice, Notice::Batch(summary) if summary.batch == batch));
}

/// What a kill at some moment would leave is what a reader sees at that moment.
#[tokio::test(flavor = "multi_thread")]
async fn at_no_moment_is_a_result_stored_without_its_notice() {
    const TASKS: i64 = 500;
    let warren = Warren::new().await;
    let (_worker, _collector) = warren.crew().await;
    let producer = warren.producer().await;
    let tasks = (0..TASKS).map(|n| Submission::dynamic("garenne.echo", n).unwrap());
    let _ids: Vec<_> =
        producer.submit_all_detached(stream::iter(tasks)).try_collect().await.unwrap();
    let look = "SELECT (SELECT COUNT(*) FROM results) || ' ' || \
                (SELECT COALESCE(MAX(seq), 0) FROM sqlite_sequence WHERE name = 'outbox')";
    soon("all are stored", async || {
        // The outbox counts all that was ever in it.
        let seen: Vec<String> = warren.rows(look);
        let (results, notices) = seen[0].split_once(' ').unwrap();
        assert_eq!(results, notices, "results and notices");
        (results == TASKS.to_string()).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_result_of_a_task_counts_and_repeats_are_dropped() {
    let warren = Warren::new().await;
    let reports = uncollected(&warren).await;
    let _collector = warren.collector().start().await;
    let (amqp, producer) = tokio::join!(warren.amqp(), warren.producer());
    let batch = BatchId::new("b-1").unwrap();
    let Report::Finished(first) = reports[0].clone() else { panic!("{reports:?}") };
    let first = garenne_common::TaskResult { batch: Some(batch.clone()), ..first };
    let other = garenne_common::TaskResult {
        status: Status::Failed,
        error: Some("a second execution".to_owned()),
        output: None,
        ..first.clone()
    };
    let (first, other) = (Report::Finished(first), Report::Finished(other));
    // In one bundle, in another bundle, and after it was stored.
    amqp.reports(&[first.clone(), first.clone(), other.clone()]).await;
    amqp.reports(std::slice::from_ref(&first)).await;
    stored(&producer, 1).await;
    amqp.reports(&[other]).await;
    soon("all repeats are dropped", async || {
        (producer.totals().await.unwrap().repeats == 4).then_some(())
    })
    .await;
    let status = producer.batch_status(&batch).await.unwrap().unwrap();
    assert_eq!((status.summary.succeeded, status.summary.failed), (1, 0));
    let results = producer.results(&[TaskId::new("t-1").unwrap()]).await.unwrap();
    assert_eq!(results[0].status, Status::Succeeded);
    assert_eq!(producer.totals().await.unwrap().results, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_language_reports_in_json() {
    let warren = Warren::new().await;
    let reports = uncollected(&warren).await;
    let _collector = warren.collector().start().await;
    let (amqp, producer) = tokio::join!(warren.amqp(), warren.producer());
    let properties = Properties {
        content_type: Some("application/json".to_owned()),
        kind: Some(report::BUNDLE_KIND.to_owned()),
        ..Properties::default()
    };
    let body = serde_json::to_vec(&reports).unwrap().into();
    let results = warren.config().broker.topology().results();
    amqp.publish(&results, &results, Message { properties, headers: vec![], body }).await;
    stored(&producer, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nonsense_in_its_queues_does_not_stop_the_collector() {
    let warren = Warren::new().await;
    let _collector = warren.collector().start().await;
    let (amqp, producer) = tokio::join!(warren.amqp(), warren.producer());
    let topology = warren.config().broker.topology();
    let nonsense = |body: &'static [u8]| Message { body: body.into(), ..Message::default() };
    for body in [
        &b""[..],
        b"\x02\xff\xff\xff\xff\xff",
        b"\x09",
        b"{",
        b"\x02\xfd\xff\xff\xff\xff\xff\xff\xff\xff",
    ] {
        amqp.publish(&topology.results(), &topology.results(), nonsense(body)).await;
        amqp.publish(&topology.dead(), "", nonsense(body)).await;
        amqp.publish("", &topology.queries(), nonsense(body)).await;
    }
    let id = garenne_common::BatchId::new("b-1").unwrap();
    let at = Timestamp::now();
    amqp.reports(&[Report::BatchSealed { batch: id.clone(), count: 0, at }]).await;
    let summary = producer.wait_batch(&id).soon("the collector goes on").await.unwrap();
    assert_eq!(summary.total, Some(0));
    let totals = producer.totals().await.unwrap();
    assert!(totals.dead >= 5, "what it cannot read is kept as a dead letter: {totals:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_notice_is_told_although_the_collector_is_killed_again_and_again() {
    const TASKS: usize = 600;
    let warren = Warren::new().await;
    let (_worker, mut collector) = warren.crew().await;
    let (amqp, producer) = tokio::join!(warren.amqp(), warren.producer());
    let mut notices = amqp.notices().await;
    let tasks = (0..TASKS).map(|n| Submission::dynamic("garenne.echo", n).unwrap());
    let ids: Vec<_> =
        producer.submit_all_detached(stream::iter(tasks)).try_collect().await.unwrap();
    let mut told = HashSet::new();
    let mut kills = [TASKS / 6, TASKS / 3, TASKS / 2].into_iter().peekable();
    while told.len() < TASKS {
        let message = notices.next().await;
        let Notice::Task(task) = Notice::decode(&message).unwrap() else { panic!() };
        assert_eq!(message.properties.message_id, Some(format!("task.{}", task.task)));
        told.insert(task.task);
        if kills.next_if(|at| told.len() >= *at).is_some() {
            collector.kill().await;
            collector = warren.collector().start().await;
        }
    }
    assert_eq!(told, ids.into_iter().collect());
    assert_eq!(producer.totals().await.unwrap().results, TASKS as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn old_results_are_forgotten() {
    let warren = Warren::new().await;
    let (_worker, mut collector) = warren.crew().await;
    let producer = warren.producer().await;
    let submission = Submission::dynamic("garenne.echo", 1).unwrap();
    let id = producer.submit_detached(submission).await.unwrap();
    stored(&producer, 1).await;
    assert!(collector.terminate(SOON).await.success());
    let old = Timestamp::now().plus(Duration::from_millis(300));
    soon("it is old", async || (Timestamp::now() > old).then_some(())).await;
    let _collector = warren.collector().set("collector.retention", "200ms").start().await;
    soon("it is forgotten", async || {
        (producer.task_state(&id).await.unwrap() == TaskState::Unknown).then_some(())
    })
    .await;
}

/// As after a start under a clock that is a month ahead: without the check all is deleted at once.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_whose_last_commit_is_old_is_not_emptied_at_the_start() {
    let warren = Warren::new().await;
    let (_worker, mut collector) = warren.crew().await;
    let producer = warren.producer().await;
    let submission = Submission::dynamic("garenne.echo", 1).unwrap();
    let id = producer.submit_detached(submission).await.unwrap();
    stored(&producer, 1).await;
    assert!(collector.terminate(Duration::from_secs(15)).await.success());
    let store = Connection::open(warren.path("store.sqlite3")).unwrap();
    let month = 30 * 24 * 3_600 * 1_000_i64;
    store.execute("UPDATE results SET stored_at = stored_at - ?1", [month]).unwrap();
    drop(store);
    let mut collector = warren.collector().start().await;
    collector.logged("nothing is deleted for 24 hours").await;
    // The line is the decision; an answer shows that the collector is at work beyond it.
    producer.totals().await.unwrap();
    assert!(collector.terminate(Duration::from_secs(15)).await.success());
    assert_eq!(warren.rows::<String>("SELECT id FROM results"), [id.to_string()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_collectors_share_a_store_and_the_work() {
    let warren = Warren::new().await;
    let (_worker, _one, _two) = tokio::join!(
        warren.worker().start(),
        warren.collector().start(),
        warren.collector().start(),
    );
    let producer = warren.producer().await;
    let batch = producer.batch().await.unwrap();
    let tasks = (0..500).map(|n| Submission::dynamic("garenne.echo", n).unwrap());
    let _ids: Vec<_> = batch.submit_all_detached(stream::iter(tasks)).try_collect().await.unwrap();
    let summary = batch.seal().await.unwrap().wait().soon("the batch is done").await.unwrap();
    assert_eq!((summary.total, summary.succeeded), (Some(500), 500));
}
