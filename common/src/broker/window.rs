//! What one channel has been given to publish and has not confirmed yet.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::stream::{FuturesUnordered, StreamExt};
use lapin::options::BasicPublishOptions;
use lapin::{Channel, Confirmation};
use tokio::sync::oneshot;

use super::convert::{short, to_properties};
use super::{BrokerError, Outgoing};
use crate::failpoints::Protection;

type Answer = oneshot::Sender<Result<(), BrokerError>>;

/// A message on its way, and who waits for its confirm.
pub(super) struct Job {
    /// Boxed, because a job changes hands often and a message has half a kilobyte of fields.
    pub(super) outgoing: Box<Outgoing>,
    /// How many channels ended while this message was alone on them.
    pub(super) strikes: u32,
    /// When it was last put on a channel.
    written: Option<Instant>,
    /// `None` for messages that nobody waits for and that are not sent again.
    pub(super) answer: Option<Answer>,
}

type Verdict = Result<Confirmation, lapin::Error>;

/// What is on the channel and not yet confirmed.
#[derive(Default)]
pub(super) struct Window<'c> {
    next: u64,
    pub(super) jobs: BTreeMap<u64, Job>,
    pub(super) confirmed_any: bool,
    /// When the broker first refused a message on this channel.
    pub(super) refused: Option<Instant>,
    pub(super) confirms: FuturesUnordered<Numbered<'c>>,
}

type Numbered<'c> = std::pin::Pin<Box<dyn Future<Output = (u64, Verdict)> + Send + 'c>>;

impl<'c> Window<'c> {
    pub(super) fn len(&self) -> usize {
        self.jobs.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.jobs.is_empty()
    }

    /// The oldest message, and how long it has waited for its confirm, counted from `since` at the
    /// earliest.
    pub(super) fn oldest(&self, since: Instant) -> Option<(&Job, Duration)> {
        let (_, job) = self.jobs.first_key_value()?;
        Some((job, job.written?.max(since).elapsed()))
    }

    /// Puts one message on the channel. A message that AMQP cannot carry fails alone; an error means
    /// that the channel is gone, and the message is in the window with the others.
    pub(super) fn publish(
        &mut self,
        channel: &'c Channel,
        mut job: Job,
    ) -> Result<(), BrokerError> {
        let out = &job.outgoing;
        let parts = (short(&out.exchange), short(&out.routing_key), to_properties(&out.message));
        let (exchange, key, properties) = match parts {
            (Ok(exchange), Ok(key), Ok(properties)) => (exchange, key, properties),
            (Err(error), _, _) | (_, Err(error), _) | (_, _, Err(error)) => {
                job.answer(Err(error));
                return Ok(());
            }
        };
        let (number, body) = (self.next, out.message.body.clone());
        let mut verdict: Numbered<'c> = Box::pin(async move {
            let options = BasicPublishOptions::default();
            let written = channel.basic_publish(exchange, key, options, &body, properties).await;
            let verdict = match written {
                Ok(confirm) => confirm.await,
                Err(error) => Err(error),
            };
            (number, verdict)
        });
        self.next += 1;
        job.written = Some(Instant::now());
        if Protection::ConfirmWait.is_enabled() {
            self.jobs.insert(number, job);
        } else {
            job.answer(Ok(()));
        }
        // The first poll hands the message over to lapin. The later ones wait until it is written,
        // under an alarm until that is over, and then for the confirm. To await the write here would
        // cost a trip to lapin's thread and back, and a write of its own, for every message.
        if let Some((number, verdict)) = verdict.as_mut().now_or_never() {
            return self.conclude(number, verdict);
        }
        self.confirms.push(verdict);
        Ok(())
    }

    /// Concludes `first` and every confirm that is here besides; how many those were. One confirm of
    /// the broker's often stands for many messages.
    pub(super) fn conclude_ready(&mut self, first: (u64, Verdict)) -> Result<usize, BrokerError> {
        let (mut next, mut count) = (Some(first), 0);
        while let Some((number, verdict)) = next {
            self.conclude(number, verdict)?;
            count += 1;
            next = self.confirms.next().now_or_never().flatten();
        }
        Ok(count)
    }

    /// Tells the caller what the broker said. An error means that the channel is gone.
    pub(super) fn conclude(&mut self, number: u64, verdict: Verdict) -> Result<(), BrokerError> {
        let answer = match verdict {
            Ok(Confirmation::Ack(_)) => Ok(()),
            Ok(Confirmation::Nack(_)) => {
                self.refused.get_or_insert_with(Instant::now);
                Err(())
            }
            // Without confirm mode nothing is known; the channel cannot be trusted.
            Ok(Confirmation::NotRequested) => {
                return Err(BrokerError::Lost("the channel is not in confirm mode".to_owned()));
            }
            Err(error) => return Err(BrokerError::operating(&error, "an exchange")),
        };
        self.confirmed_any = true;
        if let Some(job) = self.jobs.remove(&number) {
            let key = job.outgoing.routing_key.clone();
            job.answer(answer.map_err(|()| BrokerError::Rejected(key)));
        }
        Ok(())
    }
}

impl Job {
    pub(super) fn new(outgoing: Outgoing, answer: Option<Answer>) -> Self {
        Self { outgoing: Box::new(outgoing), strikes: 0, written: None, answer }
    }

    pub(super) fn is_withdrawn(&self) -> bool {
        self.answer.as_ref().is_some_and(oneshot::Sender::is_closed)
    }

    pub(super) fn answer(self, answer: Result<(), BrokerError>) {
        if let Some(sender) = self.answer
            && sender.send(answer).is_err()
        {
            tracing::trace!("nobody waits for this confirm any more");
        }
    }
}
