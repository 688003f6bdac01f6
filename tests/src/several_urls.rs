//! Connections find another way: past dead addresses, off a line that fell silent, and away from a
//! broker that answers and delivers nothing (promise 7).

use std::time::Duration;

use garenne_common::broker::Health;
use garenne_common::config::{BrokerUrl, Config};
use garenne_producer::{Producer, Submission};
use garenne_worker::Worker;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::harness::{Proxy, Soon, Warren, eventually, soon};

const HEARTBEAT: Duration = Duration::from_secs(2);
const COMES_BACK: Duration = Duration::from_mins(2);

fn echo(args: impl serde::Serialize) -> Submission<Value> {
    Submission::dynamic("garenne.echo", args).unwrap()
}

fn urls(urls: &[String]) -> Vec<BrokerUrl> {
    urls.iter().map(|url| BrokerUrl::parse(url).unwrap()).collect()
}

/// A port that nobody listens on.
async fn dead(url: &str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (login, rest) = url.split_once('@').unwrap();
    let vhost = rest.split_once('/').unwrap().1;
    format!("{login}@{}/{vhost}", listener.local_addr().unwrap())
}

fn impatient(mut config: Config) -> Config {
    config.broker.heartbeat = HEARTBEAT;
    config.broker.connect_timeout = Duration::from_secs(10);
    config
}

/// A task goes out and its output comes back, whatever is lost meanwhile.
async fn works(producer: &Producer) {
    let handle = eventually(COMES_BACK, "a task is taken", async || {
        producer.submit(echo("hello")).await.ok()
    });
    let output = handle.await.output().within(COMES_BACK, "its output comes").await;
    assert_eq!(output.unwrap(), "hello");
}

#[tokio::test(flavor = "multi_thread")]
async fn any_url_that_answers_will_do() {
    let warren = Warren::new().await;
    let (left, right) = tokio::join!(Proxy::to(warren.url()), Proxy::to(warren.url()));
    let ways = [dead(warren.url()).await, left.url(warren.url()), right.url(warren.url())];
    let mut config = impatient(warren.config());
    config.broker.urls = urls(&ways);
    let list = ways.join(",");
    let (_worker, _collector) =
        tokio::join!(warren.worker().url(&list).start(), warren.collector().url(&list).start());
    let producer = Producer::connect(&config).soon("one of them answers").await.unwrap();
    works(&producer).await;
    for (lost, other) in [(&left, &right), (&right, &left)] {
        lost.down(true);
        works(&producer).await;
        assert!(other.accepted() > 0, "the other way was taken");
        lost.down(false);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_connection_is_noticed_and_left() {
    let warren = Warren::new().await;
    let line = Proxy::to(warren.url()).await;
    let mut config = impatient(warren.config());
    config.broker.urls = urls(&[line.url(warren.url())]);
    let _collector =
        warren.collector().url(&line.url(warren.url())).set("broker.heartbeat", "2s").start().await;
    let worker = warren.work(Worker::builder(config.clone())).await;
    let producer = Producer::connect(&config).soon("the producer connects").await.unwrap();
    works(&producer).await;
    line.silence();
    eventually(COMES_BACK, "the worker notices", async || {
        worker.health().iter().any(|(_, health)| !health.is_flowing()).then_some(())
    })
    .await;
    works(&producer).await;
    worker.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_answers_and_delivers_nothing_is_noticed() {
    let warren = Warren::new().await;
    let line = Proxy::to(warren.url()).await;
    let mut config = impatient(warren.config());
    config.broker.heartbeat = Duration::from_secs(1);
    config.broker.urls = urls(&[line.url(warren.url())]);
    (config.worker.concurrency, config.worker.prefetch) = (2, 2);
    let worker = warren.work(Worker::builder(config)).await;
    let producer = warren.producer().await;
    line.mute_deliveries(true);
    let mut handles = vec![];
    for n in 0..10 {
        handles.push(producer.submit(echo(n)).await.unwrap());
    }
    let down = soon("the watchdog notices", async || {
        let (_, health) = worker.health().pop()?;
        matches!(health, Health::Down(Some(_))).then_some(health)
    });
    let down = format!("{:?}", down.await);
    assert!(down.contains("messages wait in the queue and none comes"), "{down}");
    line.mute_deliveries(false);
    for (n, handle) in handles.into_iter().enumerate() {
        assert_eq!(handle.output().within(COMES_BACK, "a result").await.unwrap(), json!(n));
    }
    worker.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_went_astray_on_its_way_to_an_idle_worker_runs() {
    let warren = Warren::new().await;
    let line = Proxy::to(warren.url()).await;
    let mut config = impatient(warren.config());
    config.broker.heartbeat = Duration::from_secs(1);
    config.broker.consumer_timeout = Duration::from_secs(12);
    config.worker.task_timeout = Duration::from_secs(5);
    config.broker.urls = urls(&[line.url(warren.url())]);
    let worker = warren.work(Worker::builder(config)).await;
    let producer = warren.producer().await;
    line.mute_deliveries(true);
    let handle = producer.submit(echo(1)).await.unwrap();
    line.caught().await;
    line.mute_deliveries(false);
    // Nothing waits in the queue, so nothing looks wrong to anybody.
    let result = handle.result().within(COMES_BACK, "it runs").await.unwrap();
    assert!(result.redelivered, "it had been delivered before");
    worker.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_or_a_busy_worker_is_not_suspected() {
    let warren = Warren::new().await;
    let mut config = impatient(warren.config());
    (config.worker.concurrency, config.worker.prefetch) = (2, 2);
    let line = Proxy::to(warren.url()).await;
    config.broker.urls = urls(&[line.url(warren.url())]);
    let worker = warren.work(Worker::builder(config)).await;
    let producer = warren.producer().await;
    let mut handles = vec![];
    for _ in 0..6 {
        let sleep = Submission::dynamic("garenne.sleep", json!({ "millis": 5_000 })).unwrap();
        handles.push(producer.submit(sleep).await.unwrap());
    }
    for handle in handles {
        let result = handle.result().within(COMES_BACK, "it ends").await.unwrap();
        assert!(!result.redelivered, "it was not taken away");
    }
    assert_eq!(line.accepted(), 2, "one connection publishes, one consumes, and both stayed");
    worker.drain().await;
}
