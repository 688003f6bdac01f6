//! The task behind a consumer: opens a channel, passes on what arrives, notices its end, and begins
//! again with the next epoch.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use lapin::Channel;
use lapin::options::{BasicCancelOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::{AMQPValue, FieldTable};
use tokio::sync::{mpsc, watch as watched};
use tokio::time::MissedTickBehavior;

use super::convert::{from_properties, short};
use super::delivery::{ConsumerSpec, ConsumerState, Delivery, DeliveryTag, Epoch, QueueSource};
use super::link::Pause;
use super::watch::{self, Flow, Watch};
use super::{BrokerError, QueueStatus, admin};
use crate::failpoints::Protection;
use crate::topology::Declaration;

/// How often a quiet consumer looks whether its channel still stands.
const HEALTH_CHECK: Duration = Duration::from_secs(2);

/// An epoch that lasted so long was a success.
const STABLE: Duration = Duration::from_secs(2);

/// So many deliveries that are here are passed on before anything else is looked at.
const AT_ONCE: usize = 64;

/// Why an epoch ended.
enum EpochEnd {
    Lost(BrokerError),
    /// Nothing has come for so long that something may have gone astray.
    Idle,
    /// The owner wants a pause.
    Paused,
}

impl EpochEnd {
    fn lost(why: &str) -> Self {
        Self::Lost(BrokerError::Lost(why.to_owned()))
    }
}

/// What a look at the queue has found.
struct Look {
    asked: Instant,
    answer: Result<QueueStatus, BrokerError>,
    kept: Result<(), BrokerError>,
}

/// What a [`Consumer`](super::Consumer) has behind it.
pub(super) struct ConsumeTask {
    pub(super) shared: Arc<ConsumerState>,
    pub(super) spec: ConsumerSpec,
    pub(super) to_owner: mpsc::Sender<Delivery>,
}

impl ConsumeTask {
    pub(super) async fn run(self) {
        let mut pause = Pause::new();
        let mut pauses = self.shared.paused.subscribe();
        while !self.shared.stop.is_cancelled() {
            if *pauses.borrow_and_update() {
                self.rest(&mut pauses).await;
                continue;
            }
            let lost = match self.establish().await {
                Ok((epoch, channel, queue, stream)) => {
                    let begun = Instant::now();
                    let end = self.forward((epoch, &channel, &queue), stream, &mut pauses).await;
                    // What ends every epoch at once would make a hot loop if the pause did not grow.
                    if begun.elapsed() >= STABLE {
                        pause.reset();
                    }
                    if self.shared.stop.is_cancelled() {
                        // The channel stays, if it lives: what was delivered may still be settled.
                        if !channel.status().connected() {
                            self.shared.lock().channel = None;
                        }
                        return;
                    }
                    match end {
                        EpochEnd::Lost(error) => error,
                        EpochEnd::Idle => {
                            tracing::debug!(queue, consumer = self.spec.tag, "idle; begins anew");
                            // Closed with its last clone; what is astray then goes back to the queue.
                            self.shared.lock().channel = None;
                            continue;
                        }
                        EpochEnd::Paused => {
                            // At its end the broker takes back what was not acknowledged.
                            if let Err(error) = channel.close(200, "pause".into()).await {
                                tracing::debug!(%error, "a channel was not closed in order");
                            }
                            continue;
                        }
                    }
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

    /// Waits for the end of the pause, or of it all.
    async fn rest(&self, pauses: &mut watched::Receiver<bool>) {
        self.shared.queue.send_replace(None);
        tokio::select! {
            _ = pauses.wait_for(|paused| !paused) => {}
            () = self.shared.stop.cancelled() => {}
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
        let qos = channel.basic_qos(self.spec.prefetch, BasicQosOptions { global: false });
        admin::answer(qos, "prefetch").await?;
        // The epoch begins before the first delivery can arrive.
        let epoch = {
            let mut current = self.shared.lock();
            let new = current.number == 0 || Protection::EpochCheck.is_enabled();
            *current = Epoch {
                number: current.number + u64::from(new),
                channel: (!*self.shared.paused.borrow()).then(|| channel.clone()),
                flow: Flow::new(self.spec.prefetch),
            };
            current.number
        };
        let options = BasicConsumeOptions { no_ack: self.spec.no_ack, ..Default::default() };
        let (name, tag) = (short(&queue)?, short(&self.spec.tag)?);
        let stream = channel.basic_consume(name, tag, options, self.arguments());
        let stream = admin::answer(stream, &format!("queue {queue}")).await?;
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
        if let (true, Ok(millis)) = (self.acknowledges(), i64::try_from(limit)) {
            arguments.insert("x-consumer-timeout".into(), AMQPValue::LongLongInt(millis));
        }
        arguments
    }

    /// Whether the broker waits for acknowledgements from a durable queue's consumer.
    fn acknowledges(&self) -> bool {
        matches!(self.spec.queue, QueueSource::Named(_)) && !self.spec.no_ack
    }

    /// Whether nothing is here and nothing has come for long. The broker may have sent something that
    /// never arrived: it counts that as ours, and no answer of it would tell.
    fn is_stale(&self) -> bool {
        let limit = self.shared.link.config().consumer_timeout / 4;
        self.acknowledges()
            && Protection::IdleRenewal.is_enabled()
            && self.shared.lock().flow.idle().is_some_and(|idle| idle >= limit)
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
        (epoch, channel, queue): (u64, &Channel, &str),
        stream: lapin::Consumer,
        pauses: &mut watched::Receiver<bool>,
    ) -> EpochEnd {
        let mut arrivals = stream.ready_chunks(AT_ONCE);
        let mut health = tokio::time::interval(HEALTH_CHECK);
        let every = self.shared.link.config().heartbeat;
        let mut look = tokio::time::interval_at(tokio::time::Instant::now() + every, every);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // At most one; beside deliveries, which must not wait for it.
        let (mut looks, mut watch) = (FuturesUnordered::new(), Watch::default());
        let mut cancelled = false;
        // Deliveries that wait for room at the owner. A slow owner must not keep us from all else: a
        // look at the queue may hold the lock of the whole connection.
        let mut here = VecDeque::new();
        loop {
            tokio::select! {
                place = self.to_owner.reserve(), if !here.is_empty() => {
                    if let (Ok(place), Some(delivery)) = (place, here.pop_front()) {
                        place.send(delivery);
                        self.pass_on(&mut here);
                    } else {
                        // The owner is gone; nothing is lost, the broker has them still.
                        here.clear();
                        self.shared.stop.cancel();
                    }
                }
                arrived = arrivals.next(), if here.is_empty() => match arrived {
                    Some(arrived) => {
                        if let Err(lost) = self.receive(epoch, arrived, &mut here) {
                            return EpochEnd::Lost(lost);
                        }
                        self.pass_on(&mut here);
                    }
                    // When its queue is deleted, and from RabbitMQ 4.3 on for an acknowledgement
                    // that did not come in time.
                    None => return EpochEnd::lost("the broker ended the consumer"),
                },
                () = self.shared.stop.cancelled(), if !cancelled => {
                    cancelled = true;
                    self.cancel(channel).await;
                }
                // Any change: a pause that is over already has made this epoch's deliveries void.
                Ok(()) = pauses.changed(), if !cancelled => return EpochEnd::Paused,
                _ = health.tick() => if !channel.status().connected() {
                    return EpochEnd::lost("the channel was closed");
                },
                _ = look.tick(),
                    if !cancelled && looks.is_empty() && Protection::DeliveryWatch.is_enabled() =>
                {
                    if self.is_stale() {
                        return EpochEnd::Idle;
                    }
                    looks.push(self.look(channel, queue, Instant::now()));
                }
                Some(Look { asked, answer, kept }) = looks.next() => {
                    watch.kept(&self.spec.tag, kept);
                    let flow = &mut self.shared.lock().flow;
                    let judged = answer.and_then(|answer| watch.judge(flow, asked, answer));
                    if let Err(lost) = judged && !cancelled {
                        return EpochEnd::Lost(lost);
                    }
                },
            }
        }
    }

    /// Puts right what somebody deleted without ending the consumer, and asks how the queue stands.
    async fn look(&self, channel: &Channel, queue: &str, asked: Instant) -> Look {
        let way = match &self.spec.queue {
            _ if !Protection::TopologyReconciled.is_enabled() => vec![],
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
        let cancelled = channel.basic_cancel(tag, BasicCancelOptions::default());
        if let Err(error) = admin::answer(cancelled, &self.spec.tag).await {
            tracing::debug!(%error, "the consumer could not be cancelled");
        }
    }

    /// Takes deliveries off the wire.
    fn receive(
        &self,
        epoch: u64,
        arrived: Vec<lapin::Result<lapin::message::Delivery>>,
        here: &mut VecDeque<Delivery>,
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
            here.push_back(Delivery {
                tag: DeliveryTag { epoch, number: delivery.delivery_tag },
                routing_key: delivery.routing_key.as_str().to_owned(),
                redelivered: delivery.redelivered,
                message: from_properties(&delivery.properties, delivery.data),
            });
        }
        Ok(())
    }

    /// Hands on what the owner has room for.
    fn pass_on(&self, here: &mut VecDeque<Delivery>) {
        while !here.is_empty()
            && let Ok(place) = self.to_owner.try_reserve()
            && let Some(delivery) = here.pop_front()
        {
            place.send(delivery);
        }
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
