//! A lost connection does not repeat work on the same worker, and a lost worker does not lose any
//! (promises 1, 2 and 7).

use std::time::Duration;

use garenne_producer::{Producer, Submission};
use serde_json::json;

use crate::harness::effects::{self, Gate, HELD};
use crate::harness::{Amqp, Process, Proxy, SOON, Sends, Soon, Warren, message, soon};

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_line_while_a_task_runs_does_not_run_it_twice() {
    let warren = Warren::new().await;
    let line = Proxy::to(warren.url()).await;
    let mut worker =
        warren.worker().url(&line.url(warren.url())).toml(&effects::command(&warren)).start().await;
    let producer = warren.producer().await;
    let gate = Gate::shut(&warren, "task");
    let handle = producer.submit(gate.task()).await.unwrap();
    effects::begun(&warren, 1).await;
    line.cut();
    worker.logged("redelivery of a running task").await;
    gate.open();
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
    let worker =
        warren.worker().url(&line.url(warren.url())).toml(&toml).set("worker.concurrency", 6);
    let (_worker, _collector) = tokio::join!(worker.start(), warren.collector().start());
    let producer = warren.producer().await;
    let batch = producer.batch().await.unwrap();
    for _ in 0..TASKS {
        let task = Submission::dynamic("test.effect", json!({ "millis": 20 })).unwrap();
        batch.submit_detached(task).await.unwrap();
    }
    let sealed = batch.seal().await.unwrap();
    for part in 1..=4_usize {
        effects::begun(&warren, part * TASKS as usize / 6).await;
        line.cut();
    }
    let summary = sealed.wait().within(Duration::from_mins(3), "all have ended").await.unwrap();
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
    let worker = warren.worker().url(&url).set("worker.concurrency", 1).set("log.filter", "debug");
    let worker = worker.start().await;
    let amqp = warren.amqp().await;
    // Results go nowhere from here on, while acknowledgements would still arrive.
    line.hold(Sends::To("results"));
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

/// A worker with one slot on this line, which runs `t-1` and has begun; and what holds that.
async fn at_work(warren: &Warren, line: &Proxy, amqp: &Amqp) -> (Process, Gate) {
    let worker = warren.worker().url(&line.url(warren.url())).toml(&effects::command(warren));
    let worker = worker.set("worker.concurrency", 1).start().await;
    let gate = Gate::shut(warren, "t-1");
    amqp.task(message(HELD, "t-1", &gate.args())).await;
    effects::begun(warren, 1).await;
    (worker, gate)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_result_that_was_lost_on_its_way_is_sent_again() {
    let warren = Warren::new().await;
    let line = Proxy::to(warren.url()).await;
    let amqp = warren.amqp().await;
    let mut results = amqp.results().await;
    let (_worker, gate) = at_work(&warren, &line, &amqp).await;
    line.hold(Sends::To("results"));
    gate.open();
    line.caught().await;
    line.cut();
    assert_eq!(results.result().soon("it is sent again").await.id.as_str(), "t-1");
    assert_eq!(effects::done(&warren), ["t-1 1"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_acknowledgement_that_was_lost_costs_no_second_run() {
    let warren = Warren::new().await;
    let line = Proxy::to(warren.url()).await;
    let amqp = warren.amqp().await;
    let mut results = amqp.results().await;
    let (mut worker, gate) = at_work(&warren, &line, &amqp).await;
    line.hold(Sends::Acknowledgements);
    gate.open();
    results.result().soon("its result is sent").await;
    line.caught().await;
    line.cut();
    worker.logged("consuming again").await;
    // It comes behind the other one, which has been looked at when this one ends.
    amqp.task(message("test.effect", "t-2", &json!({ "millis": 50 }))).await;
    assert_eq!(results.result().soon("the next one ends").await.id.as_str(), "t-2");
    // What would run again has begun and is done by then, or is handed back.
    worker.terminate(SOON).await;
    assert_eq!(effects::done(&warren), ["t-1 1", "t-2 1"]);
    assert_eq!(amqp.waiting().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_acknowledgement_of_an_old_connection_settles_nothing_of_the_next_one() {
    let warren = Warren::new().await;
    let line = Proxy::to(warren.url()).await;
    let toml = effects::command(&warren);
    let worker = |concurrency: usize| {
        warren
            .worker()
            .toml(&toml)
            .set("worker.concurrency", concurrency)
            .set("worker.prefetch", concurrency)
    };
    let runs = async |id: &str, count: usize| {
        let ran = || effects::done(&warren).iter().filter(|done| done.starts_with(id)).count();
        let what = format!("{id} runs, {count} times in all");
        soon(&what, async || (ran() == count).then_some(())).await;
    };
    let first = worker(2).url(&line.url(warren.url())).arg("--name=first").start().await;
    let amqp = warren.amqp().await;
    let mut results = amqp.results().await;
    let gate = Gate::shut(&warren, "t-1");
    amqp.task(message(HELD, "t-1", &gate.args())).await;
    runs("t-1", 1).await;
    let _second = worker(1).arg("--name=second").start().await;
    line.cut();
    // The second one is idle, the first not even connected. Then the second one has no room left, so
    // the next task is the first delivery of the first one's new connection, as `t-1` was of its old.
    runs("t-1", 2).await;
    amqp.task(message(HELD, "t-2", &Gate::shut(&warren, "t-2").args())).await;
    runs("t-2", 1).await;
    // Only the first one has room for `t-3`, and it acknowledges `t-1` before, or believes so.
    gate.open_for(1);
    for id in ["t-1", "t-3"] {
        let result = results.result().soon("it ends").await;
        assert_eq!((result.id.as_str(), &*result.worker), (id, "first"));
        if id == "t-1" {
            amqp.task(message("garenne.echo", "t-3", &json!(3))).await;
        }
    }
    first.kill().await;
    gate.open();
    let result = results.result().soon("the other execution ends").await;
    assert_eq!((result.id.as_str(), &*result.worker), ("t-1", "second"));
    runs("t-2", 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_without_an_id_keeps_the_one_it_got_when_its_worker_is_killed() {
    let warren = Warren::new().await;
    let toml = effects::command(&warren);
    let first = warren.worker().toml(&toml).start().await;
    let amqp = warren.amqp().await;
    let gate = Gate::shut(&warren, "task");
    let mut task = message(HELD, "", &gate.args());
    task.properties.message_id = None;
    amqp.task(task).await;
    effects::begun(&warren, 1).await;
    first.kill().await;
    gate.open();
    let _second = warren.worker().toml(&toml).start().await;
    let result = amqp.results().await.result().soon("it ends elsewhere").await;
    let run = format!("{} 1", result.id);
    assert_eq!(effects::done(&warren), [run.clone(), run]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_worker_s_task_runs_elsewhere_and_costs_no_attempt() {
    let warren = Warren::new().await;
    let toml = effects::command(&warren);
    let worker = |name: &str| warren.worker().toml(&toml).arg("--name").arg(name);
    let first = worker("first").start().await;
    let producer = warren.producer().await;
    let gate = Gate::shut(&warren, "task");
    let handle = producer.submit(gate.task()).await.unwrap();
    effects::begun(&warren, 1).await;
    first.kill().await;
    gate.open();
    let _second = worker("second").start().await;
    let result = handle.result().soon("it ends elsewhere").await.unwrap();
    assert_eq!((&*result.worker, result.attempt, result.redelivered), ("second", 1, true));
    assert_eq!(effects::done(&warren).len(), 2, "at least once: the effect happened twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_reply_is_made_up_for_by_the_collector() {
    let warren = Warren::new().await;
    let line = Proxy::to(warren.url()).await;
    let worker = warren.worker().toml(&effects::command(&warren));
    let _crew = tokio::join!(worker.start(), warren.collector().start());
    let mut config = warren.config();
    let url = line.url(warren.url());
    config.broker.urls = vec![garenne_common::config::BrokerUrl::parse(&url).unwrap()];
    let producer = Producer::connect(&config).await.unwrap();
    let gate = Gate::shut(&warren, "task");
    let handle = producer.submit(gate.task()).await.unwrap();
    // The reply queue is exclusive: it is gone with this connection.
    line.sever().await;
    gate.open();
    let result = handle.result().within(Duration::from_mins(2), "the result arrives nevertheless");
    assert_eq!(result.await.unwrap().output.unwrap().to_json_value(), "done");
}
