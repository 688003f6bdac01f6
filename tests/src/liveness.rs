//! Something always goes on, and what stands still is reported (promise 10): failing tasks whose
//! producer waits, little room at every publisher, and a worker that cannot settle.

use std::collections::HashSet;
use std::time::Duration;

use garenne_common::wire::{CollectorHeartbeat, Heartbeat, ReplayPlan};
use garenne_common::{QueueName, RetryPolicy};
use garenne_producer::Submission;
use garenne_worker::Worker;
use serde_json::json;

use crate::harness::{PrivateNode, SilentQueue, Soon, Tap, Warren, eventually, soon};

const PATIENCE: Duration = Duration::from_mins(1);
/// Tasks of one run: more than every queue inside a worker holds.
const TASKS: usize = 2_000;

/// Maps `TASKS` lines through `garenne.fail`; how many rows came, and the exit code.
async fn map_failures(warren: &Warren, line: &str) -> (usize, Option<i32>) {
    let input = format!("{line}\n").repeat(TASKS);
    let ended = warren.garenne_reading(&input, &["map", "garenne.fail"]).await;
    (ended.stdout.lines().count(), ended.code)
}

#[tokio::test(flavor = "multi_thread")]
async fn failing_tasks_that_a_producer_waits_for_end() {
    // Little room, and as much as is usual: what stands still without it needs more concurrency.
    for (window, concurrency) in [(8, 4), (512, 8)] {
        let warren = Warren::new().await;
        let worker = warren.worker().set("broker.publish_window", window);
        let worker = worker.set("worker.concurrency", concurrency);
        let (_worker, _collector) = tokio::join!(worker.start(), warren.collector().start());
        assert_eq!(map_failures(&warren, r#"{"fatal":true}"#).await, (TASKS, Some(1)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn retried_tasks_end_with_room_for_one_message() {
    let warren = Warren::new().await;
    let worker = warren.worker().set("broker.publish_window", 1);
    let (_worker, _collector) = tokio::join!(worker.start(), warren.collector().start());
    assert_eq!(map_failures(&warren, r#"{"times":1}"#).await, (TASKS, Some(0)));
}

/// The next heartbeat that has a problem of this kind.
async fn problem(heartbeats: &mut Tap, code: &str) -> String {
    eventually(PATIENCE, &format!("a heartbeat tells of {code}"), async || {
        let heartbeat = Heartbeat::decode(&heartbeats.next().await).ok()?;
        let problem = heartbeat.problems.into_iter().find(|problem| problem.code == code)?;
        Some(problem.detail)
    })
    .await
}

async fn doctor_names(warren: &Warren, arguments: &[&str], problem: &str) {
    let ended = warren.garenne(&[&["doctor"], arguments].concat()).await;
    assert_eq!(ended.code, Some(1), "{ended:#?}");
    assert!(ended.stdout.contains(problem), "{ended:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_whose_results_are_refused_says_so_and_recovers() {
    let node = PrivateNode::take().await;
    let warren = Warren::on(&node.url()).await;
    let mut heartbeats = warren.amqp().await.heartbeats().await;
    let _worker = warren.worker().start().await;
    let results = warren.config().broker.topology().results();
    let (pattern, policy) = (format!("^{results}$"), format!("full-{results}"));
    let refuse = r#"{"max-length":1,"overflow":"reject-publish"}"#;
    node.ctl(&["set_policy", &policy, &pattern, refuse, "--apply-to", "queues"]);
    // RabbitMQ lets some pass beyond the limit, so there are many.
    let producer = warren.producer().await;
    let words = || Submission::dynamic("text.count_words", json!({ "text": "a" })).unwrap();
    let outcomes = producer.submit_many_detached((0..200).map(|_| words())).await;
    assert!(outcomes.iter().all(Result::is_ok), "tasks are taken");
    let detail = problem(&mut heartbeats, "settling_stalled").await;
    assert!(detail.contains("not settled"), "{detail}");
    doctor_names(&warren, &["--queue", "default"], "settling_stalled").await;
    node.ctl(&["clear_policy", &policy]);
    eventually(PATIENCE, "the worker is healthy again", async || {
        let heartbeat = Heartbeat::decode(&heartbeats.next().await).ok()?;
        heartbeat.problems.is_empty().then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_may_not_publish_is_unhealthy_until_it_may() {
    let node = PrivateNode::take().await;
    let warren = Warren::on(&node.url()).await;
    let running = warren.work(Worker::builder(warren.config())).await;
    warren.garenne(&["submit", "text.count_words", r#"{"text":"a"}"#]).await.ok();
    soon("the first task is settled", async || (running.running_tasks() == 0).then_some(())).await;
    let codes = || running.problems().into_iter().map(|problem| problem.code).collect::<Vec<_>>();
    assert_eq!(codes(), Vec::<String>::new());
    node.alarm();
    let told = async || codes().contains(&"not_publishing".to_owned()).then_some(());
    eventually(PATIENCE, "the worker is unhealthy", told).await;
    node.calm();
    eventually(PATIENCE, "it is healthy again", async || codes().is_empty().then_some(())).await;
    running.drain().await;
}

/// Letters of a queue that will be full: three slices of the outbox.
const REFUSED: usize = 600;

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_does_not_keep_tasks_of_others_from_going_back() {
    let node = PrivateNode::take().await;
    let warren = Warren::on(&node.url()).await;
    let collector = warren.collector().start().await;
    let worker = warren.worker().queues("full,free").start().await;
    let producer = warren.producer().await;
    let fatal = |queue| {
        let task = Submission::dynamic("garenne.fail", json!({ "fatal": true }));
        task.unwrap().retry_policy(RetryPolicy::NONE).queue(queue).unwrap()
    };
    let tasks = (0..REFUSED).map(|_| fatal("full")).chain([fatal("free")]);
    let handles = producer.submit_many(tasks.collect::<Vec<_>>()).await;
    let mut ids = vec![];
    for handle in handles {
        ids.push(handle.unwrap().result().within(PATIENCE, "it fails").await.unwrap().id);
    }
    let mut heartbeats = warren.amqp().await.heartbeats().await;
    let all = (REFUSED + 1) as u64;
    eventually(PATIENCE, "all letters are stored", async || {
        (producer.totals().await.ok()?.dead == all).then_some(())
    })
    .await;
    worker.kill().await;
    let queue = warren.config().broker.topology().task_queue(&QueueName::new("full").unwrap());
    let refuse = r#"{"max-length":1,"overflow":"reject-publish"}"#;
    node.ctl(&["set_policy", &queue, &format!("^{queue}$"), refuse, "--apply-to", "queues"]);
    let plan = ReplayPlan::default();
    producer.replay(&ids, &plan).within(PATIENCE, "all are marked").await.unwrap();
    let free = warren.worker().queues("free").start().await;
    eventually(PATIENCE, "the task of the other queue runs again", async || {
        (producer.totals().await.ok()?.results > all).then_some(())
    })
    .await;
    let left = warren.rows::<u32>("SELECT count(*) FROM resends")[0];
    assert!(left >= 200, "a whole slice was refused, or this shows nothing: {left}");
    eventually(PATIENCE, "the collector says that they do not go", async || {
        let beat = CollectorHeartbeat::decode(&heartbeats.next().await).ok()?;
        beat.problems.iter().any(|problem| problem.code == "outbox_stalled").then_some(())
    })
    .await;
    doctor_names(&warren, &["--queue", "free"], "outbox_stalled").await;
    node.ctl(&["clear_policy", &queue]);
    eventually(PATIENCE, "the rest goes back when there is room", async || {
        (warren.rows::<u32>("SELECT count(*) FROM resends")[0] == 0).then_some(())
    })
    .await;
    drop((collector, free));
}

/// Tasks whose notices go to a queue that does not answer: more than RabbitMQ takes over a connection
/// meanwhile.
const UNANSWERED: usize = 700;

#[tokio::test(flavor = "multi_thread")]
async fn a_queue_of_notices_that_does_not_answer_stops_notices_only() {
    let node = PrivateNode::take().await;
    let warren = Warren::on(&node.url()).await;
    let collector = warren.collector().set("collector.task_notices", true);
    let mut collector = collector.set("broker.publish_timeout", "5s").start().await;
    let _worker = warren.worker().queues("default,other").start().await;
    let amqp = warren.amqp().await;
    let keeper = warren.config().broker.topology().notice_keeper();
    amqp.admin.declare(&keeper).await.unwrap();
    let (mut notices, mut heartbeats) = (amqp.notices().await, amqp.heartbeats().await);
    let silent = SilentQueue::new(&node, keeper[0].name());
    let producer = warren.producer().await;
    let fatal = Submission::dynamic("garenne.fail", json!({ "fatal": true })).unwrap();
    let fatal = fatal.retry_policy(RetryPolicy::NONE).queue("other").unwrap();
    let failed = producer.submit(fatal).await.unwrap();
    let letter = failed.id().clone();
    failed.result().within(PATIENCE, "it fails").await.unwrap();
    let words = || Submission::dynamic("text.count_words", json!({ "text": "a" })).unwrap();
    let outcomes = producer.submit_many_detached((0..UNANSWERED).map(|_| words())).await;
    assert!(outcomes.iter().all(Result::is_ok), "tasks are taken");
    let all = (UNANSWERED + 1) as u64;
    eventually(PATIENCE, "all results are stored", async || {
        (producer.totals().await.ok()?.results == all).then_some(())
    })
    .await;
    let plan = ReplayPlan::default();
    producer.replay(&[letter], &plan).within(PATIENCE, "an answer").await.unwrap();
    eventually(PATIENCE, "the task that was sent back has run again", async || {
        (producer.totals().await.ok()?.results > all).then_some(())
    })
    .await;
    eventually(PATIENCE, "the collector says that notices wait", async || {
        let beat = CollectorHeartbeat::decode(&heartbeats.next().await).ok()?;
        beat.problems.iter().any(|problem| problem.code == "outbox_stalled").then_some(())
    })
    .await;
    doctor_names(&warren, &[], "outbox_stalled").await;
    collector.logged("RabbitMQ does not confirm a message").await;
    drop(silent);
    let every_task = async {
        let mut told = HashSet::new();
        while told.len() as u64 <= all {
            told.insert(notices.next().await.properties.message_id);
        }
    };
    every_task.within(PATIENCE, "all notices are published").await;
}
