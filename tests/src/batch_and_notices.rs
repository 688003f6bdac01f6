//! A done notice follows every batch, exactly one record with a stable id (promise 5), and tasks outside
//! batches get one each.

use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt, stream};
use garenne_common::wire::{BatchState, Notice, Report};
use garenne_common::{BatchId, QueueName, Status, Timestamp};
use garenne_producer::{NoticeFilter, Notices, Producer, QueryError, Submission};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::harness::{Proxy, SOON, Soon, Warren, soon, time_passes};

fn echo(n: u32) -> Submission<Value> {
    Submission::dynamic("garenne.echo", n).unwrap()
}

fn failing() -> Submission<Value> {
    Submission::dynamic("garenne.fail", json!({ "fatal": true })).unwrap()
}

/// All notices until that of a later task, which says that nothing more was on its way.
async fn until_quiet(producer: &Producer, notices: &mut Notices) -> Vec<Notice> {
    let last = producer.submit_detached(echo(0)).await.unwrap();
    let mut all = vec![];
    loop {
        match notices.next().soon("a notice").await.expect("the producer is open") {
            Notice::Task(task) if task.task == last => return all,
            notice => all.push(notice),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_counts_every_member_once_and_tells_it_once() {
    let warren = Warren::new().await;
    let _crew = warren.crew().await;
    let producer = warren.producer().await;
    let mut notices = producer.notices(NoticeFilter::All).await.unwrap();
    let batch = producer.batch().await.unwrap();
    let quick =
        garenne_common::RetryPolicy { base: Duration::from_millis(20), ..Default::default() };
    let flaky = Submission::dynamic("garenne.fail", json!({ "times": 2 })).unwrap();
    let members = (0..40).map(echo).chain([failing(), failing(), flaky.retry_policy(quick)]);
    let handles: Vec<_> = batch.submit_all(stream::iter(members)).try_collect().await.unwrap();
    let sealed = batch.seal().await.unwrap();
    assert_eq!((sealed.count(), handles.len()), (43, 43));
    let summary = sealed.wait().soon("the batch is done").await.unwrap();
    assert_eq!((summary.state, summary.total), (BatchState::Done, Some(43)));
    assert_eq!((summary.succeeded, summary.failed, summary.cancelled), (41, 2, 0));
    assert!(summary.finished_at.is_some());

    let all = until_quiet(&producer, &mut notices).await;
    assert_eq!(all, [Notice::Batch(summary)], "one notice, and none for members");
    let status = producer.batch_status(sealed.id()).await.unwrap().unwrap();
    assert_eq!(status.failures.len(), 2);
    // Whoever comes later gets the same answer at once.
    let late = warren.producer().await;
    assert_eq!(late.wait_batch(sealed.id()).soon("the answer").await.unwrap().total, Some(43));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_batch_is_done_at_once() {
    let warren = Warren::new().await;
    let _collector = warren.collector().start().await;
    let producer = warren.producer().await;
    let sealed = producer.batch().await.unwrap().seal().await.unwrap();
    let summary = sealed.wait().soon("the empty batch is done").await.unwrap();
    assert_eq!((summary.state, summary.total), (BatchState::Done, Some(0)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wait_that_is_too_short_says_so() {
    let warren = Warren::new().await;
    let _collector = warren.collector().start().await;
    let producer = warren.producer().await;
    let batch = producer.batch().await.unwrap();
    batch.submit_detached(echo(1)).await.unwrap();
    let sealed = batch.seal().await.unwrap();
    let limit = Duration::from_millis(300);
    let error = sealed.wait_timeout(limit).soon("the limit").await.unwrap_err();
    assert!(matches!(error, QueryError::NotDone { waited, .. } if waited == limit), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_whose_producer_was_killed_is_abandoned_at_its_deadline() {
    let warren = Warren::new().await;
    let _worker = warren.worker().start().await;
    let producer = warren.producer().await;
    let mut notices = producer.notices(NoticeFilter::All).await.unwrap();
    let mut command = warren.command("garenne");
    command.env("GARENNE__PRODUCER__BATCH_DEADLINE", "2s").args(["map", "garenne.echo"]);
    let mut map = warren.start("garenne", command);
    // Its input stays open: it will not seal.
    map.write("1\n2\n3\n").await;
    soon("all three have run", async || map.stdout().lines().nth(2).map(drop)).await;
    map.kill().await;
    // Not before, since the deadline might pass while they run.
    let _collector = warren.collector().start().await;
    let Some(Notice::Batch(summary)) = notices.next().soon("the notice").await else { panic!() };
    assert_eq!((summary.state, summary.total), (BatchState::Abandoned, None));
    assert_eq!(summary.succeeded, 3, "what was submitted is counted");
    assert_eq!(until_quiet(&producer, &mut notices).await, [], "one notice");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_seal_behind_a_backlog_counts_although_its_deadline_has_passed() {
    const BACKLOG: u32 = 3_000;
    let warren = Warren::new().await;
    let collector = warren.collector().start().await;
    let (amqp, producer) = tokio::join!(warren.amqp(), warren.producer());
    let (batch, at) = (BatchId::new("b-1").unwrap(), Timestamp::now());
    let deadline = at.plus(Duration::from_millis(100));
    amqp.reports(&[Report::BatchOpened { batch: batch.clone(), at, deadline }]).await;
    soon("it is open", async || producer.batch_status(&batch).await.unwrap()).await;
    collector.kill().await;
    let others = (0..BACKLOG).map(|n| {
        let batch = BatchId::new(&format!("other-{n}")).unwrap();
        let amqp = &amqp;
        async move { amqp.reports(&[Report::BatchSealed { batch, count: 1, at }]).await }
    });
    stream::iter(others).buffer_unordered(200).collect::<()>().await;
    amqp.reports(&[Report::BatchSealed { batch: batch.clone(), count: 0, at }]).await;

    // More than fits into the prefetch, so that the broker keeps the seal; and nothing of it arrives.
    let line = Proxy::to(warren.url()).await;
    line.mute_deliveries(true);
    let blind = warren.collector().url(&line.url(warren.url())).start().await;
    line.caught().await;
    // Time for two looks.
    time_passes(Duration::from_millis(2_500)).await;
    let known = warren.rows::<i64>("SELECT COUNT(*) FROM batches");
    assert_eq!(known, [1], "the seal is out of the collector's sight");
    blind.kill().await;
    let _collector = warren.collector().start().await;
    let summary = producer.wait_batch(&batch).soon("its seal is read").await.unwrap();
    assert_eq!((summary.state, summary.total), (BatchState::Done, Some(0)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_outside_batches_has_a_notice_of_its_own() {
    let warren = Warren::new().await;
    let _crew = warren.crew().await;
    let producer = warren.producer().await;
    let mut all = producer.notices(NoticeFilter::All).await.unwrap();
    let good = producer.submit_detached(echo(1)).await.unwrap();
    let Some(Notice::Task(notice)) = all.next().soon("the notice").await else { panic!() };
    assert_eq!((&notice.task, notice.status, notice.attempt), (&good, Status::Succeeded, 1));
    let bad = failing().id("chosen*id".parse().unwrap());
    let filter = NoticeFilter::Task("chosen*id".parse().unwrap());
    let mut one = producer.notices(filter).await.unwrap();
    producer.submit_detached(echo(2)).await.unwrap();
    producer.submit_detached(bad).await.unwrap();
    let Some(Notice::Task(notice)) = one.next().soon("the notice").await else { panic!() };
    assert_eq!((notice.task.as_str(), notice.status), ("chosen*id", Status::Failed));
}

#[tokio::test(flavor = "multi_thread")]
async fn task_notices_can_be_disabled() {
    let warren = Warren::new().await;
    let (_worker, _collector) = tokio::join!(
        warren.worker().start(),
        warren.collector().set("collector.task_notices", false).start(),
    );
    let producer = warren.producer().await;
    let mut notices = producer.notices(NoticeFilter::All).await.unwrap();
    producer.submit_detached(echo(1)).await.unwrap();
    let sealed = producer.batch().await.unwrap().seal().await.unwrap();
    let Some(Notice::Batch(summary)) = notices.next().soon("the notice").await else {
        panic!("a notice of a task")
    };
    assert_eq!(&summary.batch, sealed.id());
}

#[tokio::test(flavor = "multi_thread")]
async fn notices_are_printed_as_json_lines_where_asked_for() {
    let warren = Warren::new().await;
    let (_worker, mut collector) =
        tokio::join!(warren.worker().start(), warren.collector().arg("--notify-stdout").start());
    let producer = warren.producer().await;
    let batch = producer.batch().await.unwrap();
    batch.submit_detached(echo(1)).await.unwrap();
    let id: BatchId = batch.seal().await.unwrap().id().clone();
    let line =
        soon("a line on stdout", async || collector.stdout().lines().next().map(str::to_owned));
    let notice: Notice = serde_json::from_str(&line.await).unwrap();
    assert!(matches!(notice, Notice::Batch(summary) if summary.batch == id));
    collector.signal(Signal::SIGINT);
    assert!(collector.ended(SOON).await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_whose_members_were_purged_is_abandoned_by_hand_and_told() {
    let warren = Warren::new().await;
    let _collector = warren.collector().start().await;
    let (amqp, producer) = tokio::join!(warren.amqp(), warren.producer());
    let mut notices = amqp.notices().await;
    let batch = producer.batch().await.unwrap();
    batch.submit_detached(Submission::dynamic("garenne.echo", 1).unwrap()).await.unwrap();
    let id = batch.id().clone();
    let _sealed = batch.seal().await.unwrap();
    let queue = warren.config().broker.topology().task_queue(&QueueName::default());
    amqp.admin.purge(&queue).await.unwrap();
    soon("the seal is stored", async || producer.batch_status(&id).await.unwrap()).await;
    let ended = warren.garenne(&["batch", "abandon", id.as_str(), "--output", "json"]).await;
    assert_eq!(ended.code, Some(0), "{ended:#?}");
    let summary = producer.wait_batch(&id).soon("the batch is over").await.unwrap();
    assert_eq!((summary.state, summary.succeeded), (BatchState::Abandoned, 0));
    let notice = Notice::decode(&notices.next().await).unwrap();
    assert!(matches!(notice, Notice::Batch(told) if told.state == BatchState::Abandoned));
}
