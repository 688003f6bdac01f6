//! The messages that one channel was given to publish and has not confirmed yet.
//!
//! Messages come in, results go to their senders. Nothing is sent again here.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::stream::{FuturesUnordered, StreamExt};
use lapin::options::BasicPublishOptions;
use lapin::{Channel, Confirmation};
use tokio::sync::oneshot;

use super::convert::{short, to_properties};
use super::{BrokerError, Outgoing};

type ConfirmSender = oneshot::Sender<Result<(), BrokerError>>;

/// A message to be published, and where its confirm is reported.
pub(super) struct PendingMessage {
    /// Boxed, because it is moved often and a message has half a kilobyte of fields.
    pub(super) outgoing: Box<Outgoing>,
    /// How many channels ended while this message was alone on them.
    pub(super) lone_failures: u32,
    /// When it was last put on a channel.
    published_at: Option<Instant>,
    /// `None` for messages that are sent once and whose confirm is not reported.
    sender: Option<ConfirmSender>,
}

/// The number of a message on its channel, and the outcome of its publish.
pub(super) type NumberedResult = (u64, Result<Confirmation, lapin::Error>);

type NumberedConfirm<'c> = std::pin::Pin<Box<dyn Future<Output = NumberedResult> + Send + 'c>>;

/// The unconfirmed messages of one channel.
#[derive(Default)]
pub(super) struct Window<'c> {
    next: u64,
    /// By their number on the channel.
    pub(super) messages: BTreeMap<u64, PendingMessage>,
    pub(super) confirmed_any: bool,
    /// When the broker first rejected a message on this channel.
    pub(super) rejecting_since: Option<Instant>,
    pub(super) confirms: FuturesUnordered<NumberedConfirm<'c>>,
}

impl<'c> Window<'c> {
    pub(super) fn len(&self) -> usize {
        self.messages.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// The oldest message, and how long it has waited for its confirm, counted from `since` at the
    /// earliest.
    pub(super) fn oldest(&self, since: Instant) -> Option<(&PendingMessage, Duration)> {
        let (_, message) = self.messages.first_key_value()?;
        Some((message, message.published_at?.max(since).elapsed()))
    }

    /// Puts one message on the channel. A message that AMQP cannot carry fails alone; an error
    /// means that the channel is lost, and the message is in the window with the others.
    pub(super) fn publish(
        &mut self,
        channel: &'c Channel,
        mut message: PendingMessage,
    ) -> Result<(), BrokerError> {
        let out = &message.outgoing;
        let parts = (short(&out.exchange), short(&out.routing_key), to_properties(&out.message));
        let (exchange, key, properties) = match parts {
            (Ok(exchange), Ok(key), Ok(properties)) => (exchange, key, properties),
            (Err(error), _, _) | (_, Err(error), _) | (_, _, Err(error)) => {
                message.complete(Err(error));
                return Ok(());
            }
        };
        let (number, body) = (self.next, out.message.body.clone());
        let mut confirm: NumberedConfirm<'c> = Box::pin(async move {
            let options = BasicPublishOptions::default();
            let written = channel.basic_publish(exchange, key, options, &body, properties).await;
            let result = match written {
                Ok(confirm) => confirm.await,
                Err(error) => Err(error),
            };
            (number, result)
        });
        self.next += 1;
        message.published_at = Some(Instant::now());
        self.messages.insert(number, message);
        #[cfg(feature = "failpoints")]
        super::sabotage::report_unconfirmed(self, number);
        // The first poll hands the message over to lapin. Later ones wait for the write (during an
        // alarm, for its end) and then for the confirm. Awaiting the write here would cost a round
        // trip to lapin's thread, and a write of its own, for every message.
        if let Some((number, result)) = confirm.as_mut().now_or_never() {
            return self.conclude(number, result);
        }
        self.confirms.push(confirm);
        Ok(())
    }

    /// Concludes `first` and every other confirm that has arrived; returns their number. One
    /// confirm of the broker often stands for many messages.
    pub(super) fn conclude_ready(&mut self, first: NumberedResult) -> Result<usize, BrokerError> {
        let (mut next, mut count) = (Some(first), 0);
        while let Some((number, result)) = next {
            self.conclude(number, result)?;
            count += 1;
            next = self.confirms.next().now_or_never().flatten();
        }
        Ok(count)
    }

    /// Reports the result of a publish to the sender. An error means that the channel is lost.
    fn conclude(
        &mut self,
        number: u64,
        result: Result<Confirmation, lapin::Error>,
    ) -> Result<(), BrokerError> {
        let accepted = match result {
            Ok(Confirmation::Ack(_)) => true,
            Ok(Confirmation::Nack(_)) => {
                self.rejecting_since.get_or_insert_with(Instant::now);
                false
            }
            // Without confirm mode nothing is known, and the channel is useless.
            Ok(Confirmation::NotRequested) => {
                return Err(BrokerError::Lost("the channel is not in confirm mode".to_owned()));
            }
            Err(error) => return Err(BrokerError::operating(&error, "an exchange")),
        };
        self.confirmed_any = true;
        if let Some(message) = self.messages.remove(&number) {
            let rejected = || BrokerError::Rejected(message.outgoing.routing_key.clone());
            let result = if accepted { Ok(()) } else { Err(rejected()) };
            message.complete(result);
        }
        Ok(())
    }
}

impl PendingMessage {
    pub(super) fn new(outgoing: Outgoing, sender: Option<ConfirmSender>) -> Self {
        Self { outgoing: Box::new(outgoing), lone_failures: 0, published_at: None, sender }
    }

    /// Whether the confirm is reported to anybody. Only such messages are sent again.
    pub(super) fn has_sender(&self) -> bool {
        self.sender.is_some()
    }

    /// Whether the sender has dropped its receipt.
    pub(super) fn is_withdrawn(&self) -> bool {
        self.sender.as_ref().is_some_and(oneshot::Sender::is_closed)
    }

    /// Reports the result to the sender.
    pub(super) fn complete(self, result: Result<(), BrokerError>) {
        if let Some(sender) = self.sender
            && sender.send(result).is_err()
        {
            tracing::trace!("the receipt of a published message was dropped");
        }
    }
}
