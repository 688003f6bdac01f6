//! Consuming over epochs: a stream of deliveries that outlives channels and connections.
//!
//! When a channel ends, the broker takes back every delivery of it that was not acknowledged. So each
//! rebuilt channel is a new epoch, and a [`Settler`] that is asked to settle a delivery of an older one
//! does nothing: the delivery comes again by itself.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use lapin::Channel;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use tokio::sync::{mpsc, watch as watched};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::convert::{from_properties, short};
use super::link::Pause;
use super::watch::{self, Flow, Health, Watch};
use super::{BrokerError, Link, QueueStatus, admin};
use crate::guards::Guard;
use crate::topology::Declaration;
use crate::wire::Message;

/// How often a quiet consumer looks whether its channel still stands.
const HEALTH_CHECK: Duration = Duration::from_secs(2);

/// An epoch that lasted so long was a success.
const STABLE: Duration = Duration::from_secs(2);

/// So many deliveries that are here are passed on before anything else is looked at.
const AT_ONCE: usize = 64;

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
    current: Mutex<Epoch>,
    queue: watched::Sender<Option<String>>,
    trouble: watched::Sender<Option<BrokerError>>,
    stop: CancellationToken,
    task: TaskTracker,
}

struct Epoch {
    number: u64,
    /// `None` between two epochs.
    channel: Option<Channel>,
    flow: Flow,
}

impl Consumer {
    /// Starts consuming; connects, and reconnects, on its own.
    pub fn start(link: Link, spec: ConsumerSpec) -> Self {
        let (to_owner, deliveries) = mpsc::channel(usize::from(spec.prefetch).max(1));
        let shared = Arc::new(Shared {
            link,
            current: Mutex::new(Epoch { number: 0, channel: None, flow: Flow::new(spec.prefetch) }),
            queue: watched::Sender::new(None),
            trouble: watched::Sender::new(None),
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
    pub fn queue(&self) -> watched::Receiver<Option<String>> {
        self.shared.queue.subscribe()
    }

    /// Whether deliveries can flow.
    pub fn health(&self) -> Health {
        self.shared.health()
    }

    /// The present epoch; `None` while there is no channel, when all that was delivered is void.
    pub fn epoch(&self) -> Option<u64> {
        let current = self.shared.lock();
        current.channel.as_ref().map(|_| current.number)
    }

    /// The broker's word on the queue, over a channel of its own.
    pub fn status(
        &self,
    ) -> impl Future<Output = Result<QueueStatus, BrokerError>> + Send + 'static {
        let (link, queue) = (self.shared.link.clone(), self.shared.queue.borrow().clone());
        async move {
            let queue =
                queue.ok_or_else(|| BrokerError::Lost("no queue at the moment".to_owned()))?;
            watch::ask(&link.channel().await?, &queue, link.config().heartbeat).await
        }
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
    pub fn ack(&self, tag: DeliveryTag, multiple: bool) -> bool {
        let Some(channel) = self.0.channel_of(tag.epoch) else { return false };
        let acked = handed_over(channel.basic_ack(tag.number, BasicAckOptions { multiple }));
        self.0.settled(tag, multiple);
        acked
    }

    /// Hands one delivery back, to be delivered again to anybody.
    pub fn requeue(&self, tag: DeliveryTag) -> bool {
        let Some(channel) = self.0.channel_of(tag.epoch) else { return false };
        let options = BasicNackOptions { multiple: false, requeue: true };
        let returned = handed_over(channel.basic_nack(tag.number, options));
        self.0.settled(tag, false);
        returned
    }

    /// Whether deliveries can flow.
    pub fn health(&self) -> Health {
        self.0.health()
    }
}

/// Hands something over to lapin, which writes it in its turn; `false` if the channel takes nothing.
///
/// Whether it was written says nothing about whether it arrived, so to wait for that would only cost a
/// trip to lapin's thread and back.
fn handed_over(sending: impl Future<Output = lapin::Result<()>>) -> bool {
    !matches!(sending.now_or_never(), Some(Err(_)))
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Epoch> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn channel_of(&self, epoch: u64) -> Option<Channel> {
        let current = self.lock();
        current.channel.as_ref().filter(|_| current.number == epoch).cloned()
    }

    fn settled(&self, tag: DeliveryTag, multiple: bool) {
        let mut current = self.lock();
        if current.number == tag.epoch {
            current.flow.settled(tag.number, multiple);
        }
    }

    fn health(&self) -> Health {
        if self.queue.borrow().is_some() {
            return Health::Flowing(self.lock().flow.proven().elapsed());
        }
        Health::Down(self.trouble.borrow().clone())
    }
}

/// What a look at the queue has found.
struct Look {
    asked: Instant,
    answer: Result<QueueStatus, BrokerError>,
    kept: Result<(), BrokerError>,
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
                Ok((epoch, channel, queue, stream)) => {
                    let begun = Instant::now();
                    let lost = self.forward(epoch, &channel, &queue, stream).await;
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
        self.shared.lock().channel = None;
        self.shared.queue.send_replace(None);
        self.shared.link.learn_from(lost);
        let before = self.shared.trouble.send_replace(Some(lost.clone()));
        // Said once, not at each attempt: a night without a broker is one line, not ten thousand.
        if !self.shared.link.is_closed() && before.as_ref() != Some(lost) {
            tracing::warn!(consumer = self.spec.tag, "not consuming, will try again: {lost}");
        }
    }

    async fn establish(&self) -> Result<(u64, Channel, String, lapin::Consumer), BrokerError> {
        let channel = self.shared.link.channel().await?;
        admin::declare(&channel, &self.spec.declarations).await?;
        let queue = self.declare_queue(&channel).await?;
        let qos = channel.basic_qos(self.spec.prefetch, BasicQosOptions { global: false }).await;
        qos.map_err(|error| BrokerError::operating(&error, "prefetch"))?;
        // The epoch begins before the first delivery can arrive.
        let epoch = {
            let mut current = self.shared.lock();
            let new = current.number == 0 || Guard::EpochCheck.holds();
            *current = Epoch {
                number: current.number + u64::from(new),
                channel: Some(channel.clone()),
                flow: Flow::new(self.spec.prefetch),
            };
            current.number
        };
        let options = BasicConsumeOptions { no_ack: self.spec.no_ack, ..Default::default() };
        let (name, tag) = (short(&queue)?, short(&self.spec.tag)?);
        let stream = channel.basic_consume(name, tag, options, self.arguments()).await;
        let stream =
            stream.map_err(|error| BrokerError::operating(&error, &format!("queue {queue}")))?;
        if self.shared.trouble.send_replace(None).is_some() {
            tracing::info!(queue, consumer = self.spec.tag, epoch, "consuming again");
        }
        self.shared.queue.send_replace(Some(queue.clone()));
        Ok((epoch, channel, queue, stream))
    }

    /// RabbitMQ 4.3 and later take the time limit for acknowledgements from their consumers; older ones
    /// have one limit for all and overlook the argument.
    fn arguments(&self) -> FieldTable {
        let mut arguments = FieldTable::default();
        let limit = self.shared.link.config().consumer_timeout.as_millis();
        // 4.3 refuses the argument for exclusive queues, which are classic and have no such limit.
        let limited = matches!(self.spec.queue, QueueSource::Named(_)) && !self.spec.no_ack;
        if let (true, Ok(millis)) = (limited, i64::try_from(limit)) {
            arguments.insert("x-consumer-timeout".into(), AMQPValue::LongLongInt(millis));
        }
        arguments
    }

    async fn declare_queue(&self, channel: &Channel) -> Result<String, BrokerError> {
        let (name, bindings) = match &self.spec.queue {
            QueueSource::Named(name) => return Ok(name.clone()),
            QueueSource::Exclusive { name, bindings } => (name(), bindings),
        };
        let mut wanted = vec![Declaration::exclusive_queue(name.clone())];
        wanted.extend(bind(&name, bindings));
        admin::declare(channel, &wanted).await?;
        Ok(name)
    }

    /// Passes deliveries on until the stream ends; says why it ended.
    async fn forward(
        &self,
        epoch: u64,
        channel: &Channel,
        queue: &str,
        stream: lapin::Consumer,
    ) -> BrokerError {
        let mut arrivals = stream.ready_chunks(AT_ONCE);
        let mut health = tokio::time::interval(HEALTH_CHECK);
        let every = self.shared.link.config().heartbeat;
        let mut look = tokio::time::interval_at(tokio::time::Instant::now() + every, every);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // At most one; beside deliveries, which must not wait for it.
        let (mut looks, mut watch) = (FuturesUnordered::new(), Watch::default());
        let mut cancelled = false;
        loop {
            tokio::select! {
                arrived = arrivals.next() => match arrived {
                    Some(arrived) => if let Err(lost) = self.pass_on(epoch, arrived).await {
                        return lost;
                    },
                    // When its queue is deleted, and from RabbitMQ 4.3 on for an acknowledgement
                    // that did not come in time.
                    None => return BrokerError::Lost("the broker ended the consumer".to_owned()),
                },
                () = self.shared.stop.cancelled(), if !cancelled => {
                    cancelled = true;
                    self.cancel(channel).await;
                }
                _ = health.tick() => if !channel.status().connected() {
                    return BrokerError::Lost("the channel was closed".to_owned());
                },
                _ = look.tick(),
                    if !cancelled && looks.is_empty() && Guard::DeliveryWatch.holds() =>
                {
                    looks.push(self.look(channel, queue, Instant::now()));
                }
                Some(Look { asked, answer, kept }) = looks.next() => {
                    watch.kept(&self.spec.tag, kept);
                    let flow = &mut self.shared.lock().flow;
                    let judged = answer.and_then(|answer| watch.judge(flow, asked, answer));
                    if let Err(lost) = judged && !cancelled {
                        return lost;
                    }
                },
            }
        }
    }

    /// Puts right what somebody deleted without ending the consumer, and asks how the queue stands.
    async fn look(&self, channel: &Channel, queue: &str, asked: Instant) -> Look {
        let way = match &self.spec.queue {
            _ if !Guard::KeptTopology.holds() => vec![],
            QueueSource::Named(queue) => watch::way_to(queue, &self.spec.declarations),
            QueueSource::Exclusive { bindings, .. } => bind(queue, bindings).collect(),
        };
        let limit = self.shared.link.config().heartbeat * 2;
        let ask = watch::ask(channel, queue, limit);
        let (answer, kept) = tokio::join!(ask, watch::keep(&self.shared.link, &way));
        Look { asked, answer, kept }
    }

    async fn cancel(&self, channel: &Channel) {
        let Ok(tag) = short(&self.spec.tag) else { return };
        if let Err(error) = channel.basic_cancel(tag, BasicCancelOptions::default()).await {
            tracing::debug!(%error, "the consumer could not be cancelled");
        }
    }

    async fn pass_on(
        &self,
        epoch: u64,
        arrived: Vec<lapin::Result<lapin::message::Delivery>>,
    ) -> Result<(), BrokerError> {
        {
            let flow = &mut self.shared.lock().flow;
            for delivery in arrived.iter().flatten() {
                flow.delivered(delivery.delivery_tag, !self.spec.no_ack);
            }
        }
        for delivery in arrived {
            let delivery =
                delivery.map_err(|error| BrokerError::operating(&error, &self.spec.tag))?;
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
        Ok(())
    }
}

fn bind<'a>(
    queue: &'a str,
    bindings: &'a [(String, String)],
) -> impl Iterator<Item = Declaration> + 'a {
    bindings.iter().map(|(exchange, routing_key)| Declaration::Binding {
        exchange: exchange.clone(),
        queue: queue.to_owned(),
        routing_key: routing_key.clone(),
        arguments: vec![],
    })
}
