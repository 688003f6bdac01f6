//! The id of a batch is no secret, and knowing it is not enough to add members, to seal it or to open it.

use std::time::Duration;

use futures_util::StreamExt;
use garenne_common::wire::{BatchState, DeadLetter, HeaderValue, Report};
use garenne_common::{BatchId, DeadReason, QueueName, Timestamp};
use garenne_producer::Submission;
use serde_json::{Value, json};

use crate::harness::{Amqp, Soon, Warren, message, soon};

/// A task of a stranger that says it belongs to this batch; returns when it has ended.
async fn intrude(warren: &Warren, amqp: &Amqp, batch: &BatchId, name: &str, args: &Value) {
    let id = format!("intruder-{}", garenne_common::TaskId::generate());
    let mut task = message(name, &id, args);
    task.set_header("x-garenne-batch", HeaderValue::Text(batch.to_string()));
    amqp.task(task).await;
    soon("the intruder has ended", async || {
        let query = format!("SELECT count(*) FROM results WHERE id = '{id}'");
        (warren.rows::<u32>(&query) == [1]).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn members_without_the_key_end_no_batch() {
    let warren = Warren::new().await;
    let (_worker, _collector) = warren.crew().await;
    let (producer, amqp) = (warren.producer().await, warren.amqp().await);
    let batch = producer.batch().await.unwrap();
    let id = batch.id().clone();
    let sleep = Submission::<Value>::dynamic("garenne.echo", json!(1)).unwrap();
    let delayed = sleep.delay(Duration::from_secs(8));
    let handle = batch.submit(delayed).await.unwrap();
    // By the id, in a message of its own, in a dead letter, and by reports.
    intrude(&warren, &amqp, &id, "garenne.echo", &json!(1)).await;
    intrude(&warren, &amqp, &id, "garenne.fail", &json!({ "fatal": true })).await;
    let at = Timestamp::now();
    let early = at;
    amqp.reports(&[
        Report::BatchOpened { batch: id.clone(), at, deadline: early },
        Report::BatchSealed { batch: id.clone(), count: 0, at },
    ])
    .await;
    // A key that is another's.
    intrude(&warren, &amqp, &BatchId::generate_key(), "garenne.echo", &json!(1)).await;
    let status = producer.batch_status(&id).await.unwrap().unwrap().summary;
    assert_eq!((status.state, status.ended(), status.total), (BatchState::Open, 0, None));
    let sealed = batch.seal().await.unwrap();
    let done = sealed.wait().soon("the batch is done").await.unwrap();
    assert_eq!((done.succeeded, done.failed, done.total), (1, 0, Some(1)));
    assert_eq!(handle.result().await.unwrap().batch, Some(id));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_key_survives_retries_bundles_and_dead_letters_and_is_shown_nowhere() {
    let warren = Warren::new().await;
    let mut worker = warren.worker().set("log.filter", "debug,lapin=off").start().await;
    let mut collector = warren.collector().set("log.filter", "debug,lapin=off").start().await;
    let producer = warren.producer().await;
    let mut notices = warren.amqp().await.notices().await;
    let batch = producer.batch().await.unwrap();
    let id = batch.id().clone();
    let echo = |n: u32| Submission::<Value>::dynamic("garenne.echo", json!(n)).unwrap();
    let together = futures_util::stream::iter((0..50).map(echo));
    let bundled: Vec<_> = batch.submit_all(together).collect().await;
    let retried = Submission::<Value>::dynamic("garenne.fail", json!({ "times": 1 })).unwrap();
    let retried = batch.submit(retried).await.unwrap();
    let fatal = Submission::<Value>::dynamic("garenne.fail", json!({ "fatal": true })).unwrap();
    let fatal = batch.submit(fatal).await.unwrap();
    let (dead, retried_id) = (fatal.id().to_string(), retried.id().to_string());
    let sealed = batch.seal().await.unwrap();
    let done = sealed.wait().soon("the batch is done").await.unwrap();
    assert_eq!((done.succeeded, done.failed), (51, 1));
    let mut shown = vec![format!("{done:?}")];
    for handle in bundled {
        shown.push(format!("{:?}", handle.unwrap().result().await.unwrap()));
    }
    shown.push(format!("{:?}", fatal.result().await.unwrap()));
    shown.push(format!("{:?}", retried.result().await.unwrap()));
    let batch = id.as_str();
    for command in [
        vec!["batch", "show", batch],
        vec!["batch", "show", batch, "-o", "json"],
        vec!["dead", "list", "-o", "json", "--batch", batch],
        vec!["dead", "show", &dead],
        vec!["dead", "show", &dead, "-o", "json"],
        vec!["dead", "export"],
        vec!["task", "show", &dead, "-o", "json"],
        vec!["task", "show", &retried_id, "-o", "json"],
    ] {
        let text = warren.garenne(&command).await.ok();
        assert!(text.contains(batch), "{command:?}: {text}");
        shown.push(text);
    }
    let notice = notices.next().await;
    shown.push(format!("{notice:?} {}", String::from_utf8_lossy(&notice.body)));
    worker.terminate(Duration::from_secs(40)).await;
    collector.terminate(Duration::from_secs(40)).await;
    shown.extend([worker.stderr(), collector.stderr(), worker.stdout()]);
    let key = "key-";
    for text in shown {
        let leaks = text.match_indices(key).any(|(at, _)| {
            let digits = &text.as_bytes()[at + key.len()..];
            digits.len() >= 32 && digits[..32].iter().all(u8::is_ascii_hexdigit)
        });
        assert!(!leaks, "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parked_member_comes_back_with_its_key_and_open_batches_stay_open() {
    let warren = Warren::new().await;
    let (_worker, _collector) = warren.crew().await;
    let (producer, amqp) = (warren.producer().await, warren.amqp().await);
    let batch = producer.batch().await.unwrap();
    let id = batch.id().clone();
    let unknown = Submission::<Value>::dynamic("new.hello", json!({})).unwrap();
    let handle = batch.submit(unknown).await.unwrap();
    let sealed = batch.seal().await.unwrap();
    soon("it is parked", async || {
        let query = "SELECT count(*) FROM dead_letters WHERE reason = 'unknown_task'";
        (warren.rows::<u32>(query) == [1]).then_some(())
    })
    .await;
    let text = warren.garenne(&["task", "show", handle.id().as_str()]).await.ok();
    assert!(!text.contains("key-"), "{text}");
    let newer = "[worker.commands.\"new.hello\"]\nargv = [\"true\"]\n";
    let _newer = warren.worker().toml(newer).start().await;
    let done = sealed.wait().soon("the batch is done").await.unwrap();
    assert_eq!((done.batch, done.succeeded), (id, 1));

    let open = BatchId::new("b-1").unwrap();
    intrude(&warren, &amqp, &open, "garenne.echo", &json!(1)).await;
    // A worker's dead letter, too.
    let mut member = message("a.b", "letter", &json!(1));
    member.set_header("x-garenne-batch", HeaderValue::Text("b-1".to_owned()));
    let queue = QueueName::default();
    let letter = DeadLetter::new(&member, queue.as_str(), DeadReason::Fatal, "no", "w");
    amqp.publish(&warren.config().broker.topology().dead(), "", letter.encode()).await;
    let status = soon("both are counted", async || {
        let status = producer.batch_status(&open).await.unwrap()?.summary;
        (status.ended() == 2).then_some(status)
    })
    .await;
    assert_eq!(status.state, BatchState::Open);
    let text = warren.garenne(&["batch", "show", "b-1"]).await.ok();
    assert!(text.contains("from anyone who knows the id"), "{text}");
}
