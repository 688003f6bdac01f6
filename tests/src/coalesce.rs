//! Tasks that are submitted one by one: they share messages while others are under way, each as if it
//! were alone (promises 1 and 4).

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use futures_util::stream::{self, StreamExt};
use garenne_common::config::Config;
use garenne_common::wire::bundle;
use garenne_common::{QueueName, TaskId};
use garenne_producer::{Producer, Submission, SubmitError};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::harness::{Amqp, Proxy, SOON, Sends, Soon, Warren, soon, time_passes};

fn echo(value: u32) -> Submission<Value> {
    Submission::dynamic("garenne.echo", json!(value)).unwrap()
}

fn sleep(millis: u64) -> Submission<Value> {
    Submission::dynamic("garenne.sleep", json!({ "millis": millis })).unwrap()
}

/// A producer behind a line that can be troubled.
async fn behind(line: &Proxy, warren: &Warren, publish_timeout: Duration) -> Producer {
    let namespace = warren.config().broker.namespace;
    let url = line.url(warren.url());
    let mut config = Config::with_broker(&url, namespace.as_str()).unwrap();
    config.broker.publish_timeout = publish_timeout;
    Producer::connect(&config).soon("it connects").await.unwrap()
}

/// Submits beside everything else.
fn submit(
    producer: &Producer,
    task: Submission<Value>,
) -> tokio::task::JoinHandle<Result<TaskId, SubmitError>> {
    let producer = producer.clone();
    tokio::spawn(async move { producer.submit_detached(task).await })
}

/// The ids of so many tasks that wait in the queue `default`, sorted.
async fn waiting(warren: &Warren, amqp: &Amqp, tasks: usize) -> Vec<String> {
    let queue = QueueName::default();
    let mut tap = amqp.tap(&warren.config().broker.topology().task_queue(&queue)).await;
    let mut ids = vec![];
    while ids.len() < tasks {
        let message = tap.next().await;
        let singles = if bundle::is_one(&message) {
            bundle::singles(&message, &queue).unwrap()
        } else {
            vec![message]
        };
        ids.extend(singles.into_iter().map(|single| single.properties.message_id.unwrap()));
    }
    ids.sort();
    ids
}

#[tokio::test(flavor = "multi_thread")]
async fn those_under_way_together_share_messages_and_each_has_its_own_end() {
    let warren = Warren::new().await;
    let line = Proxy::to(warren.url()).await;
    let amqp = warren.amqp().await;
    let producer = behind(&line, &warren, SOON).await;
    // From now on it knows the queue, and a call is under way from its first moment.
    let first = producer.submit_detached(echo(0)).await;
    // Four go at once and are held, so the others gather. Unconstrained, for all to begin at once.
    line.hold(Sends::To("tasks"));
    let others = join_all((1..400).map(|number| producer.submit_detached(echo(number))));
    let release = async {
        line.caught().await;
        line.cut();
    };
    let (others, ()) = tokio::join!(tokio::task::unconstrained(others), release);
    let ids: Vec<_> = [first].into_iter().chain(others).map(Result::unwrap).collect();
    let messages = amqp.waiting().await;
    assert!((20..=60).contains(&messages), "{messages} messages: 5 alone, the others by the score");
    let _worker = warren.worker().start().await;
    let mut results = amqp.results().await;
    for _ in 0..ids.len() {
        let result = results.result().await;
        let number = ids.iter().position(|id| *id == result.id);
        assert_eq!(result.output.unwrap().to_json_value(), json!(number));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_members_of_a_batch_are_counted_one_by_one() {
    let warren = Warren::new().await;
    let (_worker, _collector) = warren.crew().await;
    let producer = warren.producer().await;
    let batch = producer.batch().await.unwrap();
    let members = stream::iter(0..500).map(|number| batch.submit_detached(echo(number)));
    let members: Vec<Result<TaskId, _>> = members.buffer_unordered(100).collect().await;
    assert!(members.iter().all(Result::is_ok));
    let summary = batch.seal().await.unwrap().wait().soon("it is done").await.unwrap();
    assert_eq!((summary.total, summary.succeeded), (Some(500), 500));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_comes_alone_and_one_that_may_take_long_are_messages_of_their_own() {
    let warren = Warren::new().await;
    let (producer, amqp) = (warren.producer().await, warren.amqp().await);
    for number in 0..5 {
        producer.submit_detached(echo(number)).await.unwrap();
    }
    assert_eq!(amqp.waiting().await, 5);
    let patient = || producer.submit_detached(echo(1).timeout(Duration::from_mins(10)));
    join_all((0..50).map(|_| patient())).await;
    assert_eq!(amqp.waiting().await, 55);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_seen_to_be_slow_travels_alone() {
    let warren = Warren::new().await;
    let mut worker = warren.worker().start().await;
    let (producer, amqp) = (warren.producer().await, warren.amqp().await);
    producer.submit(sleep(100)).await.unwrap().output().soon("it ends").await.unwrap();
    worker.signal(Signal::SIGTERM);
    assert!(worker.ended(SOON).await.success());
    join_all((0..50).map(|_| producer.submit_detached(sleep(100)))).await;
    assert_eq!(amqp.waiting().await, 50);
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_gives_up_before_it_was_sent_has_withdrawn_it() {
    let warren = Warren::new().await;
    let line = Proxy::to(warren.url()).await;
    let amqp = warren.amqp().await;
    let producer = behind(&line, &warren, SOON).await;
    line.hold(Sends::To("tasks"));
    let task = |number| echo(number).id(TaskId::new(&format!("t-{number}")).unwrap());
    let submit = |number| submit(&producer, task(number));
    let mut kept: Vec<_> = (0..4).map(submit).collect();
    line.caught().await;
    let withdrawn: Vec<_> = (10..20).map(submit).collect();
    // By then they have mostly left for the publisher, together; it must make no difference.
    time_passes(Duration::from_millis(300)).await;
    withdrawn.iter().for_each(tokio::task::JoinHandle::abort);
    join_all(withdrawn).await;
    line.cut();
    kept.push(submit(4));
    for submitted in kept {
        submitted.soon("it is confirmed").await.unwrap().unwrap();
    }
    let ids = waiting(&warren, &amqp, 5).await;
    assert_eq!(ids, ["t-0", "t-1", "t-2", "t-3", "t-4"]);
    assert_eq!(amqp.waiting().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_hears_in_time_that_nothing_was_confirmed() {
    let warren = Warren::new().await;
    let line = Proxy::to(warren.url()).await;
    let producer = behind(&line, &warren, Duration::from_secs(3)).await;
    producer.submit_detached(echo(0)).await.unwrap();
    line.hold(Sends::To("tasks"));
    let submitted = join_all((0..40).map(|number| producer.submit_detached(echo(number))));
    for outcome in submitted.soon("each hears of it").await {
        assert!(matches!(outcome, Err(SubmitError::Unconfirmed { .. })), "{outcome:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_submitted_before_closing_is_confirmed() {
    let warren = Warren::new().await;
    let (producer, amqp) = (warren.producer().await, warren.amqp().await);
    // From now on it knows the queue, and a call is under way from its first moment.
    let first = producer.submit_detached(echo(0)).await;
    // Four go at once, the others gather. Unconstrained, for all to begin before closing does.
    let submitted = join_all((1..400).map(|number| producer.submit_detached(echo(number))));
    let submitted = tokio::task::unconstrained(submitted);
    let (submitted, ()) = tokio::join!(submitted, producer.clone().close());
    let submitted: Result<Vec<_>, _> = submitted.into_iter().chain([first]).collect();
    let mut ids: Vec<_> = submitted.unwrap().iter().map(ToString::to_string).collect();
    ids.sort();
    assert_eq!(waiting(&warren, &amqp, 400).await, ids);
}

#[tokio::test(flavor = "multi_thread")]
async fn closing_waits_for_those_that_still_gather_and_leaves_none_in_doubt() {
    let warren = Warren::new().await;
    let line = Proxy::to(warren.url()).await;
    let amqp = warren.amqp().await;
    let producer = behind(&line, &warren, SOON).await;
    line.hold(Sends::To("tasks"));
    // More than there is room for.
    let begun = Arc::new(AtomicUsize::new(0));
    let submit = |number| {
        let (producer, begun) = (producer.clone(), Arc::clone(&begun));
        tokio::spawn(async move {
            begun.fetch_add(1, Ordering::Relaxed);
            producer.submit_detached(echo(number)).await
        })
    };
    let submitted: Vec<_> = (0..700).map(submit).collect();
    soon("all are under way", async || (begun.load(Ordering::Relaxed) == 700).then_some(())).await;
    line.caught().await;
    let closing = tokio::spawn(producer.clone().close());
    time_passes(Duration::from_millis(200)).await;
    assert!(!closing.is_finished(), "it waits");
    line.cut();
    closing.soon("it closes").await.unwrap();
    let mut confirmed = vec![];
    for submitted in submitted {
        match submitted.soon("it hears").await.unwrap() {
            Ok(id) => confirmed.push(id.to_string()),
            Err(SubmitError::Broker(_)) => {}
            Err(error) => panic!("{error}: closing left it in doubt"),
        }
    }
    confirmed.sort();
    assert!(confirmed.len() > 100, "{} were confirmed", confirmed.len());
    assert_eq!(waiting(&warren, &amqp, confirmed.len()).await, confirmed);
    assert_eq!(amqp.waiting().await, 0);
}
