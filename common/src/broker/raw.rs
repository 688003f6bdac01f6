//! lapin alone: the bare client that `garenne bench` compares with.
//!
//! The least that a task system can do on the same broker with the same guarantees: durable quorum
//! queues, persistent messages, confirmed publishes, and a task that is acknowledged after its result is
//! confirmed. There is no task in it, though: nothing is decoded, stored,
//! bundled, retried or rebuilt after a loss, so nothing but a benchmark should use it.

use std::time::{Duration, Instant};

use futures_util::stream::{FuturesOrdered, FuturesUnordered, StreamExt};
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
    ConfirmSelectOptions,
};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Confirmation, Consumer};

use super::convert::short;
use super::{Admin, BrokerError, Link, admin};
use crate::config::BrokerConfig;
use crate::topology::Declaration;
use crate::wire::HeaderValue;

/// How many bytes a message carries if nothing else is asked for.
pub const BODY_BYTES: usize = 100;
/// Publishes under way at once, if their bodies are small.
pub const WINDOW: usize = 1_000;
/// Deliveries unacknowledged at once, if their bodies are small.
pub const PREFETCH: u16 = 500;
/// One acknowledgement settles so many deliveries.
pub const ACK_EVERY: u64 = 50;

/// Bodies under way at once, in bytes: more would fill sockets and buffers and gain nothing.
const BYTES_UNDER_WAY: usize = 8 * 1024 * 1024;

/// The bare client, with two quorum queues of its own in the namespace.
pub struct Raw {
    config: BrokerConfig,
    tasks: String,
    results: String,
    body: Vec<u8>,
}

impl Raw {
    /// Declares the two queues.
    pub async fn prepare(config: &BrokerConfig) -> Result<Self, BrokerError> {
        let name = |what: &str| format!("{}.raw.{what}", config.namespace);
        let body = vec![b'x'; BODY_BYTES];
        let raw =
            Self { config: config.clone(), tasks: name("tasks"), results: name("results"), body };
        let (link, channel) = raw.connect("prepare").await?;
        let declared = admin::declare(&channel, &[quorum(&raw.tasks), quorum(&raw.results)]).await;
        link.close().await;
        declared.map(|()| raw)
    }

    /// The same client and the same queues with bodies of this size, in tasks and in results.
    ///
    /// Large bodies get smaller windows.
    #[must_use]
    pub fn with_body(&self, bytes: usize) -> Self {
        let (config, tasks, results) =
            (self.config.clone(), self.tasks.clone(), self.results.clone());
        Self { config, tasks, results, body: vec![b'x'; bytes] }
    }

    /// Publishes under way at once.
    fn window(&self) -> usize {
        (BYTES_UNDER_WAY / self.body.len().max(1)).clamp(1, WINDOW)
    }

    /// Deliveries unacknowledged at once.
    fn prefetch(&self) -> u16 {
        u16::try_from(self.window()).unwrap_or(u16::MAX).min(PREFETCH)
    }

    /// Deletes the two queues.
    pub async fn remove(self) -> Result<(), BrokerError> {
        let link = Link::new(&self.config, "raw lapin remove");
        let admin = Admin::new(link.clone());
        let removed = async {
            admin.delete(&quorum(&self.tasks)).await?;
            admin.delete(&quorum(&self.results)).await
        };
        let removed = removed.await;
        link.close().await;
        removed
    }

    /// Publishes `count` messages, many at once; the time until the last confirm.
    pub async fn publish(&self, count: u64) -> Result<Duration, BrokerError> {
        let (link, channel) = self.connect("publish").await?;
        let begin = Instant::now();
        let published = self.publish_to(&channel, &self.results, count).await;
        let took = begin.elapsed();
        link.close().await;
        published.map(|()| took)
    }

    /// Takes `count` waiting messages, acknowledged together by [`ACK_EVERY`]; the time that took.
    pub async fn consume(&self, count: u64) -> Result<Duration, BrokerError> {
        let (link, channel) = self.connect("consume").await?;
        let begin = Instant::now();
        let stream = consume(&channel, &self.tasks, self.prefetch()).await?;
        let taken = take(&channel, stream, count).await;
        let took = begin.elapsed();
        link.close().await;
        taken.map(|()| took)
    }

    /// `count` tasks through one queue and one result message for each through the other, with both
    /// ends at work at the same time; from the first publish to the last result in hand.
    pub async fn tasks_with_results(&self, count: u64) -> Result<Duration, BrokerError> {
        let (producer, out) = self.connect("producer").await?;
        let (collector, back) = self.connect("collector").await?;
        let (worker, work) = self.connect("worker").await?;
        let answers = self.confirming(&worker).await?;
        let tasks = consume(&work, &self.tasks, self.prefetch()).await?;
        let results = consume(&back, &self.results, 2 * self.prefetch()).await?;
        let begin = Instant::now();
        let done = tokio::try_join!(
            self.publish_to(&out, &self.results, count),
            self.answer(&work, &answers, tasks, count, ACK_EVERY),
            take(&back, results, count),
        );
        let took = begin.elapsed();
        for link in [producer, collector, worker] {
            link.close().await;
        }
        done.map(|_| took)
    }

    /// One task at a time through the queue and back to an exclusive reply queue; how long each took
    /// until both its confirm and its reply were there. After each there is a pause.
    pub async fn round_trips(
        &self,
        count: u64,
        pause: Duration,
    ) -> Result<Vec<Duration>, BrokerError> {
        let (producer, out) = self.connect("producer").await?;
        let (worker, work) = self.connect("worker").await?;
        let answers = self.confirming(&worker).await?;
        let back = producer.channel().await?;
        let replies = format!("{}.raw.reply.{}", self.config.namespace, uuid::Uuid::now_v7());
        admin::declare(&back, &[Declaration::exclusive_queue(replies.clone())]).await?;
        let tasks = consume(&work, &self.tasks, self.prefetch()).await?;
        let mut results = consume(&back, &replies, PREFETCH).await?;
        let client = async {
            let mut times = vec![];
            for _ in 0..count {
                let begin = Instant::now();
                self.publish_to(&out, &replies, 1).await?;
                let tag = next(&mut results).await?;
                times.push(begin.elapsed());
                ack(&back, tag).await?;
                if !pause.is_zero() {
                    tokio::time::sleep(pause).await;
                }
            }
            Ok(times)
        };
        let done = tokio::try_join!(client, self.answer(&work, &answers, tasks, count, 1));
        for link in [producer, worker] {
            link.close().await;
        }
        done.map(|(times, ())| times)
    }

    async fn connect(&self, what: &str) -> Result<(Link, Channel), BrokerError> {
        let link = Link::new(&self.config, &format!("raw lapin {what}"));
        let channel = self.confirming(&link).await?;
        Ok((link, channel))
    }

    async fn confirming(&self, link: &Link) -> Result<Channel, BrokerError> {
        let channel = link.channel().await?;
        let confirms = channel.confirm_select(ConfirmSelectOptions::default()).await;
        confirms.map_err(|error| BrokerError::operating(&error, "confirm mode"))?;
        Ok(channel)
    }

    /// Publishes into the task queue, as many at once as the window holds.
    async fn publish_to(
        &self,
        channel: &Channel,
        reply_to: &str,
        count: u64,
    ) -> Result<(), BrokerError> {
        let mut confirms = FuturesUnordered::new();
        for _ in 0..count {
            if confirms.len() >= self.window()
                && let Some(confirm) = confirms.next().await
            {
                confirm?;
            }
            confirms.push(publish_one(channel, &self.tasks, reply_to, &self.body));
        }
        while let Some(confirm) = confirms.next().await {
            confirm?;
        }
        Ok(())
    }

    /// The worker's half: a confirmed result for each task, then its acknowledgement.
    async fn answer(
        &self,
        work: &Channel,
        answers: &Channel,
        mut tasks: Consumer,
        count: u64,
        ack_every: u64,
    ) -> Result<(), BrokerError> {
        let (mut settled, mut unacked) = (0, 0);
        // In order, so that one acknowledgement can settle all deliveries before it.
        let mut under_way = FuturesOrdered::new();
        while settled < count {
            tokio::select! {
                biased;
                Some(confirmed) = under_way.next() => {
                    let tag = confirmed?;
                    settled += 1;
                    unacked += 1;
                    if unacked >= ack_every || under_way.is_empty() {
                        ack(work, tag).await?;
                        unacked = 0;
                    }
                }
                task = tasks.next() => {
                    let task = delivery(task)?;
                    under_way.push_back(async move {
                        let to = task.properties.reply_to().as_ref().map_or("", |to| to.as_str());
                        publish_one(answers, to, "", &self.body).await.map(|()| task.delivery_tag)
                    });
                }
            }
        }
        Ok(())
    }
}

fn quorum(name: &str) -> Declaration {
    let kind = HeaderValue::Text("quorum".to_owned());
    Declaration::Queue {
        name: name.to_owned(),
        exclusive: false,
        arguments: vec![("x-queue-type", kind)],
    }
}

async fn publish_one(
    channel: &Channel,
    queue: &str,
    reply_to: &str,
    body: &[u8],
) -> Result<(), BrokerError> {
    let properties =
        BasicProperties::default().with_delivery_mode(2).with_reply_to(short(reply_to)?);
    let options = BasicPublishOptions::default();
    let lost = |error| BrokerError::operating(&error, queue);
    let publish = channel.basic_publish("".into(), short(queue)?, options, body, properties);
    match publish.await.map_err(lost)?.await.map_err(lost)? {
        Confirmation::Ack(_) => Ok(()),
        Confirmation::Nack(_) | Confirmation::NotRequested => {
            Err(BrokerError::Rejected(queue.to_owned()))
        }
    }
}

async fn consume(channel: &Channel, queue: &str, prefetch: u16) -> Result<Consumer, BrokerError> {
    let lost = |error| BrokerError::operating(&error, queue);
    channel.basic_qos(prefetch, BasicQosOptions { global: false }).await.map_err(lost)?;
    let options = BasicConsumeOptions::default();
    let stream = channel.basic_consume(short(queue)?, "".into(), options, FieldTable::default());
    stream.await.map_err(lost)
}

async fn take(channel: &Channel, mut stream: Consumer, count: u64) -> Result<(), BrokerError> {
    for taken in 1..=count {
        let tag = next(&mut stream).await?;
        if taken % ACK_EVERY == 0 || taken == count {
            ack(channel, tag).await?;
        }
    }
    Ok(())
}

async fn next(stream: &mut Consumer) -> Result<u64, BrokerError> {
    delivery(stream.next().await).map(|delivery| delivery.delivery_tag)
}

fn delivery(
    item: Option<lapin::Result<lapin::message::Delivery>>,
) -> Result<lapin::message::Delivery, BrokerError> {
    match item {
        Some(delivery) => delivery.map_err(|error| BrokerError::operating(&error, "a consumer")),
        None => Err(BrokerError::Lost("the broker ended the consumer".to_owned())),
    }
}

async fn ack(channel: &Channel, tag: u64) -> Result<(), BrokerError> {
    let acked = channel.basic_ack(tag, BasicAckOptions { multiple: true }).await;
    acked.map(drop).map_err(|error| BrokerError::operating(&error, "an acknowledgement"))
}
