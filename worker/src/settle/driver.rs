//! The task that settles: carries out what [`SettleCore`] says, and tells it what the broker answers.

use std::pin::Pin;
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt};
use garenne_common::broker::{BrokerError, Outgoing, Publisher, Settler};
use garenne_common::guards::Guard;
use tokio::sync::mpsc;

use super::bundle::MAX_REPORTS;
use super::core::{Action, Answer, SettleCore, Ticket};
use super::order::Settlement;

type Pending = Pin<Box<dyn Future<Output = (Ticket, Answer)> + Send>>;

/// The task that settles.
pub(crate) struct SettleTask {
    pub(crate) inbox: mpsc::Receiver<Settlement>,
    pub(crate) core: SettleCore,
    pub(crate) publisher: Publisher,
    /// One for each queue of the worker, in the order of the core's lanes.
    pub(crate) settlers: Vec<Settler>,
}

impl SettleTask {
    /// Settles until every sender is gone and everything taken in is answered.
    pub(crate) async fn run(mut self) {
        let mut pending = FuturesUnordered::<Pending>::new();
        let (mut arrived, mut actions) = (Vec::with_capacity(MAX_REPORTS), Vec::new());
        let mut open = true;
        while open || !self.core.is_idle() {
            tokio::select! {
                Some((ticket, answer)) = pending.next() => {
                    self.core.answered(ticket, answer, &mut actions);
                }
                count = self.inbox.recv_many(&mut arrived, MAX_REPORTS),
                    if open && self.core.has_room() =>
                {
                    open = count > 0;
                    for settlement in arrived.drain(..) {
                        self.core.settle(settlement, &mut actions);
                    }
                }
            }
            self.core.flush(&mut actions);
            for action in actions.drain(..) {
                self.carry_out(action, &mut pending).await;
            }
        }
    }

    async fn carry_out(&self, action: Action, pending: &mut FuturesUnordered<Pending>) {
        match action {
            Action::Publish { ticket, outgoing } => {
                let answer = publish(self.publisher.clone(), ticket, outgoing);
                pending.push(Box::pin(answer));
            }
            Action::Reply(outgoing) => {
                if let Err(error) = self.publisher.send_and_forget(outgoing).await {
                    tracing::debug!(%error, "a reply was not sent");
                }
            }
            Action::Acknowledge { lane, ack } => {
                if !self.settlers[lane].ack(ack.tag, ack.multiple) {
                    // Its channel is gone: it comes again, and `Inflight` knows it as settled.
                    tracing::debug!(?ack, "the acknowledgement came too late");
                }
            }
            Action::HandBack(delivery) => {
                self.settlers[delivery.queue].requeue(delivery.tag);
            }
        }
    }
}

async fn publish(publisher: Publisher, ticket: Ticket, outgoing: Outgoing) -> (Ticket, Answer) {
    if !Guard::SuccessorBeforeAck.holds() {
        drop(publisher.send_and_forget(outgoing).await);
        return (ticket, Answer::Confirmed);
    }
    let answer = match until_taken(&publisher, outgoing).await {
        Ok(()) => Answer::Confirmed,
        Err(BrokerError::Closed) => Answer::Unknown,
        Err(error) => {
            tracing::error!(%error, "a successor cannot be published; handing the tasks back");
            // They may come straight back here.
            tokio::time::sleep(Duration::from_secs(1)).await;
            Answer::Impossible
        }
    };
    (ticket, answer)
}

/// Publishes until the broker has it. A refusal (a full queue, a permission that was revoked, an
/// exchange that is gone) may pass, and to hand the task back would only make it run again.
async fn until_taken(publisher: &Publisher, outgoing: Outgoing) -> Result<(), BrokerError> {
    let mut pause = Duration::from_millis(100);
    loop {
        let confirmed = publisher.send(outgoing.clone()).await?.confirmed().await;
        match confirmed {
            Err(
                refused @ (BrokerError::Rejected(_)
                | BrokerError::Forbidden(_)
                | BrokerError::Missing(_)),
            ) => {
                tracing::warn!("a successor is not published yet, trying again: {refused}");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_secs(5));
            }
            other => return other,
        }
    }
}
