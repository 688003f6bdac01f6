//! Consuming over epochs: a stream of deliveries that outlives channels and connections.
//!
//! When a channel ends, the broker takes back every delivery of it that was not acknowledged. So each
//! rebuilt channel is a new epoch, and a [`Settler`] that is asked to settle a delivery of an older one
//! does nothing: the delivery comes again by itself.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use lapin::Channel;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions,
};
use lapin::types::FieldTable;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::convert::{from_properties, short};
use super::link::Pause;
use super::{BrokerError, Link, admin};
use crate::topology::Declaration;
use crate::wire::Message;

/// How often a quiet consumer looks whether its channel still stands.
const HEALTH_CHECK: Duration = Duration::from_secs(2);

/// An epoch that lasted so long was a success.
const STABLE: Duration = Duration::from_secs(2);

/// What to consume.
pub struct ConsumerSpec {
    /// Declared on every new channel, before consuming.
    pub declarations: Vec<Declaration>,
    /// From which queue.
    pub queue: QueueSource,
    /// How many deliveries may be unsettled at once. Quorum queues take at most 2,000 as such.
    pub prefetch: u16,
    /// The consumer tag that the management UI shows.
    pub tag: String,
    /// Whether the broker may forget deliveries at once; for events and replies.
    pub no_ack: bool,
}

/// Which queue a consumer reads.
pub enum QueueSource {
    /// A durable one.
    Named(String),
    /// An exclusive one, under a new name in every epoch, with bindings (exchange, routing key).
    ///
    /// A new name, because the broker may still hold the old one for the dead connection.
    Exclusive {
        /// Makes the names.
        name: Box<dyn Fn() -> String + Send + Sync>,
        /// What to bind it to.
        bindings: Vec<(String, String)>,
    },
}

/// One delivery of a message.
#[derive(Debug)]
pub struct Delivery {
    /// What to settle it by.
    pub tag: DeliveryTag,
    /// The routing key it was published with.
    pub routing_key: String,
    /// Whether the broker has delivered it before, to anybody.
    pub redelivered: bool,
    /// The message.
    pub message: Message,
}

/// A delivery's number within its epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeliveryTag {
    /// Which channel, counted from 1.
    pub epoch: u64,
    /// Which delivery of it, counted from 1.
    pub number: u64,
}

/// The stream of deliveries, and the hold on the task behind it.
pub struct Consumer {
    deliveries: mpsc::Receiver<Delivery>,
    shared: Arc<Shared>,
}

/// Tells the broker what became of deliveries. Clones settle for the same consumer.
#[derive(Clone)]
pub struct Settler(Arc<Shared>);

struct Shared {
    link: Link,
    /// The channel of the present epoch.
    current: Mutex<(u64, Option<Channel>)>,
    queue: watch::Sender<Option<String>>,
    trouble: watch::Sender<Option<BrokerError>>,
    stop: CancellationToken,
    task: TaskTracker,
}

impl Consumer {
    /// Starts consuming; connects, and reconnects, on its own.
    pub fn start(link: Link, spec: ConsumerSpec) -> Self {
        let (to_owner, deliveries) = mpsc::channel(usize::from(spec.prefetch).max(1));
        let shared = Arc::new(Shared {
            link,
            current: Mutex::new((0, None)),
            queue: watch::Sender::new(None),
            trouble: watch::Sender::new(None),
            stop: CancellationToken::new(),
            task: TaskTracker::new(),
        });
        let task = ConsumeTask { shared: Arc::clone(&shared), spec, to_owner };
        shared.task.spawn(task.run());
        shared.task.close();
        Self { deliveries, shared }
    }

    /// The next delivery; `None` after [`stop`](Self::stop) once all that was on its way has come.
    pub async fn next(&mut self) -> Option<Delivery> {
        self.deliveries.recv().await
    }

    /// The next delivery, if one is here already.
    pub fn try_next(&mut self) -> Option<Delivery> {
        self.deliveries.try_recv().ok()
    }

    /// The hand that settles.
    pub fn settler(&self) -> Settler {
        Settler(Arc::clone(&self.shared))
    }

    /// The queue consumed at present; `None` while there is no consumer.
    pub fn queue(&self) -> watch::Receiver<Option<String>> {
        self.shared.queue.subscribe()
    }

    /// Waits until the broker has registered the consumer, or until a reason is known why that cannot
    /// be without a change by a person.
    pub async fn ready(&self) -> Result<String, BrokerError> {
        let (mut queue, mut trouble) = (self.queue(), self.shared.trouble.subscribe());
        loop {
            if let Some(name) = queue.borrow_and_update().clone() {
                return Ok(name);
            }
            let known = trouble.borrow_and_update().clone();
            if let Some(error) = known.filter(|error| !error.is_transient()) {
                return Err(error);
            }
            tokio::select! {
                changed = queue.changed() => if changed.is_err() { return Err(BrokerError::Closed); },
                changed = trouble.changed() => if changed.is_err() { return Err(BrokerError::Closed); },
            }
        }
    }

    /// Whether [`stop`](Self::stop) was called.
    pub fn is_stopping(&self) -> bool {
        self.shared.stop.is_cancelled()
    }

    /// Tells the broker to send no more. Deliveries on their way still come; all can be settled.
    pub fn stop(&self) {
        self.shared.stop.cancel();
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        self.shared.stop.cancel();
    }
}

impl Settler {
    /// Acknowledges one delivery, or with `multiple` also all earlier ones of its epoch.
    ///
    /// `false` when its channel is gone: the delivery will come again.
    pub async fn ack(&self, tag: DeliveryTag, multiple: bool) -> bool {
        let Some(channel) = self.0.channel_of(tag.epoch) else { return false };
        channel.basic_ack(tag.number, BasicAckOptions { multiple }).await.is_ok()
    }

    /// Hands one delivery back, to be delivered again to anybody.
    pub async fn requeue(&self, tag: DeliveryTag) -> bool {
        let Some(channel) = self.0.channel_of(tag.epoch) else { return false };
        let options = BasicNackOptions { multiple: false, requeue: true };
        channel.basic_nack(tag.number, options).await.is_ok()
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, (u64, Option<Channel>)> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn channel_of(&self, epoch: u64) -> Option<Channel> {
        let current = self.lock();
        current.1.as_ref().filter(|_| current.0 == epoch).cloned()
    }
}

struct ConsumeTask {
    shared: Arc<Shared>,
    spec: ConsumerSpec,
    to_owner: mpsc::Sender<Delivery>,
}

impl ConsumeTask {
    async fn run(self) {
        let mut pause = Pause::new();
        while !self.shared.stop.is_cancelled() {
            let lost = match self.establish().await {
                Ok((epoch, channel, stream)) => {
                    let begun = Instant::now();
                    let lost = self.forward(epoch, &channel, stream).await;
                    // What ends every epoch at once would make a hot loop if the pause did not grow.
                    if begun.elapsed() >= STABLE {
                        pause.reset();
                    }
                    if self.shared.stop.is_cancelled() {
                        // The channel stays: what was delivered may still be settled.
                        return;
                    }
                    lost
                }
                Err(error) => error,
            };
            self.mark_lost(&lost);
            if self.shared.link.is_closed() {
                return;
            }
            let pause = tokio::time::sleep(pause.next());
            tokio::select! {
                () = pause => {}
                () = self.shared.stop.cancelled() => {}
            }
        }
    }

    fn mark_lost(&self, lost: &BrokerError) {
        self.shared.lock().1 = None;
        self.shared.queue.send_replace(None);
        let before = self.shared.trouble.send_replace(Some(lost.clone()));
        // Said once, not at each attempt: a night without a broker is one line, not ten thousand.
        if !self.shared.link.is_closed() && before.as_ref() != Some(lost) {
            tracing::warn!(consumer = self.spec.tag, "not consuming, will try again: {lost}");
        }
    }

    async fn establish(&self) -> Result<(u64, Channel, lapin::Consumer), BrokerError> {
        let channel = self.shared.link.channel().await?;
        admin::declare(&channel, &self.spec.declarations).await?;
        let queue = self.declare_queue(&channel).await?;
        let qos = channel.basic_qos(self.spec.prefetch, BasicQosOptions { global: false }).await;
        qos.map_err(|error| BrokerError::operating(&error, "prefetch"))?;
        // The epoch begins before the first delivery can arrive.
        let epoch = {
            let mut current = self.shared.lock();
            *current = (current.0 + 1, Some(channel.clone()));
            current.0
        };
        let options = BasicConsumeOptions { no_ack: self.spec.no_ack, ..Default::default() };
        let (name, tag) = (short(&queue)?, short(&self.spec.tag)?);
        let stream = channel.basic_consume(name, tag, options, FieldTable::default()).await;
        let stream =
            stream.map_err(|error| BrokerError::operating(&error, &format!("queue {queue}")))?;
        if self.shared.trouble.send_replace(None).is_some() {
            tracing::info!(queue, consumer = self.spec.tag, epoch, "consuming again");
        }
        self.shared.queue.send_replace(Some(queue));
        Ok((epoch, channel, stream))
    }

    async fn declare_queue(&self, channel: &Channel) -> Result<String, BrokerError> {
        let (name, bindings) = match &self.spec.queue {
            QueueSource::Named(name) => return Ok(name.clone()),
            QueueSource::Exclusive { name, bindings } => (name(), bindings),
        };
        let mut wanted = vec![Declaration::exclusive_queue(name.clone())];
        wanted.extend(bindings.iter().map(|(exchange, routing_key)| Declaration::Binding {
            exchange: exchange.clone(),
            queue: name.clone(),
            routing_key: routing_key.clone(),
            arguments: vec![],
        }));
        admin::declare(channel, &wanted).await?;
        Ok(name)
    }

    /// Passes deliveries on until the stream ends; says why it ended.
    async fn forward(
        &self,
        epoch: u64,
        channel: &Channel,
        mut stream: lapin::Consumer,
    ) -> BrokerError {
        let mut health = tokio::time::interval(HEALTH_CHECK);
        let mut cancelled = false;
        loop {
            tokio::select! {
                item = stream.next() => match item {
                    Some(Ok(delivery)) => self.pass_on(epoch, delivery).await,
                    Some(Err(error)) => return BrokerError::operating(&error, &self.spec.tag),
                    // The broker cancels a consumer when its queue is deleted.
                    None => return BrokerError::Lost("the broker ended the consumer".to_owned()),
                },
                () = self.shared.stop.cancelled(), if !cancelled => {
                    cancelled = true;
                    self.cancel(channel).await;
                }
                _ = health.tick() => if !channel.status().connected() {
                    return BrokerError::Lost("the channel was closed".to_owned());
                },
            }
        }
    }

    async fn cancel(&self, channel: &Channel) {
        let Ok(tag) = short(&self.spec.tag) else { return };
        if let Err(error) = channel.basic_cancel(tag, BasicCancelOptions::default()).await {
            tracing::debug!(%error, "the consumer could not be cancelled");
        }
    }

    async fn pass_on(&self, epoch: u64, delivery: lapin::message::Delivery) {
        let ours = Delivery {
            tag: DeliveryTag { epoch, number: delivery.delivery_tag },
            routing_key: delivery.routing_key.as_str().to_owned(),
            redelivered: delivery.redelivered,
            message: from_properties(&delivery.properties, delivery.data),
        };
        if self.to_owner.send(ours).await.is_err() {
            // The owner is gone without a word; nothing is lost, the broker has the message still.
            self.shared.stop.cancel();
        }
    }
}
