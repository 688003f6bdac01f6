//! Unknown and newer tasks (P21): a task that no worker of its queue knows is parked, visible, and goes
//! back under its own id when a worker that knows it is alive; never lost, and never in a hot loop.

use std::time::Duration;

use futures_util::StreamExt;
use garenne_common::wire::heartbeat::HEARTBEAT_KIND;
use garenne_common::wire::{CancelState, Heartbeat, TaskState};
use garenne_common::{Status, TaskId};
use garenne_producer::{Handle, Producer, Submission};
use serde_json::{Value, json};

use crate::harness::effects::{self, Gate, HELD};
use crate::harness::{Soon, Warren, message, soon};

/// A command task that older workers do not know.
const NEWER: &str = r#"
[worker.commands."new.hello"]
argv = ["printf", "hello"]
output = "text"
"#;

async fn submit(producer: &Producer) -> Handle<Value> {
    producer.submit(Submission::dynamic("new.hello", json!({})).unwrap()).await.unwrap()
}

async fn parked(producer: &Producer, id: &TaskId) {
    soon("the task is parked", async || {
        let state = producer.task_state(id).await.unwrap();
        matches!(state, TaskState::Parked { .. }).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parked_task_runs_under_its_own_id_when_a_worker_appears_that_knows_it() {
    let warren = Warren::new().await;
    let (older, _collector) = warren.crew().await;
    let producer = warren.producer().await;
    let handle = submit(&producer).await;
    let id = handle.id().clone();
    parked(&producer, &id).await;
    let shown = warren.garenne(&["task", "show", id.as_str()]).await.ok();
    assert!(shown.contains("a worker of the queue default that knows new.hello"), "{shown}");
    older.kill().await;
    let _newer = warren.worker().toml(NEWER).start().await;
    let result = handle.result().soon("it runs").await.unwrap();
    assert_eq!((result.id, result.status, result.attempt), (id, Status::Succeeded, 1));
    let none: Vec<i64> = vec![];
    soon("nothing is left behind", async || {
        let left: Vec<i64> = warren.rows("SELECT 1 FROM parked UNION ALL SELECT 1 FROM resends");
        (left == none).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parked_task_survives_the_collector_while_it_goes_back() {
    let warren = Warren::new().await;
    let (older, collector) = warren.crew().await;
    let producer = warren.producer().await;
    let mut handles = vec![];
    for _ in 0..20 {
        handles.push(submit(&producer).await);
    }
    for handle in &handles {
        parked(&producer, handle.id()).await;
    }
    older.kill().await;
    let _newer = warren.worker().toml(NEWER).set("worker.heartbeat", "200ms").start().await;
    // At whatever moment of the release this comes.
    collector.kill().await;
    let _collector = warren.collector().start().await;
    for handle in handles {
        let result = handle.result().soon("it runs").await.unwrap();
        assert_eq!(result.status, Status::Succeeded, "{result:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn in_a_mixed_fleet_tasks_find_their_worker_without_a_hot_loop() {
    let warren = Warren::new().await;
    let _collector = warren.collector().start().await;
    let _newer = warren.worker().toml(NEWER).start().await;
    let _older = warren.worker().start().await;
    let producer = warren.producer().await;
    let mut handles = vec![];
    for _ in 0..30 {
        handles.push(submit(&producer).await);
    }
    let mut most = 0;
    for handle in handles {
        let patience = Duration::from_mins(4);
        let result = handle.result().within(patience, "it finds its worker").await.unwrap();
        assert_eq!((result.status, result.attempt), (Status::Succeeded, 1), "{result:?}");
        let releases = warren.rows::<i64>("SELECT COALESCE(MAX(releases), 0) FROM parked");
        most = most.max(releases[0]);
    }
    // Half of all tries go wrong, and each time the wait doubles: 2, 4, 8, 16, 32 s.
    assert!(most <= 7, "{most} releases of one task");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_parked_task_ends_at_once_and_its_producer_hears_of_it() {
    let warren = Warren::new().await;
    let (_older, _collector) = warren.crew().await;
    let producer = warren.producer().await;
    let handle = submit(&producer).await;
    parked(&producer, handle.id()).await;
    let answer = producer.cancel(handle.id()).await.unwrap();
    assert_eq!(answer.state, CancelState::Cancelled);
    let result = handle.result().soon("it ends").await.unwrap();
    assert_eq!((result.status, result.attempt), (Status::Cancelled, 0), "{result:?}");
    assert!(result.worker.starts_with("garenne-collector"), "{result:?}");

    let batch = producer.batch().await.unwrap();
    for _ in 0..3 {
        let id =
            batch.submit_detached(Submission::<Value>::dynamic("new.hello", json!({})).unwrap());
        parked(&producer, &id.await.unwrap()).await;
    }
    producer.cancel_batch(batch.id(), None).await.unwrap();
    let sealed = batch.seal().await.unwrap();
    let summary = sealed.wait().soon("the batch ends").await.unwrap();
    assert_eq!((summary.cancelled, summary.total), (3, Some(3)));
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_say_what_they_serve_and_that_they_drain() {
    let warren = Warren::new().await;
    let mut heartbeats = warren.amqp().await.heartbeats().await;
    let worker = warren.worker().toml(&effects::command(&warren)).arg("--name=w");
    let worker = worker.set("worker.heartbeat", "300ms").start().await;
    let beat = heartbeats.next().await;
    assert_eq!(beat.properties.kind.as_deref(), Some(HEARTBEAT_KIND));
    let first = Heartbeat::decode(&beat).unwrap();
    assert_eq!((first.worker.as_str(), first.concurrency, first.draining), ("w", 4, false));
    assert!(first.tasks.iter().any(|task| task.as_str() == "text.count_words"), "{first:?}");
    let amqp = warren.amqp().await;
    let gate = Gate::shut(&warren, "task");
    amqp.task(message(HELD, "t-1", &gate.args())).await;
    let mut until = async |what: &str, wanted: fn(&Heartbeat) -> bool| {
        soon(what, async || {
            wanted(&Heartbeat::decode(&heartbeats.next().await).unwrap()).then_some(())
        })
        .await;
    };
    until("it says that it runs a task", |beat| beat.running == 1).await;
    worker.signal(nix::sys::signal::Signal::SIGTERM);
    until("it says that it drains", |beat| beat.draining && beat.running == 1).await;
    gate.open();
}

/// More invented workers than the collector keeps, each of which says that it is heard of every 49 days.
#[tokio::test(flavor = "multi_thread")]
async fn invented_workers_keep_no_real_one_from_being_known() {
    let warren = Warren::new().await;
    let (older, _collector) = warren.crew().await;
    let producer = warren.producer().await;
    let handle = submit(&producer).await;
    parked(&producer, handle.id()).await;
    older.kill().await;
    let amqp = warren.amqp().await;
    let exchange = warren.config().broker.topology().heartbeats();
    let invented = |number: u32| Heartbeat {
        worker: format!("invented-{number}"),
        version: String::new(),
        queues: vec![],
        tasks: vec![],
        concurrency: 1,
        running: 0,
        stuck_handlers: 0,
        draining: false,
        problems: vec![],
        every_ms: u32::MAX,
        at: garenne_common::Timestamp::from_millis(0),
    };
    let publishing =
        (0..11_000).map(|number| amqp.publish(&exchange, "", invented(number).encode()));
    futures_util::stream::iter(publishing).buffer_unordered(200).collect::<()>().await;
    let _newer = warren.worker().toml(NEWER).start().await;
    let result = handle.result().soon("it runs").await.unwrap();
    assert_eq!(result.status, Status::Succeeded);
}
