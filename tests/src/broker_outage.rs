//! The broker goes away in mid-use and comes back: callers get typed errors within their deadlines
//! (promise 1), and every connection comes back by itself (promise 7).

use std::time::Duration;

use garenne_common::QueueName;
use garenne_common::broker::BrokerError;
use garenne_common::config::Config;
use garenne_common::wire::Query;
use garenne_producer::{NoticeFilter, Producer, QueryError, Submission, SubmitError};
use serde_json::Value;

use crate::harness::effects::{self, Gate};
use crate::harness::{
    PrivateNode, Process, SOON, Service, Soon, Warren, eventually, soon, time_passes,
};

const DEADLINE: Duration = Duration::from_secs(2);
const COMES_BACK: Duration = Duration::from_mins(2);

fn echo(args: impl serde::Serialize) -> Submission<Value> {
    Submission::dynamic("garenne.echo", args).unwrap()
}

/// Short time limits everywhere, so that a frozen broker is noticed soon.
fn impatient(service: Service<'_>) -> Service<'_> {
    service.set("broker.heartbeat", "2s").set("broker.connect_timeout", "2s")
}

async fn crew(warren: &Warren) -> (Process, Process, Producer) {
    let worker = warren.worker().toml(&effects::command(warren));
    let mut config: Config = warren.config();
    config.broker.heartbeat = Duration::from_secs(2);
    config.broker.connect_timeout = Duration::from_secs(5);
    config.broker.publish_timeout = DEADLINE;
    let (worker, collector) =
        tokio::join!(impatient(worker).start(), impatient(warren.collector()).start());
    let producer = Producer::connect(&config).await.unwrap();
    works(&producer).await;
    (worker, collector, producer)
}

/// A task goes out, its output comes back, and the collector answers.
async fn works(producer: &Producer) {
    let handle = eventually(COMES_BACK, "a task is taken", async || {
        match producer.submit(echo("hello")).await {
            Ok(handle) => Some(handle),
            Err(error) => {
                assert!(error.is_transient(), "{error:?}");
                None
            }
        }
    });
    let handle = handle.await;
    let id = handle.id().clone();
    assert_eq!(handle.output().within(COMES_BACK, "its output comes").await.unwrap(), "hello");
    eventually(COMES_BACK, "the collector has its result", async || {
        producer.results(std::slice::from_ref(&id)).await.ok()?.pop()
    })
    .await;
}

/// Everything that a producer can ask for fails in its own type, instead of waiting for the broker.
async fn everything_fails_in_time(producer: &Producer) {
    let submit = async {
        let error = producer.submit(echo(1)).await.unwrap_err();
        let named = matches!(error, SubmitError::Unconfirmed { .. } | SubmitError::Broker(_));
        assert!(named && error.is_transient(), "{error:?}");
    };
    let batch = async {
        let error = producer.batch().await.err().expect("no broker, no batch");
        assert!(error.is_transient(), "{error:?}");
    };
    let notices = async {
        let error = producer.notices(NoticeFilter::All).await.err().expect("no broker, no notices");
        assert!(matches!(error, QueryError::Broker(_)), "{error:?}");
    };
    let query = async {
        let error = producer.query_within(Query::Totals, DEADLINE).await.unwrap_err();
        assert!(error.is_transient(), "{error:?}");
    };
    tokio::join!(
        submit.soon("submitting fails"),
        batch.soon("opening a batch fails"),
        notices.soon("listening fails"),
        query.soon("asking fails"),
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_broker_is_an_error_in_time_and_then_a_memory() {
    let node = PrivateNode::take().await;
    let warren = Warren::on(&node.url()).await;
    let (_worker, _collector, producer) = crew(&warren).await;
    node.kill().await;
    everything_fails_in_time(&producer).await;
    // Whoever starts meanwhile waits.
    let mut late = impatient(warren.worker()).spawn();
    late.logged("cannot reach RabbitMQ").await;
    node.start();
    works(&producer).await;
    late.logged(r#""message":"ready""#).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_stops_in_order_is_no_different() {
    let node = PrivateNode::take().await;
    let warren = Warren::on(&node.url()).await;
    let (mut worker, mut collector, producer) = crew(&warren).await;
    let gate = Gate::shut(&warren, "running");
    let running = producer.submit(gate.task()).await.unwrap();
    effects::begun(&warren, 1).await;
    node.stop();
    gate.open();
    everything_fails_in_time(&producer).await;
    node.start();
    let result = running.result().within(COMES_BACK, "what ran meanwhile is told").await.unwrap();
    assert_eq!(result.attempt, 1);
    works(&producer).await;
    node.stop();
    for process in [&mut worker, &mut collector] {
        process.logged("not consuming").await;
        assert!(process.terminate(SOON).await.success(), "stops without a broker");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_broker_is_an_error_in_time_and_then_a_memory() {
    let node = PrivateNode::take().await;
    let warren = Warren::on(&node.url()).await;
    let (mut worker, mut collector, producer) = crew(&warren).await;
    node.freeze();
    everything_fails_in_time(&producer).await;
    // Their connections look open; only the missing heartbeats tell.
    tokio::join!(worker.logged("not consuming"), collector.logged("not consuming"));
    node.thaw();
    works(&producer).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_full_queue_refuses_is_an_error_and_the_rest_is_there() {
    let node = PrivateNode::take().await;
    let warren = Warren::on(&node.url()).await;
    let producer = warren.producer().await;
    let queue = warren.config().broker.topology().task_queue(&QueueName::default());
    let pattern = format!("^{}$", queue.replace('.', "\\."));
    let policy = ["set_policy", "full", &pattern, r#"{"max-length":10}"#, "--apply-to", "queues"];
    let echo = || Submission::dynamic("garenne.echo", 1).unwrap();
    // The first one declares what the policy is for.
    let mut confirmed = vec![producer.submit_detached(echo()).await.unwrap()];
    node.ctl(&policy);
    let refusal = loop {
        match producer.submit_detached(echo()).await {
            Ok(id) => confirmed.push(id),
            Err(error) => break error,
        }
        assert!(confirmed.len() < 10_000, "the queue is full in the end");
    };
    assert!(matches!(refusal, SubmitError::Broker(BrokerError::Rejected(_))), "{refusal:?}");
    node.ctl(&["clear_policy", "full"]);
    let _crew = warren.crew().await;
    soon("what was confirmed ends, and nothing else", async || {
        (producer.totals().await.ok()?.results == confirmed.len() as u64).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn confirmed_tasks_outlive_a_killed_broker() {
    let node = PrivateNode::take().await;
    let warren = Warren::on(&node.url()).await;
    let producer = warren.producer().await;
    let mut ids = vec![];
    for n in 0..50 {
        // Half of them wait in the delay queues.
        let delay = Duration::from_secs(n % 2);
        ids.push(producer.submit_detached(echo(n).delay(delay)).await.unwrap());
    }
    node.kill().await;
    node.start();
    let _crew = warren.crew().await;
    soon("all of them ended", async || {
        let results = producer.results(&ids).await.ok()?;
        (results.len() == ids.len()).then_some(())
    })
    .await;
}

/// How long the broker waits for acknowledgements, on channels opened from now on; looked at every
/// second instead of once a minute.
fn patience(node: &PrivateNode, seconds: u32) {
    let set = |key: &str, millis: u32| {
        node.ctl(&["eval", &format!("application:set_env(rabbit, {key}, {millis}).")]);
    };
    set("consumer_timeout", 1_000 * seconds);
    set("channel_tick_interval", if seconds > 60 { 60_000 } else { 1_000 });
}

#[tokio::test(flavor = "multi_thread")]
async fn deliveries_that_the_broker_takes_back_are_explained_and_survived() {
    let node = PrivateNode::take().await;
    let warren = Warren::on(&node.url()).await;
    patience(&node, 3);
    let (mut worker, _collector, producer) = crew(&warren).await;
    let gate = Gate::shut(&warren, "slow");
    let slow = producer.submit(gate.task()).await.unwrap();
    effects::begun(&warren, 1).await;
    // From 4.3 on the consumer's own limit counts, which is that of broker.consumer_timeout.
    if node.version() < (4, 3) {
        let said = worker.logged("requeued deliveries because").await;
        assert!(
            said.contains("within its consumer timeout of 3s; raise consumer_timeout"),
            "{said}"
        );
    } else {
        time_passes(Duration::from_secs(7)).await;
    }
    gate.open();
    let result = slow.result().within(COMES_BACK, "the slow task ends").await.unwrap();
    assert_eq!(result.attempt, 1);
    patience(&node, 1_800);
    works(&producer).await;
}
