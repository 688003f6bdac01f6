//! Publishing with confirms: [`Outgoing`] messages come in, the broker's confirms come back as
//! [`Receipt`]s.
//!
//! The handles in this module share one task ([`PublishTask`]), which owns the channel, because
//! lapin may swap the confirms of publishes that different tasks put on one channel. `mandatory` is
//! never used: its returns are attributed to the wrong publish when several are under way, so every
//! exchange that carries tasks has an alternate exchange instead.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use super::publish_task::{PublishTask, PublisherState, PublisherStatus};
use super::window::PendingMessage;
use super::{BrokerError, Link};
use crate::config::BrokerConfig;
use crate::failpoints::Protection;
use crate::topology::Declaration;
use crate::wire::Message;

/// A message and its destination.
#[derive(Debug, Clone, PartialEq)]
pub struct Outgoing {
    /// The exchange; empty for the default exchange, which routes by queue name.
    pub exchange: String,
    /// The routing key.
    pub routing_key: String,
    /// The message. It is published persistent.
    pub message: Message,
}

/// Hands messages to the publishing task. Clones share the task.
#[derive(Clone)]
pub struct Publisher {
    messages: mpsc::Sender<PendingMessage>,
    state: Arc<PublisherState>,
}

/// The confirm of one message, still to come. Dropping it withdraws a message that was not sent
/// yet.
pub struct Receipt {
    confirm: oneshot::Receiver<Result<(), BrokerError>>,
}

impl Receipt {
    /// Waits for the confirm, without a limit while the broker is away; for callers that keep the
    /// message in another place.
    ///
    /// Fails with [`BrokerError::Rejected`] if the broker rejects the message, and with
    /// [`BrokerError::TooLong`] if AMQP cannot carry it.
    pub async fn confirmed(self) -> Result<(), BrokerError> {
        self.confirm.await.unwrap_or(Err(BrokerError::Closed))
    }
}

/// The right to hand over one message without waiting.
///
/// A task that drives futures of its own selects over them and [`Publisher::room`] together. If it
/// awaited room alone, one of those futures could be first in line for room and would not be
/// polled.
pub struct Room<'p>(mpsc::Permit<'p, PendingMessage>);

impl Room<'_> {
    /// Hands over a message.
    pub fn send(self, outgoing: Outgoing) -> Receipt {
        let (message, receipt) = with_receipt(outgoing);
        self.0.send(message);
        receipt
    }

    /// Hands over a message that is sent once and whose confirm is not reported.
    pub fn send_and_forget(self, outgoing: Outgoing) {
        self.0.send(PendingMessage::new(outgoing, None));
    }
}

impl Publisher {
    /// Starts the task. It connects in the background and declares `declarations` on every new
    /// channel.
    pub fn start(link: Link, declarations: Vec<Declaration>, config: &BrokerConfig) -> Self {
        let (messages, inbox) = mpsc::channel(config.publish_window);
        let state = Arc::new(PublisherState::new(link, config.publish_timeout));
        let task = PublishTask::new(Arc::clone(&state), declarations, config.publish_window, inbox);
        state.task.spawn(task.run());
        state.task.close();
        Self { messages, state }
    }

    /// Waits until the declarations were made once.
    ///
    /// Fails with the first error that is not transient.
    pub async fn ready(&self) -> Result<(), BrokerError> {
        let permanent = |error: &BrokerError| !error.is_transient();
        let decided = |status: &PublisherStatus| {
            status.opened || status.error.as_ref().is_some_and(permanent)
        };
        let mut status = self.state.status.subscribe();
        match status.wait_for(decided).await {
            Ok(status) if status.opened => Ok(()),
            Ok(status) => Err(status.error.clone().unwrap_or(BrokerError::Closed)),
            Err(_) => Err(BrokerError::Closed),
        }
    }

    /// Publishes and waits for the broker's confirm, at most the configured `publish_timeout`.
    ///
    /// After an error the message may or may not have arrived, unless it is `Rejected` or
    /// `TooLong`. Another attempt should use the same message id.
    pub fn publish(&self, outgoing: Outgoing) -> impl Future<Output = Result<(), BrokerError>> {
        self.publish_within(outgoing, self.state.timeout)
    }

    /// [`publish`](Self::publish) with a time limit of the caller.
    pub fn publish_within(
        &self,
        outgoing: Outgoing,
        limit: Duration,
    ) -> impl Future<Output = Result<(), BrokerError>> {
        // Prepared outside the future, which would otherwise hold a whole message and be moved with
        // it.
        let (message, receipt) = with_receipt(outgoing);
        async move {
            let confirmed = async {
                self.enqueue(message).await?;
                receipt.confirmed().await
            };
            let limit =
                if Protection::PublishDeadline.is_enabled() { limit } else { Duration::MAX };
            match timeout(limit, confirmed).await {
                Ok(result) => result,
                Err(_) => Err(self.timeout_error(limit)),
            }
        }
    }

    /// Hands a message over and returns before it is confirmed; waits only for room in the window.
    ///
    /// The future must be polled all the time: see [`publish`](Self::publish) for futures that may
    /// not be.
    pub fn send(&self, outgoing: Outgoing) -> impl Future<Output = Result<Receipt, BrokerError>> {
        let (message, receipt) = with_receipt(outgoing);
        async move {
            self.hand_over(message).await?;
            Ok(receipt)
        }
    }

    /// Waits for room in the window.
    pub async fn room(&self) -> Result<Room<'_>, BrokerError> {
        self.messages.reserve().await.map(Room).map_err(|_| BrokerError::Closed)
    }

    /// [`room`](Self::room), or `None` if there is none at the moment.
    pub fn try_room(&self) -> Option<Room<'_>> {
        self.messages.try_reserve().ok().map(Room)
    }

    /// Sends a message once and reports no confirm; waits only for room in the window.
    pub async fn send_and_forget(&self, outgoing: Outgoing) -> Result<(), BrokerError> {
        self.hand_over(PendingMessage::new(outgoing, None)).await
    }

    /// Sends a message once if there is room at the moment. `false` if there is none and nothing
    /// was sent.
    pub fn offer(&self, outgoing: Outgoing) -> bool {
        self.messages.try_send(PendingMessage::new(outgoing, None)).is_ok()
    }

    /// Messages handed over and not yet taken by the publishing task. Those that wait for their
    /// confirms are not counted.
    pub fn queued(&self) -> usize {
        self.messages.max_capacity() - self.messages.capacity()
    }

    /// How long [`publish`](Self::publish) waits.
    pub fn deadline(&self) -> Duration {
        self.state.timeout
    }

    /// Why nothing can be published at the moment, if that is known.
    pub fn current_error(&self) -> Option<BrokerError> {
        self.state.status.borrow().error.clone()
    }

    /// Whether the broker has stopped accepting messages (a memory or disk alarm).
    pub fn is_blocked(&self) -> bool {
        self.state.link.is_blocked()
    }

    /// Whether the broker is reachable and accepts messages, so that a confirm missing after
    /// [`confirm_timeout`](Self::confirm_timeout) is its failure.
    pub fn expects_confirms(&self) -> bool {
        let unconfirmed = |error| matches!(error, BrokerError::Unconfirmed(_));
        !self.is_blocked() && self.current_error().is_none_or(unconfirmed)
    }

    /// How long a confirm may take before the message is sent over another channel.
    pub fn confirm_timeout(&self) -> Duration {
        self.state.confirm_timeout()
    }

    /// The error for a caller that has waited `waited` in vain: the current one, if any is known.
    pub fn timeout_error(&self, waited: Duration) -> BrokerError {
        match self.current_error() {
            Some(error) => error,
            None if self.is_blocked() => BrokerError::Blocked(waited),
            None => BrokerError::Unconfirmed(waited),
        }
    }

    /// Waits until everything handed over is confirmed, at most `grace`, then closes the
    /// connection.
    pub async fn close(self, grace: Duration) {
        let Self { messages, state } = self;
        drop(messages);
        // Other tasks may hold clones; the token makes the task end when it has nothing left to do.
        state.stop.cancel();
        if timeout(grace, state.task.wait()).await.is_err() {
            tracing::warn!("some messages were not confirmed before closing");
        }
        state.link.close().await;
    }

    /// Hands a message over for a future that may not be polled: while there is no room, a task
    /// waits for it. Room is granted in order, so an unpolled future in line would block all others
    /// of this process.
    async fn enqueue(&self, message: PendingMessage) -> Result<(), BrokerError> {
        let message = match self.messages.try_send(message) {
            Ok(()) => return Ok(()),
            Err(mpsc::error::TrySendError::Closed(_)) => return Err(BrokerError::Closed),
            Err(mpsc::error::TrySendError::Full(message)) => message,
        };
        let messages = self.messages.clone();
        let waiting = self.state.task.spawn(async move { messages.send(message).await.is_ok() });
        // Dropping the handle withdraws the message.
        match AbortOnDropHandle::new(waiting).await {
            Ok(true) => Ok(()),
            Ok(false) | Err(_) => Err(BrokerError::Closed),
        }
    }

    async fn hand_over(&self, message: PendingMessage) -> Result<(), BrokerError> {
        self.messages.send(message).await.map_err(|_| BrokerError::Closed)
    }
}

fn with_receipt(outgoing: Outgoing) -> (PendingMessage, Receipt) {
    let (sender, confirm) = oneshot::channel();
    (PendingMessage::new(outgoing, Some(sender)), Receipt { confirm })
}
