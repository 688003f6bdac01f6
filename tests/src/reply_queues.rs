//! Nobody makes a worker or collector publish to a queue that is no reply queue; the task runs anyway.

use garenne_common::wire::{HeaderValue, Message};
use serde_json::json;

use crate::harness::{Amqp, Warren, message, soon};

/// A queue of somebody else's application, and one of another namespace.
async fn foreign_queues(warren: &Warren, amqp: &Amqp) -> [String; 2] {
    let queues = [format!("orders-{}", warren.config().broker.namespace), other(warren)];
    for queue in &queues {
        let declaration = garenne_common::topology::Declaration::Queue {
            name: queue.clone(),
            exclusive: false,
            arguments: vec![("x-queue-type", HeaderValue::Text("quorum".to_owned()))],
        };
        amqp.admin.declare(&[declaration]).await.unwrap();
    }
    queues
}

fn other(warren: &Warren) -> String {
    format!("other-{}.results", warren.config().broker.namespace)
}

async fn delete(amqp: &Amqp, queues: &[String]) {
    for name in queues {
        let name = name.clone();
        let queue = garenne_common::topology::Declaration::Queue {
            name,
            exclusive: false,
            arguments: vec![],
        };
        amqp.admin.delete(&queue).await.unwrap();
    }
}

fn replying_to(queue: &str, mut message: Message) -> Message {
    message.properties.reply_to = Some(queue.to_owned());
    message
}

#[tokio::test(flavor = "multi_thread")]
async fn replies_retries_and_dead_letters_go_to_reply_queues_only() {
    let warren = Warren::new().await;
    let mut worker = warren.worker().start().await;
    let amqp = warren.amqp().await;
    let queues = foreign_queues(&warren, &amqp).await;
    let (mut results, mut dead) = (amqp.results().await, amqp.dead().await);
    for (n, queue) in queues.iter().enumerate() {
        let echo = message("garenne.echo", &format!("echo-{n}"), &json!(1));
        amqp.task(replying_to(queue, echo)).await;
        assert_eq!(results.result().await.id.as_str(), format!("echo-{n}"));
        let fail = message("garenne.fail", &format!("fail-{n}"), &json!({ "fatal": true }));
        amqp.task(replying_to(queue, fail)).await;
        assert_eq!(dead.letter().await.id.as_str(), format!("fail-{n}"));
        worker.logged(queue).await;
    }
    // What the worker publishes later is there: what came before it would be, too.
    let reply_queue = amqp.reply_queue().await;
    let last = message("garenne.echo", "last", &json!(1));
    amqp.task(replying_to(reply_queue.name(), last)).await;
    let mut reply_queue = reply_queue;
    assert_eq!(reply_queue.next().await.properties.message_id.as_deref(), Some("last"));
    for queue in &queues {
        assert_eq!(amqp.admin.depth(queue).await.unwrap(), Some(0), "{queue}");
    }
    delete(&amqp, &queues).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_answers_reply_queues_only() {
    let warren = Warren::new().await;
    let mut collector = warren.collector().start().await;
    let amqp = warren.amqp().await;
    let queues = foreign_queues(&warren, &amqp).await;
    let topology = warren.config().broker.topology();
    let query = |correlation: &str| {
        let mut query = Message { body: r#"{"query":"totals"}"#.into(), ..Message::default() };
        query.properties.correlation_id = Some(correlation.to_owned());
        query
    };
    for queue in &queues {
        amqp.publish("", &topology.queries(), replying_to(queue, query("bad"))).await;
        collector.logged(queue).await;
        let lost = message("garenne.echo", &format!("lost-{queue}"), &json!(1));
        amqp.publish(&topology.tasks_exchange(), "no-such-queue", replying_to(queue, lost)).await;
    }
    soon("the unrouted tasks are counted", async || {
        (warren.rows::<u32>("SELECT count(*) FROM results") == [2]).then_some(())
    })
    .await;
    let mut reply_queue = amqp.reply_queue().await;
    let good = replying_to(reply_queue.name(), query("good"));
    amqp.publish("", &topology.queries(), good).await;
    assert_eq!(reply_queue.next().await.properties.correlation_id.as_deref(), Some("good"));
    for queue in &queues {
        assert_eq!(amqp.admin.depth(queue).await.unwrap(), Some(0), "{queue}");
    }
    delete(&amqp, &queues).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_configuration_allows_queues_by_name() {
    let warren = Warren::new().await;
    let amqp = warren.amqp().await;
    let queues = foreign_queues(&warren, &amqp).await;
    let _worker = warren.worker().set("worker.reply_queues", "orders-*").start().await;
    let echo = message("garenne.echo", "echo", &json!(1));
    amqp.task(replying_to(&queues[0], echo)).await;
    let mut orders = amqp.tap(&queues[0]).await;
    assert_eq!(orders.next().await.properties.message_id.as_deref(), Some("echo"));
    delete(&amqp, &queues).await;
}

/// RabbitMQ closes a channel that publishes with this `reply_to` and does not consume from it.
#[tokio::test(flavor = "multi_thread")]
async fn direct_reply_to_inside_a_bundle_ends_no_channel() {
    let warren = Warren::new().await;
    let amqp = warren.amqp().await;
    let queue = garenne_common::QueueName::default();
    let tasks = ["a", "b"].map(|id| {
        let fail = message("garenne.fail", id, &json!({ "fatal": true }));
        let task = replying_to("amq.rabbitmq.reply-to", fail);
        garenne_common::wire::task::decode(&task, &queue).unwrap().unwrap()
    });
    let mut dead = amqp.dead().await;
    let bundle = garenne_common::wire::bundle::encode(&tasks, "tests").unwrap();
    amqp.task(bundle).await;
    let mut worker = warren.worker().start().await;
    let mut ids = vec![dead.letter().await.id.to_string(), dead.letter().await.id.to_string()];
    ids.sort();
    assert_eq!(ids, ["a", "b"]);
    worker.logged("ignoring reply_to").await;
}
