//! Consuming over epochs: a stream of deliveries that outlives channels and connections.
//!
//! Deliveries come out, acknowledgements and returns go in. When a channel ends, the broker
//! requeues every delivery of it that was not acknowledged. So each new channel is a new epoch, and
//! a [`Settler`] that is asked to settle a delivery of an older one does nothing: the broker
//! delivers the message again.

use std::sync::Arc;

use futures_util::FutureExt;
use lapin::options::{BasicAckOptions, BasicNackOptions};
use tokio::sync::{mpsc, watch};

use super::consume_task::ConsumeTask;
use super::delivery::{ConsumerSpec, ConsumerState, Delivery, DeliveryTag};
use super::queue_monitor::{self, Health};
use super::{BrokerError, Link, QueueStatus};

/// A stream of deliveries. Dropping it stops its task.
pub struct Consumer {
    deliveries: mpsc::Receiver<Delivery>,
    state: Arc<ConsumerState>,
}

/// Settles deliveries. Clones settle for the same consumer.
#[derive(Clone)]
pub struct Settler(Arc<ConsumerState>);

/// Pauses and resumes a consumer.
#[derive(Clone)]
pub struct Pauser(Arc<ConsumerState>);

impl Pauser {
    /// Pauses or resumes the consumer. A pause returns all unsettled deliveries to the queue;
    /// resuming begins a new epoch.
    pub fn pause(&self, paused: bool) {
        // Under the lock: from now on no delivery of this epoch can be settled, so an owner may
        // drop deliveries without a later `multiple` acknowledgement covering them.
        let mut epoch = self.0.epoch();
        let change = |before: &mut bool| std::mem::replace(before, paused) != paused;
        if self.0.paused.send_if_modified(change) {
            epoch.channel = None;
        }
    }
}

impl Consumer {
    /// Starts consuming. Its task connects, and reconnects, in the background.
    pub fn start(link: Link, spec: ConsumerSpec) -> Self {
        let (to_owner, deliveries) = mpsc::channel(usize::from(spec.prefetch).max(1));
        let state = Arc::new(ConsumerState::new(link, spec.prefetch));
        let task = ConsumeTask::new(Arc::clone(&state), spec, to_owner);
        state.task.spawn(task.run());
        state.task.close();
        Self { deliveries, state }
    }

    /// The next delivery; `None` after [`stop`](Self::stop), once all deliveries on their way have
    /// arrived.
    pub async fn next(&mut self) -> Option<Delivery> {
        self.deliveries.recv().await
    }

    /// The next delivery, if it has already arrived.
    pub fn try_next(&mut self) -> Option<Delivery> {
        self.deliveries.try_recv().ok()
    }

    /// A handle that settles its deliveries.
    pub fn settler(&self) -> Settler {
        Settler(Arc::clone(&self.state))
    }

    /// A handle that pauses it.
    pub fn pauser(&self) -> Pauser {
        Pauser(Arc::clone(&self.state))
    }

    /// The queue consumed at present; `None` while there is no consumer on the broker.
    pub fn queue(&self) -> watch::Receiver<Option<String>> {
        self.state.queue.subscribe()
    }

    /// Whether deliveries can flow.
    pub fn health(&self) -> Health {
        self.state.health()
    }

    /// The current epoch; `None` while there is no channel, when all earlier deliveries are void.
    pub fn epoch(&self) -> Option<u64> {
        let epoch = self.state.epoch();
        epoch.channel.as_ref().map(|_| epoch.number)
    }

    /// Queries the broker for the status of the queue, over a channel of its own.
    ///
    /// Fails with [`BrokerError::Lost`] while there is no consumer.
    pub fn status(
        &self,
    ) -> impl Future<Output = Result<QueueStatus, BrokerError>> + Send + 'static {
        let (link, queue) = (self.state.link.clone(), self.state.queue.borrow().clone());
        async move {
            let queue =
                queue.ok_or_else(|| BrokerError::Lost("no queue at the moment".to_owned()))?;
            let limit = link.config().heartbeat;
            queue_monitor::query_status(&link.channel().await?, &queue, limit).await
        }
    }

    /// Waits until the broker has registered the consumer; returns the name of the queue.
    ///
    /// Fails with the first error that is not transient.
    pub async fn ready(&self) -> Result<String, BrokerError> {
        let (mut queue, mut error) = (self.queue(), self.state.error.subscribe());
        loop {
            if let Some(name) = queue.borrow_and_update().clone() {
                return Ok(name);
            }
            let known = error.borrow_and_update().clone();
            if let Some(error) = known.filter(|error| !error.is_transient()) {
                return Err(error);
            }
            let changed = tokio::select! {
                changed = queue.changed() => changed,
                changed = error.changed() => changed,
            };
            changed.map_err(|_| BrokerError::Closed)?;
        }
    }

    /// Whether [`stop`](Self::stop) was called.
    pub fn is_stopping(&self) -> bool {
        self.state.stop.is_cancelled()
    }

    /// Cancels the consumer on the broker. Deliveries on their way still arrive; all can be
    /// settled.
    pub fn stop(&self) {
        self.state.stop.cancel();
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        self.state.stop.cancel();
    }
}

impl Settler {
    /// Acknowledges one delivery, or with `multiple` also all earlier ones of its epoch.
    ///
    /// `false` if its channel is gone: the broker delivers the message again.
    pub fn ack(&self, tag: DeliveryTag, multiple: bool) -> bool {
        let Some(channel) = self.0.channel_of(tag.epoch) else { return false };
        let acked = was_accepted(channel.basic_ack(tag.number, BasicAckOptions { multiple }));
        self.0.note_settled(tag, multiple);
        acked
    }

    /// Returns one delivery to the queue, for any consumer.
    ///
    /// `false` if its channel is gone: the broker has requeued it already.
    pub fn requeue(&self, tag: DeliveryTag) -> bool {
        let Some(channel) = self.0.channel_of(tag.epoch) else { return false };
        let options = BasicNackOptions { multiple: false, requeue: true };
        let returned = was_accepted(channel.basic_nack(tag.number, options));
        self.0.note_settled(tag, false);
        returned
    }

    /// Whether deliveries can flow.
    pub fn health(&self) -> Health {
        self.0.health()
    }

    /// How many deliveries of the current channel are neither acknowledged nor returned.
    pub fn unsettled(&self) -> usize {
        self.0.epoch().flow.unsettled()
    }
}

/// Polls a request once, which queues it in lapin; `false` if the channel refuses it.
///
/// Waiting for the write would cost a round trip to lapin's thread and would still not prove that
/// the request has arrived.
fn was_accepted(request: impl Future<Output = lapin::Result<()>>) -> bool {
    !matches!(request.now_or_never(), Some(Err(_)))
}
