//! Consuming over epochs: a stream of deliveries that outlives channels and connections.
//!
//! When a channel ends, the broker takes back every delivery of it that was not acknowledged. So each
//! rebuilt channel is a new epoch, and a [`Settler`] that is asked to settle a delivery of an older one
//! does nothing: the delivery comes again by itself.

use std::sync::Arc;

use futures_util::FutureExt;
use lapin::options::{BasicAckOptions, BasicNackOptions};
use tokio::sync::{mpsc, watch as watched};

use super::delivery::{ConsumerSpec, ConsumerState, Delivery, DeliveryTag};
use super::epochs::ConsumeTask;
use super::watch::{self, Health};
use super::{BrokerError, Link, QueueStatus};

/// The stream of deliveries, and the hold on the task behind it.
pub struct Consumer {
    deliveries: mpsc::Receiver<Delivery>,
    shared: Arc<ConsumerState>,
}

/// Tells the broker what became of deliveries. Clones settle for the same consumer.
#[derive(Clone)]
pub struct Settler(Arc<ConsumerState>);

/// Interrupts a consumer from outside.
#[derive(Clone)]
pub struct Pauser(Arc<ConsumerState>);

impl Pauser {
    /// Whether the consumer is to consume nothing. When that begins, all that it holds goes back to
    /// the queue; when it ends, a new epoch begins.
    pub fn pause(&self, paused: bool) {
        // Under the lock: from here on nothing of this epoch can be settled, so that an owner may drop
        // deliveries without a later acknowledgement of several covering them.
        let mut current = self.0.lock();
        let change = |before: &mut bool| std::mem::replace(before, paused) != paused;
        if self.0.paused.send_if_modified(change) {
            current.channel = None;
        }
    }
}

impl Consumer {
    /// Starts consuming; connects, and reconnects, on its own.
    pub fn start(link: Link, spec: ConsumerSpec) -> Self {
        let (to_owner, deliveries) = mpsc::channel(usize::from(spec.prefetch).max(1));
        let shared = Arc::new(ConsumerState::new(link, spec.prefetch));
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

    /// The hand that interrupts.
    pub fn pauser(&self) -> Pauser {
        Pauser(Arc::clone(&self.shared))
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

    /// How many deliveries of the current channel are neither acknowledged nor handed back.
    pub fn unsettled(&self) -> usize {
        self.0.lock().flow.unsettled()
    }
}

/// Hands something over to lapin, which writes it in its turn; `false` if the channel takes nothing.
///
/// Whether it was written says nothing about whether it arrived, so to wait for that would only cost a
/// trip to lapin's thread and back.
fn handed_over(sending: impl Future<Output = lapin::Result<()>>) -> bool {
    !matches!(sending.now_or_never(), Some(Err(_)))
}
