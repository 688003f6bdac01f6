//! lapin alone: the bare client that `garenne bench` compares with.
//!
//! The least that a task system can do on the same broker with the same guarantees: durable quorum
//! queues, persistent messages, confirmed publishes, and a task that is acknowledged after its result is
//! confirmed. There is no task in it, though: nothing is decoded, stored,
//! bundled, retried or rebuilt after a loss, so nothing but a benchmark should use it.

use std::time::{Duration, Instant};

use futures_util::stream::{FuturesOrdered, FuturesUnordered, StreamExt};
use garenne_cli::error::CliError;
use garenne_common::config::BrokerConfig;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions,
    ConfirmSelectOptions, QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::uri::AMQPUri;
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties, Consumer};

type Result<T> = std::result::Result<T, CliError>;

/// How many bytes a message carries if nothing else is asked for.
pub(crate) const BODY_BYTES: usize = 100;
/// Publishes under way at once, if their bodies are small.
pub(crate) const WINDOW: usize = 1_000;
/// Deliveries unacknowledged at once, if their bodies are small.
pub(crate) const PREFETCH: u16 = 500;
/// One acknowledgement settles so many deliveries.
pub(crate) const ACK_EVERY: u64 = 50;

/// Bodies under way at once, in bytes: more would fill sockets and buffers and gain nothing.
const BYTES_UNDER_WAY: usize = 8 * 1024 * 1024;

/// The bare client, with two quorum queues of its own in the namespace.
pub(crate) struct Bare {
    config: BrokerConfig,
    tasks: String,
    results: String,
    body: Vec<u8>,
}

impl Bare {
    /// Declares the two queues.
    pub(crate) async fn prepare(config: &BrokerConfig) -> Result<Self> {
        let name = |what: &str| format!("{}.bare.{what}", config.namespace);
        let body = vec![b'x'; BODY_BYTES];
        let bare =
            Self { config: config.clone(), tasks: name("tasks"), results: name("results"), body };
        let (connection, channel) = bare.connect("prepare").await?;
        for queue in [&bare.tasks, &bare.results] {
            let mut arguments = FieldTable::default();
            arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
            let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
            let declared = channel.queue_declare(queue.as_str().into(), options, arguments);
            declared.await.map_err(failed)?;
        }
        close(connection).await;
        Ok(bare)
    }

    /// The same client and the same queues with bodies of this size, in tasks and in results.
    ///
    /// Large bodies get smaller windows.
    #[must_use]
    pub(crate) fn with_body(&self, bytes: usize) -> Self {
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
    pub(crate) async fn remove(self) -> Result<()> {
        let (connection, channel) = self.connect("remove").await?;
        for queue in [&self.tasks, &self.results] {
            let deleted =
                channel.queue_delete(queue.as_str().into(), QueueDeleteOptions::default());
            deleted.await.map_err(failed)?;
        }
        close(connection).await;
        Ok(())
    }

    /// Publishes `count` messages, many at once; the time until the last confirm.
    pub(crate) async fn publish(&self, count: u64) -> Result<Duration> {
        let (connection, channel) = self.connect("publish").await?;
        let begin = Instant::now();
        let published = self.publish_to(&channel, &self.results, count).await;
        let took = begin.elapsed();
        close(connection).await;
        published.map(|()| took)
    }

    /// Takes `count` waiting messages, acknowledged together by [`ACK_EVERY`]; the time that took.
    pub(crate) async fn consume(&self, count: u64) -> Result<Duration> {
        let (connection, channel) = self.connect("consume").await?;
        let begin = Instant::now();
        let stream = consume(&channel, &self.tasks, self.prefetch()).await?;
        let taken = take(&channel, stream, count).await;
        let took = begin.elapsed();
        close(connection).await;
        taken.map(|()| took)
    }

    /// `count` tasks through one queue and one result message for each through the other, with both
    /// ends at work at the same time; from the first publish to the last result in hand.
    pub(crate) async fn tasks_with_results(&self, count: u64) -> Result<Duration> {
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
        for connection in [producer, collector, worker] {
            close(connection).await;
        }
        done.map(|_| took)
    }

    /// One task at a time through the queue and back to an exclusive reply queue; how long each took
    /// until both its confirm and its reply were there. After each there is a pause.
    pub(crate) async fn round_trips(&self, count: u64, pause: Duration) -> Result<Vec<Duration>> {
        let (producer, out) = self.connect("producer").await?;
        let (worker, work) = self.connect("worker").await?;
        let answers = self.confirming(&worker).await?;
        let back = producer.create_channel().await.map_err(failed)?;
        let options = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
        // The broker names it.
        let replies = back.queue_declare("".into(), options, FieldTable::default()).await;
        let replies = replies.map_err(failed)?.name().to_string();
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
        for connection in [producer, worker] {
            close(connection).await;
        }
        done.map(|(times, ())| times)
    }

    async fn connect(&self, what: &str) -> Result<(Connection, Channel)> {
        let url = self.config.urls.first();
        let url = url.ok_or_else(|| CliError::unusable("no broker URL is configured"))?;
        let mut uri: AMQPUri = url.expose().parse().map_err(CliError::unusable)?;
        // As in `Link`: its parser takes an IPv6 address for no host at all.
        let (host, _) = url.address();
        if host.contains(':') {
            uri.authority.host = host;
        }
        let properties =
            ConnectionProperties::default().with_connection_name(format!("bare {what}").into());
        let connection = Connection::connect_uri(uri, properties).await.map_err(failed)?;
        let channel = self.confirming(&connection).await?;
        Ok((connection, channel))
    }

    async fn confirming(&self, connection: &Connection) -> Result<Channel> {
        let channel = connection.create_channel().await.map_err(failed)?;
        channel.confirm_select(ConfirmSelectOptions::default()).await.map_err(failed)?;
        Ok(channel)
    }

    /// Publishes into the task queue, as many at once as the window holds.
    async fn publish_to(&self, channel: &Channel, reply_to: &str, count: u64) -> Result<()> {
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
    ) -> Result<()> {
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

#[expect(clippy::needless_pass_by_value, reason = "as `map_err` hands it over")]
fn failed(error: lapin::Error) -> CliError {
    CliError::unusable(format!("the bare client failed: {error}"))
}

async fn close(connection: Connection) {
    if let Err(error) = connection.close(200, "bye".into()).await {
        tracing::debug!(%error, "the bare client did not close in order");
    }
}

async fn publish_one(channel: &Channel, queue: &str, reply_to: &str, body: &[u8]) -> Result<()> {
    let properties =
        BasicProperties::default().with_delivery_mode(2).with_reply_to(reply_to.into());
    let options = BasicPublishOptions::default();
    let publish = channel.basic_publish("".into(), queue.into(), options, body, properties);
    match publish.await.map_err(failed)?.await.map_err(failed)? {
        Confirmation::Ack(_) => Ok(()),
        Confirmation::Nack(_) | Confirmation::NotRequested => {
            Err(CliError::unusable(format!("the broker refused a message to {queue}")))
        }
    }
}

async fn consume(channel: &Channel, queue: &str, prefetch: u16) -> Result<Consumer> {
    channel.basic_qos(prefetch, BasicQosOptions { global: false }).await.map_err(failed)?;
    let options = BasicConsumeOptions::default();
    let stream = channel.basic_consume(queue.into(), "".into(), options, FieldTable::default());
    stream.await.map_err(failed)
}

async fn take(channel: &Channel, mut stream: Consumer, count: u64) -> Result<()> {
    for taken in 1..=count {
        let tag = next(&mut stream).await?;
        if taken % ACK_EVERY == 0 || taken == count {
            ack(channel, tag).await?;
        }
    }
    Ok(())
}

async fn next(stream: &mut Consumer) -> Result<u64> {
    delivery(stream.next().await).map(|delivery| delivery.delivery_tag)
}

fn delivery(
    item: Option<lapin::Result<lapin::message::Delivery>>,
) -> Result<lapin::message::Delivery> {
    match item {
        Some(delivery) => delivery.map_err(failed),
        None => Err(CliError::unusable("the broker ended the bare client's consumer")),
    }
}

async fn ack(channel: &Channel, tag: u64) -> Result<()> {
    let acked = channel.basic_ack(tag, BasicAckOptions { multiple: true }).await;
    acked.map(drop).map_err(failed)
}
