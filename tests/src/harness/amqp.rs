//! Plain messages to and from the broker, below all Garenne clients, through common's broker layer.
//!
//! For tests that say things which no Garenne client would say, and that look into queues which a
//! collector would otherwise empty.

use std::collections::VecDeque;

use garenne_common::broker::{
    Admin, Consumer, ConsumerSpec, Delivery, Link, Outgoing, Publisher, QueueSource,
};
use garenne_common::config::Config;
use garenne_common::topology::Topology;
use garenne_common::wire::{DeadLetter, Message, Properties, Report, report};
use garenne_common::{TaskId, TaskResult};

use super::Soon;

/// Publishes and looks.
pub(crate) struct Amqp {
    topology: Topology,
    publisher: Publisher,
    link: Link,
    pub(crate) admin: Admin,
}

/// Empties a queue, message by message.
pub(crate) struct Tap {
    name: String,
    consumer: Consumer,
    /// Results that came in one bundle with the last one given out.
    more: VecDeque<TaskResult>,
}

impl Amqp {
    /// Connects, and declares what every Garenne process declares.
    pub(crate) async fn connect(config: &Config) -> Self {
        let topology = config.broker.topology();
        let link = Link::new(&config.broker, "garenne-tests");
        let admin = Admin::new(link.clone());
        admin
            .declare(&topology.core())
            .soon("the topology is declared")
            .await
            .expect("no conflict");
        let publisher = Publisher::start(
            Link::new(&config.broker, "garenne-tests publish"),
            vec![],
            &config.broker,
        );
        Self { topology, publisher, link, admin }
    }

    /// Publishes, confirmed.
    pub(crate) async fn publish(&self, exchange: &str, routing_key: &str, message: Message) {
        let (exchange, routing_key) = (exchange.to_owned(), routing_key.to_owned());
        let published = self.publisher.publish(Outgoing { exchange, routing_key, message });
        published.await.expect("the broker takes the message");
    }

    /// Publishes a task to the queue `default`.
    pub(crate) async fn task(&self, message: Message) {
        self.publish(&self.topology.tasks_exchange(), "default", message).await;
    }

    /// Publishes reports as a worker would.
    pub(crate) async fn reports(&self, reports: &[Report]) {
        let results = self.topology.results();
        let bundle = report::encode(reports, "garenne-tests").expect("plain data encodes");
        self.publish(&results, &results, bundle).await;
    }

    /// Takes what arrives in the results queue.
    pub(crate) async fn results(&self) -> Tap {
        self.tap(&self.topology.results()).await
    }

    /// Takes what arrives in the dead-letter queue.
    pub(crate) async fn dead(&self) -> Tap {
        self.tap(&self.topology.dead()).await
    }

    /// Takes what arrives in any queue.
    pub(crate) async fn tap(&self, queue: &str) -> Tap {
        self.tap_of(QueueSource::Named(queue.to_owned())).await
    }

    /// Takes notices from now on.
    pub(crate) async fn notices(&self) -> Tap {
        self.events((self.topology.notices_exchange(), "#".to_owned())).await
    }

    /// A reply queue of its own, and what arrives there.
    pub(crate) async fn reply_queue(&self) -> Tap {
        let topology = self.topology.clone();
        let name = Box::new(move || topology.reply_queue("tests"));
        self.tap_of(QueueSource::Exclusive { name, bindings: vec![] }).await
    }

    /// Takes heartbeats from now on.
    pub(crate) async fn heartbeats(&self) -> Tap {
        self.events((self.topology.heartbeats(), String::new())).await
    }

    async fn events(&self, binding: (String, String)) -> Tap {
        let (topology, bindings) = (self.topology.clone(), vec![binding]);
        let name = Box::new(move || topology.reply_queue("tests"));
        self.tap_of(QueueSource::Exclusive { name, bindings }).await
    }

    async fn tap_of(&self, queue: QueueSource) -> Tap {
        let spec = ConsumerSpec {
            declarations: vec![],
            queue,
            prefetch: 100,
            tag: format!("garenne-tests {}", TaskId::generate()),
            no_ack: false,
        };
        let consumer = Consumer::start(self.link.clone(), spec);
        let name = consumer.ready().soon("the tap is consuming").await.expect("the queue exists");
        Tap { name, consumer, more: VecDeque::new() }
    }

    /// How many messages wait in the queue `default`.
    pub(crate) async fn waiting(&self) -> u32 {
        self.depth(&self.topology.task_queue(&garenne_common::QueueName::default())).await
    }

    /// How many messages were put aside that no library can parse.
    pub(crate) async fn unreadable(&self) -> u32 {
        self.depth(&self.topology.unreadable()).await
    }

    async fn depth(&self, queue: &str) -> u32 {
        self.admin.depth(queue).await.expect("the broker answers").expect("the queue exists")
    }
}

impl Tap {
    /// The queue.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The next message, settled.
    pub(crate) async fn next(&mut self) -> Message {
        let what = format!("a message arrives in {}", self.name);
        let delivery = self.consumer.next().soon(&what).await.expect("the tap is open");
        self.settle(delivery)
    }

    fn settle(&self, delivery: Delivery) -> Message {
        // A lost acknowledgement brings the message again, which a test would notice.
        self.consumer.settler().ack(delivery.tag, false);
        delivery.message
    }

    /// The next dead letter.
    pub(crate) async fn letter(&mut self) -> DeadLetter {
        DeadLetter::decode(&self.next().await)
    }

    /// The reports of the next bundle.
    pub(crate) async fn reports(&mut self) -> Vec<Report> {
        report::decode(&self.next().await).expect("workers write sound bundles")
    }

    /// The next final result; retry notes before it are dropped.
    pub(crate) async fn result(&mut self) -> TaskResult {
        loop {
            if let Some(result) = self.more.pop_front() {
                return result;
            }
            let reports = self.reports().await.into_iter();
            self.more.extend(reports.filter_map(|report| match report {
                Report::Finished(result) | Report::FinishedUnderLease { result, .. } => {
                    Some(result)
                }
                Report::Retrying(_)
                | Report::BatchOpened { .. }
                | Report::BatchSealed { .. }
                | Report::Conflict { .. }
                | Report::Lease(_) => None,
            }));
        }
    }
}

/// A task as a foreign client writes it: a name, an id and a JSON body.
pub(crate) fn message(name: &str, id: &str, body: &serde_json::Value) -> Message {
    let properties = Properties {
        kind: Some(name.to_owned()),
        message_id: Some(id.to_owned()),
        content_type: Some("application/json".to_owned()),
        ..Properties::default()
    };
    Message { properties, headers: vec![], body: body.to_string().into_bytes().into() }
}
