//! A broker that takes no messages because of its memory or its disk: typed errors in time for those
//! who submit, back-pressure for workers, and everything goes on when it is over (promises 1 and 9).

use std::time::Duration;

use garenne_common::broker::BrokerError;
use garenne_producer::{Producer, Submission, SubmitError};
use serde_json::Value;

use crate::harness::effects::{self, Gate};
use crate::harness::{PrivateNode, Soon, Warren, soon, time_passes};

const DEADLINE: Duration = Duration::from_secs(2);

fn echo() -> Submission<Value> {
    Submission::dynamic("garenne.echo", 1).unwrap()
}

async fn blocked(producer: &Producer) {
    let error = producer.submit(echo()).soon("submitting fails").await.unwrap_err();
    assert!(
        matches!(error, SubmitError::Unconfirmed { source: BrokerError::Blocked(_), .. }),
        "{error:?}"
    );
    assert!(error.is_transient() && error.to_string().contains("free memory or disk"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_alarm_is_an_error_in_time_and_then_a_memory() {
    let node = PrivateNode::take().await;
    let warren = Warren::on(&node.url()).await;
    let mut config = warren.config();
    config.broker.publish_timeout = DEADLINE;
    let worker = warren.worker().toml(&effects::command(&warren));
    let worker = worker.set("worker.concurrency", 2).set("worker.prefetch", 4);
    let (mut worker, _collector) = tokio::join!(worker.start(), warren.collector().start());
    let producer = Producer::connect(&config).await.unwrap();
    let (gate, mut handles) = (Gate::shut(&warren, "all"), vec![]);
    for _ in 0..20 {
        handles.push(producer.submit(gate.task()).await.unwrap());
    }
    effects::begun(&warren, 2).await;
    node.alarm();
    // Their results meet the alarm.
    gate.open();
    // Again and again: neither a caller nor what it left behind holds up the next one.
    for _ in 0..3 {
        blocked(&producer).await;
    }
    worker.logged("takes no messages now (memory or disk alarm)").await;

    let submitted = warren.garenne(&["--deadline", "5s", "submit", "garenne.echo", "1"]).await;
    assert_eq!(submitted.code, Some(2), "{submitted:#?}");
    assert!(submitted.stderr.contains("memory or disk alarm"), "{submitted:#?}");
    assert_eq!(submitted.stderr.lines().count(), 2, "a sentence and advice: {submitted:#?}");
    let lines = warren.file("lines", "1\n2\n3\n");
    let map = ["--deadline", "5s", "map", "garenne.echo", lines.to_str().unwrap()];
    let mapped = warren.garenne(&map).await;
    assert_ne!(mapped.code, Some(0), "{mapped:#?}");
    assert!(mapped.stderr.contains("memory or disk alarm"), "{mapped:#?}");
    let doctor = warren.garenne(&["--deadline", "5s", "doctor"]).await;
    let said: Vec<_> = doctor.stdout.split_whitespace().collect();
    assert!(said.join(" ").contains("memory or disk alarm"), "{doctor:#?}");
    assert_eq!(doctor.code, Some(1), "{doctor:#?}");

    node.calm();
    worker.logged("takes messages again").await;
    for handle in handles {
        let result = handle.result().soon("a task that was submitted before ends").await.unwrap();
        assert_eq!(result.attempt, 1);
    }
    producer.submit(echo()).await.unwrap().output().soon("it goes on").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn no_lease_lapses_while_its_renewals_cannot_arrive() {
    let node = PrivateNode::take().await;
    let warren = Warren::on(&node.url()).await;
    let worker = warren.worker().set("broker.consumer_timeout", "2s");
    let worker = worker.set("worker.task_timeout", "5m").set("worker.lease_term", "3s");
    let worker = worker.toml(&effects::command(&warren));
    let (_worker, collector) = tokio::join!(worker.start(), warren.collector().start());
    let producer = warren.producer().await;
    let gate = Gate::shut(&warren, "long");
    let handle = producer.submit(gate.task()).await.unwrap();
    let held = "SELECT id FROM leases WHERE state = 'held'";
    soon("it is leased", async || (warren.rows::<String>(held).len() == 1).then_some(())).await;
    node.alarm();
    // Four terms without a word.
    time_passes(Duration::from_secs(12)).await;
    node.calm();
    gate.open();
    handle.result().soon("it ends").await.unwrap();
    assert!(!collector.stderr().contains("lease lapsed"), "{}", collector.stderr());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_lies_in_the_broker_is_collected_while_the_alarm_lasts() {
    let node = PrivateNode::take().await;
    let warren = Warren::on(&node.url()).await;
    let producer = warren.producer().await;
    let worker = warren.worker().start().await;
    let mut ids = vec![];
    for _ in 0..20 {
        ids.push(producer.submit_detached(echo()).await.unwrap());
    }
    let amqp = warren.amqp().await;
    let results = warren.config().broker.topology().results();
    soon("the worker is through", async || (amqp.waiting().await == 0).then_some(())).await;
    worker.kill().await;
    node.alarm();
    let _collector = warren.collector().start().await;
    // The very messages that fill the broker: were they not taken, no alarm would ever end.
    soon("the results are stored", async || {
        let waiting = amqp.admin.queue_status(&results).await.ok()??.ready;
        let stored: i64 = warren.rows("SELECT count(*) FROM results").pop()?;
        (waiting == 0 && stored > 0).then_some(())
    })
    .await;
    node.calm();
}
