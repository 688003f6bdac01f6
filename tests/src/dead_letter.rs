//! A task that is given up is kept whole with its reason, and it ends in a final record (promise 3), by
//! whichever path it got there.

use std::collections::BTreeSet;
use std::time::Duration;

use garenne_common::wire::TaskState;
use garenne_common::{BatchId, DeadReason, QueueName, Status, TaskId, Timestamp};
use garenne_producer::{Producer, Submission};
use serde_json::json;

use crate::harness::{Soon, Warren, message, soon};

async fn ended(producer: &Producer, id: &str) -> garenne_common::TaskResult {
    let id = TaskId::new(id).unwrap();
    soon("the collector has a final record", async || {
        match producer.task_state(&id).await.unwrap() {
            TaskState::Finished { result } => Some(result),
            TaskState::Unknown => None,
            other => panic!("{other:?}"),
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_queue_wants_ends_as_unrouted() {
    let warren = Warren::new().await;
    let _collector = warren.collector().start().await;
    let (amqp, producer) = tokio::join!(warren.amqp(), warren.producer());
    let tasks = warren.config().broker.topology().tasks_exchange();
    amqp.publish(&tasks, "no-such-queue", message("garenne.echo", "t-1", &json!("whole"))).await;
    let result = ended(&producer, "t-1").await;
    assert_eq!((result.status, result.reason), (Status::Failed, Some(DeadReason::Unrouted)));
    let letter = producer.dead(&result.id).await.unwrap().unwrap();
    let args = letter.args.map(|args| args.to_json_value());
    assert_eq!((letter.queue.as_str(), args), ("no-such-queue", Some(json!("whole"))));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_broker_itself_gives_up_ends_too() {
    let warren = Warren::new().await;
    let _collector = warren.collector().start().await;
    let (amqp, producer) = tokio::join!(warren.amqp(), warren.producer());
    // AMQP's own expiration in a queue that nobody serves: the worker never hears of it.
    let mut task = message("garenne.echo", "t-1", &json!(1));
    task.properties.expiration = Some("50".to_owned());
    amqp.task(task).await;
    let result = ended(&producer, "t-1").await;
    assert_eq!((result.reason, result.attempt), (Some(DeadReason::Expired), 0));
    assert_eq!(&*result.worker, "rabbitmq");
}

#[tokio::test(flavor = "multi_thread")]
async fn delayed_tasks_wait_for_an_exchange_that_is_gone() {
    const TASKS: usize = 20;
    let warren = Warren::new().await;
    let (amqp, producer) = tokio::join!(warren.amqp(), warren.producer());
    let mut results = amqp.results().await;
    let delay = Duration::from_secs(2);
    for n in 0..TASKS {
        let task = Submission::dynamic("garenne.echo", n).unwrap().delay(delay);
        producer.submit_detached(task).await.unwrap();
    }
    let topology = warren.config().broker.topology();
    let all = topology.core();
    let tasks = all.iter().find(|object| object.name() == topology.tasks_exchange()).unwrap();
    amqp.admin.delete(tasks).await.unwrap();
    let due = Timestamp::now().plus(delay + Duration::from_millis(500));
    soon("they are due", async || (Timestamp::now() > due).then_some(())).await;
    // It declares what is missing.
    let _worker = warren.worker().start().await;
    let mut ended = BTreeSet::new();
    while ended.len() < TASKS {
        let what = format!("{} of {TASKS} have come through", ended.len());
        ended.insert(results.result().soon(&what).await.id);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_that_nobody_knows_is_parked_and_not_ended() {
    let warren = Warren::new().await;
    let _crew = warren.crew().await;
    let (amqp, producer) = tokio::join!(warren.amqp(), warren.producer());
    amqp.task(message("not.yet.deployed", "t-1", &json!(1))).await;
    let id = TaskId::new("t-1").unwrap();
    let letter = soon("it is parked", async || match producer.task_state(&id).await.unwrap() {
        TaskState::Parked { letter } => Some(letter),
        TaskState::Unknown => None,
        other => panic!("{other:?}"),
    });
    assert_eq!(letter.await.reason, DeadReason::UnknownTask);
    assert!(producer.results(&[id]).await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_mistake_is_found_by_the_command_line() {
    let warren = Warren::new().await;
    let _crew = warren.crew().await;
    let amqp = warren.amqp().await;
    let mut broken = message("text.count_words", "t-1", &json!(null));
    broken.body = "{\"text\": \"a".into();
    amqp.task(broken).await;
    let letters = soon("the letter is listed", async || {
        let listed = warren.garenne(&["dead", "list", "--output", "json"]).await;
        let letters = listed.json().as_array().unwrap().clone();
        (!letters.is_empty()).then_some(letters)
    });
    let letters = letters.await;
    let [letter] = &letters[..] else { panic!("{letters:?}") };
    assert_eq!(letter["reason"], "malformed");
    assert!(letter["error"].as_str().unwrap().contains("not JSON"), "{letter}");
    let shown = warren.garenne(&["dead", "show", "t-1"]).await.ok();
    assert!(shown.contains("malformed") && shown.contains("text.count_words"), "{shown}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_member_is_counted_by_its_batch() {
    let warren = Warren::new().await;
    let _crew = warren.crew().await;
    let (amqp, producer) = tokio::join!(warren.amqp(), warren.producer());
    let mut broken = message("garenne.echo", "t-1", &json!(1));
    broken.body = "{".into();
    let batch = garenne_common::wire::HeaderValue::Text("b-1".to_owned());
    broken.set_header("x-garenne-batch", batch);
    amqp.task(broken).await;
    ended(&producer, "t-1").await;
    let batch = producer.batch_status(&BatchId::new("b-1").unwrap()).await.unwrap().unwrap();
    assert_eq!(batch.summary.failed, 1);
    assert_eq!(batch.failures[0].reason, Some(DeadReason::Malformed));
    assert_eq!(batch.failures[0].queue, QueueName::default());
}
