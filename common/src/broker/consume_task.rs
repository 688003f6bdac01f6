//! The task behind a [`Consumer`](super::Consumer): opens a channel, forwards deliveries to the
//! owner, notices the channel's end, and begins the next epoch.
//!
//! Deliveries of lapin come in, [`Delivery`]s go out in the same order. Nothing is settled here.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use lapin::Channel;
use lapin::options::{BasicCancelOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::{AMQPValue, FieldTable};
use tokio::sync::{mpsc, watch};
use tokio::time::MissedTickBehavior;

use super::backoff::Backoff;
use super::convert::{from_properties, short};
use super::delivery::{ConsumerSpec, ConsumerState, Delivery, DeliveryTag, Epoch, QueueSource};
use super::outage::OutageLog;
use super::queue_monitor::{self, DeliveryFlow, QueueMonitor};
use super::{BrokerError, QueueStatus, admin};
use crate::failpoints::Protection;
use crate::topology::Declaration;

/// How often a quiet consumer checks that its channel is open.
const HEALTH_CHECK: Duration = Duration::from_secs(2);

/// An epoch that lasted this long resets the back-off.
const STABLE: Duration = Duration::from_secs(2);

/// The most deliveries forwarded before other events are handled.
const MAX_CHUNK: usize = 64;

/// Why an epoch ended.
enum EpochEnd {
    /// The channel was lost or is not to be trusted.
    Lost(BrokerError),
    /// Nothing was delivered for so long that deliveries may have been lost in transit.
    Idle,
    /// The owner pauses the consumer.
    Paused,
    /// The owner has stopped the consumer.
    Stopped,
}

impl EpochEnd {
    fn lost(cause: &str) -> Self {
        Self::Lost(BrokerError::Lost(cause.to_owned()))
    }
}

/// A channel with a consumer on it.
struct OpenEpoch {
    number: u64,
    channel: Channel,
    queue: String,
}

/// The result of a check of the queue.
struct QueueCheck {
    started_at: Instant,
    status: Result<QueueStatus, BrokerError>,
    redeclared: Result<(), BrokerError>,
}

/// Consumes over channel after channel.
pub(super) struct ConsumeTask {
    state: Arc<ConsumerState>,
    spec: ConsumerSpec,
    to_owner: mpsc::Sender<Delivery>,
    outage: OutageLog,
}

impl ConsumeTask {
    pub(super) fn new(
        state: Arc<ConsumerState>,
        spec: ConsumerSpec,
        to_owner: mpsc::Sender<Delivery>,
    ) -> Self {
        Self { state, spec, to_owner, outage: OutageLog::default() }
    }

    pub(super) async fn run(mut self) {
        let mut backoff = Backoff::new();
        let mut pauses = self.state.paused.subscribe();
        while !self.state.stop.is_cancelled() {
            if *pauses.borrow_and_update() {
                self.wait_for_resume(&mut pauses).await;
                continue;
            }
            let end = match self.establish().await {
                Ok((epoch, stream)) => {
                    self.run_epoch(epoch, stream, &mut pauses, &mut backoff).await
                }
                Err(error) => EpochEnd::Lost(error),
            };
            let error = match end {
                EpochEnd::Stopped => return,
                EpochEnd::Idle | EpochEnd::Paused => continue,
                EpochEnd::Lost(error) => error,
            };
            self.report_error(error);
            if self.state.link.is_closed() {
                return;
            }
            let delay = tokio::time::sleep(backoff.next_delay());
            tokio::select! {
                () = delay => {}
                () = self.state.stop.cancelled() => {}
            }
        }
    }

    /// Waits until the consumer is resumed or stopped.
    async fn wait_for_resume(&self, pauses: &mut watch::Receiver<bool>) {
        self.state.queue.send_replace(None);
        tokio::select! {
            _ = pauses.wait_for(|paused| !paused) => {}
            () = self.state.stop.cancelled() => {}
        }
    }

    /// Forwards deliveries of one epoch until it ends, and releases its channel.
    async fn run_epoch(
        &self,
        epoch: OpenEpoch,
        stream: lapin::Consumer,
        pauses: &mut watch::Receiver<bool>,
        backoff: &mut Backoff,
    ) -> EpochEnd {
        let begun_at = Instant::now();
        let end = self.forward(&epoch, stream, pauses).await;
        // If every epoch ended at once, a delay that does not grow would be a hot loop.
        if begun_at.elapsed() >= STABLE {
            backoff.reset();
        }
        if self.state.stop.is_cancelled() {
            // An open channel is kept: its deliveries can still be settled.
            if !epoch.channel.status().connected() {
                self.state.epoch().channel = None;
            }
            return EpochEnd::Stopped;
        }
        match &end {
            EpochEnd::Idle => {
                let OpenEpoch { queue, .. } = &epoch;
                tracing::debug!(queue, consumer = self.spec.tag, "idle, opening a new channel");
                // The channel is closed with its last clone, and the broker requeues deliveries
                // that were lost in transit.
                self.state.epoch().channel = None;
            }
            EpochEnd::Paused => {
                // The broker requeues unacknowledged deliveries of a closed channel.
                if let Err(error) = epoch.channel.close(200, "pause".into()).await {
                    tracing::debug!(%error, "the channel was not closed cleanly");
                }
            }
            EpochEnd::Lost(_) | EpochEnd::Stopped => {}
        }
        end
    }

    /// Notes why there is no consumer, and logs each kind of error once per outage.
    fn report_error(&mut self, error: BrokerError) {
        self.state.epoch().channel = None;
        self.state.queue.send_replace(None);
        self.state.link.observe(&error);
        if self.outage.is_new(&error) && !self.state.link.is_closed() {
            tracing::warn!(consumer = self.spec.tag, "not consuming, will try again: {error}");
        }
        self.state.error.send_replace(Some(error));
    }

    /// Opens a channel, declares what is missing and starts a consumer: a new epoch.
    async fn establish(&mut self) -> Result<(OpenEpoch, lapin::Consumer), BrokerError> {
        let channel = self.state.link.channel().await?;
        admin::declare(&channel, &self.spec.declarations).await?;
        let queue = self.declare_queue(&channel).await?;
        let qos = channel.basic_qos(self.spec.prefetch, BasicQosOptions { global: false });
        admin::response(qos, "prefetch").await?;
        // The epoch begins before the first delivery can arrive.
        let number = self.begin_epoch(&channel);
        let options = BasicConsumeOptions { no_ack: self.spec.no_ack, ..Default::default() };
        let (name, tag) = (short(&queue)?, short(&self.spec.tag)?);
        let stream = channel.basic_consume(name, tag, options, self.consumer_arguments());
        let stream = admin::response(stream, &format!("queue {queue}")).await?;
        if self.state.error.send_replace(None).is_some() {
            tracing::info!(queue, consumer = self.spec.tag, epoch = number, "consuming again");
        }
        self.outage.clear();
        self.state.queue.send_replace(Some(queue.clone()));
        Ok((OpenEpoch { number, channel, queue }, stream))
    }

    /// Makes this the current channel; returns the number of its epoch.
    fn begin_epoch(&self, channel: &Channel) -> u64 {
        let mut current = self.state.epoch();
        let number = current.number + 1;
        #[cfg(feature = "failpoints")]
        let number = super::sabotage::epoch_number(number);
        *current = Epoch {
            number,
            channel: (!*self.state.paused.borrow()).then(|| channel.clone()),
            flow: DeliveryFlow::new(self.spec.prefetch),
        };
        number
    }

    /// RabbitMQ 4.3 and later take the limit for acknowledgements from the consumer; older ones
    /// have one limit for all and ignore the argument.
    fn consumer_arguments(&self) -> FieldTable {
        let mut arguments = FieldTable::default();
        let limit = self.state.link.config().consumer_timeout.as_millis();
        // 4.3 refuses the argument for exclusive queues, which are classic and have no such limit.
        if let (true, Ok(millis)) = (self.acknowledges(), i64::try_from(limit)) {
            arguments.insert("x-consumer-timeout".into(), AMQPValue::LongLongInt(millis));
        }
        arguments
    }

    /// Whether the broker expects acknowledgements of deliveries from a durable queue.
    fn acknowledges(&self) -> bool {
        matches!(self.spec.queue, QueueSource::Named(_)) && !self.spec.no_ack
    }

    /// Whether nothing is unsettled and nothing was delivered for a quarter of the consumer
    /// timeout. The broker may have sent deliveries that never arrived: it counts them as
    /// unacknowledged, and the status of the queue does not show them.
    fn is_stale(&self) -> bool {
        let limit = self.state.link.config().consumer_timeout / 4;
        self.acknowledges()
            && Protection::IdleRenewal.is_enabled()
            && self.state.epoch().flow.idle().is_some_and(|idle| idle >= limit)
    }

    async fn declare_queue(&self, channel: &Channel) -> Result<String, BrokerError> {
        let (name, bindings) = match &self.spec.queue {
            QueueSource::Named(name) => return Ok(name.clone()),
            QueueSource::Exclusive { name, bindings } => (name(), bindings),
        };
        let mut declarations = vec![Declaration::exclusive_queue(name.clone())];
        declarations.extend(bindings_of(&name, bindings));
        admin::declare(channel, &declarations).await?;
        Ok(name)
    }

    /// Forwards deliveries until the epoch ends; returns why it ended.
    async fn forward(
        &self,
        epoch: &OpenEpoch,
        stream: lapin::Consumer,
        pauses: &mut watch::Receiver<bool>,
    ) -> EpochEnd {
        let mut arrivals = stream.ready_chunks(MAX_CHUNK);
        let mut health = tokio::time::interval(HEALTH_CHECK);
        let mut check_due = delayed_interval(self.state.link.config().heartbeat);
        // At most one check at a time, concurrent with deliveries, which must not wait for it.
        let (mut checks, mut monitor) = (FuturesUnordered::new(), QueueMonitor::default());
        let mut cancelled = false;
        // Deliveries for which the owner has no room yet. A slow owner must not stop this loop: a
        // check of the queue may hold the lock of the whole connection.
        let mut waiting = VecDeque::new();
        loop {
            let step = tokio::select! {
                room = self.to_owner.reserve(), if !waiting.is_empty() => {
                    self.hand_over(room.map_err(drop), &mut waiting);
                    Ok(())
                }
                arrived = arrivals.next(), if waiting.is_empty() => {
                    self.receive(epoch.number, arrived, &mut waiting)
                }
                () = self.state.stop.cancelled(), if !cancelled => {
                    cancelled = true;
                    self.cancel(&epoch.channel).await;
                    Ok(())
                }
                // Any change: even a pause that has ended made this epoch's deliveries void.
                Ok(()) = pauses.changed(), if !cancelled => Err(EpochEnd::Paused),
                _ = health.tick() => if epoch.channel.status().connected() {
                    Ok(())
                } else {
                    Err(EpochEnd::lost("the channel was closed"))
                },
                _ = check_due.tick(),
                    if !cancelled && checks.is_empty() && Protection::DeliveryWatch.is_enabled() =>
                {
                    if self.is_stale() {
                        Err(EpochEnd::Idle)
                    } else {
                        checks.push(self.check_queue(epoch, Instant::now()));
                        Ok(())
                    }
                }
                Some(check) = checks.next() => match self.assess(&mut monitor, check) {
                    Err(error) if !cancelled => Err(EpochEnd::Lost(error)),
                    Ok(()) | Err(_) => Ok(()),
                },
            };
            if let Err(end) = step {
                return end;
            }
        }
    }

    /// Declares objects again that were deleted without ending the consumer, and queries the status
    /// of the queue.
    async fn check_queue(&self, epoch: &OpenEpoch, started_at: Instant) -> QueueCheck {
        let reconciled = Protection::TopologyReconciled.is_enabled();
        let required = if reconciled { self.required_for(&epoch.queue) } else { vec![] };
        let limit = self.state.link.config().heartbeat * 2;
        let (status, redeclared) = tokio::join!(
            queue_monitor::query_status(&epoch.channel, &epoch.queue, limit),
            queue_monitor::redeclare(&self.state.link, &required),
        );
        QueueCheck { started_at, status, redeclared }
    }

    /// Of the declared objects, those without which no message reaches the queue.
    fn required_for(&self, queue: &str) -> Vec<Declaration> {
        match &self.spec.queue {
            QueueSource::Named(name) => queue_monitor::required_for(name, &self.spec.declarations),
            QueueSource::Exclusive { bindings, .. } => bindings_of(queue, bindings).collect(),
        }
    }

    /// Fails if a check shows that the broker no longer delivers to this consumer.
    fn assess(&self, monitor: &mut QueueMonitor, check: QueueCheck) -> Result<(), BrokerError> {
        monitor.report_redeclared(&self.spec.tag, check.redeclared);
        let status = check.status?;
        monitor.assess(&mut self.state.epoch().flow, check.started_at, status)
    }

    async fn cancel(&self, channel: &Channel) {
        let Ok(tag) = short(&self.spec.tag) else { return };
        let cancelled = channel.basic_cancel(tag, BasicCancelOptions::default());
        if let Err(error) = admin::response(cancelled, &self.spec.tag).await {
            tracing::debug!(%error, "the consumer could not be cancelled");
        }
    }

    /// Converts deliveries that have arrived, counts them as unsettled and hands over those for
    /// which the owner has room. `None` is the end of the stream.
    fn receive(
        &self,
        epoch: u64,
        arrived: Option<Vec<lapin::Result<lapin::message::Delivery>>>,
        waiting: &mut VecDeque<Delivery>,
    ) -> Result<(), EpochEnd> {
        // When the queue is deleted, and from RabbitMQ 4.3 on after an acknowledgement that did not
        // come in time.
        let Some(arrived) = arrived else {
            return Err(EpochEnd::lost("the broker ended the consumer"));
        };
        {
            let flow = &mut self.state.epoch().flow;
            for delivery in arrived.iter().flatten() {
                flow.delivered(delivery.delivery_tag, !self.spec.no_ack);
            }
        }
        for delivery in arrived {
            let lost = |error| EpochEnd::Lost(BrokerError::operating(&error, &self.spec.tag));
            let delivery = delivery.map_err(lost)?;
            waiting.push_back(Delivery {
                tag: DeliveryTag { epoch, number: delivery.delivery_tag },
                routing_key: delivery.routing_key.as_str().to_owned(),
                redelivered: delivery.redelivered,
                message: from_properties(&delivery.properties, delivery.data),
            });
        }
        self.hand_over_available(waiting);
        Ok(())
    }

    /// Hands the first waiting delivery over into `room`, and others while there is more. An error
    /// means that the owner has dropped the consumer; the broker still has the messages.
    fn hand_over(
        &self,
        room: Result<mpsc::Permit<'_, Delivery>, ()>,
        waiting: &mut VecDeque<Delivery>,
    ) {
        let Ok(room) = room else {
            waiting.clear();
            self.state.stop.cancel();
            return;
        };
        if let Some(delivery) = waiting.pop_front() {
            room.send(delivery);
        }
        self.hand_over_available(waiting);
    }

    fn hand_over_available(&self, waiting: &mut VecDeque<Delivery>) {
        while !waiting.is_empty()
            && let Ok(room) = self.to_owner.try_reserve()
            && let Some(delivery) = waiting.pop_front()
        {
            room.send(delivery);
        }
    }
}

/// An interval that begins after one period and is delayed, not made up for, when it is late.
fn delayed_interval(period: Duration) -> tokio::time::Interval {
    let mut interval = tokio::time::interval_at(tokio::time::Instant::now() + period, period);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}

fn bindings_of<'a>(
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
