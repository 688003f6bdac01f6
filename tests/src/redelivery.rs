//! A lost connection does not repeat work on the same worker, and a lost worker does not lose any
//! (promises 1, 2 and 7).

use std::time::Duration;

use garenne_common::RetryPolicy;
use garenne_producer::{Producer, Submission};
use serde_json::json;

use crate::harness::{Proxy, Soon, Warren, effects, message, soon};

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_line_while_a_task_runs_does_not_run_it_twice() {
    let warren = Warren::new().await;
    let line = Proxy::to(warren.url()).await;
    let mut worker =
        warren.worker().url(&line.url(warren.url())).toml(&effects::command(&warren)).start().await;
    let producer = warren.producer().await;
    let task = Submission::dynamic("test.effect", json!({ "millis": 1_500 })).unwrap();
    let handle = producer.submit(task).await.unwrap();
    soon("the task runs", async || (effects::done(&warren).len() == 1).then_some(())).await;
    line.cut();
    worker.logged("adopted a redelivery").await;
    let result = handle.result().soon("its result arrives").await.unwrap();
    assert_eq!(result.attempt, 1);
    assert_eq!(effects::done(&warren), [format!("{} 1", result.id)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_cuts_in_a_stream_of_tasks_lose_and_repeat_nothing() {
    const TASKS: u32 = 300;
    let warren = Warren::new().await;
    let line = Proxy::to(warren.url()).await;
    let toml = effects::command(&warren);
    let worker = warren.worker().url(&line.url(warren.url())).toml(&toml).set("worker.slots", 6);
    let (_worker, _collector) = tokio::join!(worker.start(), warren.collector().start());
    let producer = warren.producer().await;
    let batch = producer.batch().await.unwrap();
    for _ in 0..TASKS {
        let task = Submission::dynamic("test.effect", json!({ "millis": 20 })).unwrap();
        batch.submit_detached(task).await.unwrap();
    }
    let sealed = batch.seal().await.unwrap();
    for part in 1..=4_usize {
        let enough = part * TASKS as usize / 6;
        soon("work goes on", async || (effects::done(&warren).len() >= enough).then_some(())).await;
        line.cut();
    }
    let summary = sealed.wait().within(Duration::from_mins(1), "all have ended").await.unwrap();
    assert_eq!((summary.total, summary.succeeded), (Some(TASKS.into()), TASKS.into()));
    let mut done = effects::done(&warren);
    done.sort_unstable();
    done.dedup();
    assert_eq!(done.len(), TASKS as usize);
    assert_eq!(effects::done(&warren).len(), done.len(), "the same worker runs nothing twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_is_acknowledged_only_after_its_result_is_confirmed() {
    let warren = Warren::new().await;
    let line = Proxy::to(warren.url()).await;
    let url = line.url(warren.url());
    let worker = warren.worker().url(&url).set("worker.slots", 1).set("log.filter", "debug");
    let worker = worker.start().await;
    let amqp = warren.amqp().await;
    // Results go nowhere from here on, while acknowledgements would still arrive.
    line.hold_publishing();
    for id in ["t-1", "t-2"] {
        amqp.task(message("garenne.echo", id, &json!(id))).await;
    }
    // One slot: when the second has run, the first was settled as far as it can be.
    soon("both have run", async || {
        (worker.stderr().matches(r#""message":"succeeded""#).count() == 2).then_some(())
    })
    .await;
    worker.kill().await;
    let _second = warren.worker().start().await;
    let mut results = amqp.results().await;
    let mut ended = vec![];
    while ended.len() < 2 {
        let result = results.result().soon("both run again").await;
        assert!(result.redelivered, "{result:?}");
        ended.push(result.id.to_string());
    }
    ended.sort_unstable();
    assert_eq!(ended, ["t-1", "t-2"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_worker_s_task_runs_elsewhere_and_costs_no_attempt() {
    let warren = Warren::new().await;
    let toml = effects::command(&warren);
    let worker = |name: &str| warren.worker().toml(&toml).arg("--name").arg(name);
    let first = worker("first").start().await;
    let producer = warren.producer().await;
    let task = Submission::dynamic("test.effect", json!({ "millis": 2_000 })).unwrap();
    let handle = producer.submit(task.retry_policy(RetryPolicy::NONE)).await.unwrap();
    soon("the task runs", async || (effects::done(&warren).len() == 1).then_some(())).await;
    first.kill().await;
    let _second = worker("second").start().await;
    let result = handle.result().soon("it ends elsewhere").await.unwrap();
    assert_eq!((result.worker.as_str(), result.attempt, result.redelivered), ("second", 1, true));
    assert_eq!(effects::done(&warren).len(), 2, "at least once: the effect happened twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_reply_is_made_up_for_by_the_collector() {
    let warren = Warren::new().await;
    let line = Proxy::to(warren.url()).await;
    let _crew = warren.crew().await;
    let mut config = warren.config();
    let url = line.url(warren.url());
    config.broker.urls = vec![garenne_common::config::BrokerUrl::parse(&url).unwrap()];
    let producer = Producer::connect(&config).await.unwrap();
    let task = Submission::dynamic("garenne.sleep", json!({ "millis": 500 })).unwrap();
    let handle = producer.submit(task).await.unwrap();
    // The reply queue is exclusive: it is gone with this connection.
    line.cut();
    let result = handle.result().within(Duration::from_secs(30), "the result arrives nevertheless");
    assert_eq!(result.await.unwrap().output.unwrap().to_json_value()["slept_millis"], 500);
}
