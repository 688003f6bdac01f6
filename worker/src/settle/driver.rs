//! The settlement task: does what [`SettleCore`] decides, and tells it what the broker confirms.
//!
//! It waits for all of its inputs (settlements, confirms, room at the publisher) at the same time and for
//! none of them alone. The publishes that it has begun are polled here only: while it waited for room alone,
//! the one that is first in the queue for room could not take it, and the worker would stop for ever.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::stream::{FuturesUnordered, StreamExt};
use garenne_common::broker::{BrokerError, Outgoing, Publisher, Receipt, Room};
use garenne_common::failpoints::Protection;
use tokio::sync::mpsc;

use super::core::{Action, Outbound, SettleCore, Ticket};
use super::progress::SettleProgress;
use super::reports::MAX_REPORTS;
use super::settlement::Settlement;
use crate::intake::queue::ServedQueue;

/// How long tasks wait whose successor cannot be published, before they are requeued: they may come back
/// at once.
const REQUEUE_DELAY: Duration = Duration::from_secs(1);

type PendingConfirm = Pin<Box<dyn Future<Output = (Ticket, Result<(), BrokerError>)> + Send>>;

/// The settlement task.
pub(crate) struct SettleTask {
    pub(crate) inbox: mpsc::Receiver<Settlement>,
    pub(crate) core: SettleCore,
    pub(crate) publisher: Publisher,
    pub(crate) queues: Arc<[ServedQueue]>,
    pub(crate) progress: Arc<SettleProgress>,
}

impl SettleTask {
    /// Settles until all senders are dropped and all settlements are complete.
    pub(crate) async fn run(self) {
        let Self { mut inbox, mut core, publisher, queues, progress } = self;
        let mut pending = PendingConfirms::default();
        let (mut received, mut actions) = (Vec::with_capacity(MAX_REPORTS), Vec::new());
        let mut open = true;
        while open || !core.is_idle() {
            tokio::select! {
                Some((ticket, result)) = pending.confirms.next() => {
                    pending.since.remove(&ticket);
                    core.confirm(ticket, &result, &mut actions);
                }
                room = publisher.room(), if core.wants_room() => match room {
                    Ok(room) => pending.publish(&publisher, room, core.next_message()),
                    Err(_) => core.publisher_stopped(&mut actions),
                },
                count = inbox.recv_many(&mut received, MAX_REPORTS), if open && core.has_room() => {
                    open = count > 0;
                    for settlement in received.drain(..) {
                        core.settle(settlement, &mut actions);
                    }
                }
            }
            core.flush(&mut actions);
            for action in actions.drain(..) {
                carry_out(action, &queues);
            }
            #[cfg(feature = "failpoints")]
            if !Protection::RoomAsInput.is_enabled() {
                sabotage::wait_for_room(&mut pending, &publisher, &mut core).await;
            }
            while core.wants_room()
                && let Some(room) = publisher.try_room()
            {
                pending.publish(&publisher, room, core.next_message());
            }
            progress.update(core.concluded(), pending.oldest());
        }
    }
}

fn carry_out(action: Action, queues: &[ServedQueue]) {
    match action {
        Action::Acknowledge { queue, ack } => {
            if !queues[queue.0].settler.ack(ack.tag, ack.multiple) {
                // The channel is closed. The delivery comes again and is known as settled.
                tracing::debug!(?ack, "acknowledgement of a closed channel dropped");
            }
        }
        Action::Requeue(delivery) => {
            queues[delivery.queue.0].settler.requeue(delivery.tag);
        }
    }
}

/// Successors that have been given to the publisher and are not confirmed yet.
#[derive(Default)]
struct PendingConfirms {
    confirms: FuturesUnordered<PendingConfirm>,
    since: BTreeMap<Ticket, Instant>,
}

impl PendingConfirms {
    fn publish(&mut self, publisher: &Publisher, room: Room<'_>, outbound: Option<Outbound>) {
        match outbound {
            Some(Outbound { ticket: Some(ticket), outgoing }) => {
                let receipt = room.send(outgoing.clone());
                self.add(ticket, confirmed(publisher.clone(), outgoing, receipt));
            }
            Some(Outbound { ticket: None, outgoing }) => room.send_and_forget(outgoing),
            None => {}
        }
    }

    fn add(
        &mut self,
        ticket: Ticket,
        confirmed: impl Future<Output = Result<(), BrokerError>> + Send + 'static,
    ) {
        self.since.insert(ticket, Instant::now());
        self.confirms.push(Box::pin(async move {
            if !Protection::SuccessorBeforeAck.is_enabled() {
                return (ticket, Ok(()));
            }
            (ticket, confirmed.await)
        }));
    }

    /// When the oldest unconfirmed successor was published.
    fn oldest(&self) -> Option<Instant> {
        // Tickets and times ascend together.
        self.since.first_key_value().map(|(_, since)| *since)
    }
}

/// Waits for the confirm, without a time limit.
async fn confirmed(
    publisher: Publisher,
    outgoing: Outgoing,
    receipt: Receipt,
) -> Result<(), BrokerError> {
    let result = publish_until_accepted(&publisher, outgoing, receipt).await;
    if let Err(error) = &result
        && !matches!(error, BrokerError::Closed)
    {
        tracing::error!(%error, "a successor cannot be published; requeueing its tasks");
        tokio::time::sleep(REQUEUE_DELAY).await;
    }
    result
}

/// Publishes until the broker accepts the message. The reason of a refusal (a full queue, a revoked
/// permission, a deleted exchange) may pass, and requeueing the task would only make it run again.
async fn publish_until_accepted(
    publisher: &Publisher,
    outgoing: Outgoing,
    first: Receipt,
) -> Result<(), BrokerError> {
    let (mut receipt, mut pause) = (first, Duration::from_millis(100));
    loop {
        match receipt.confirmed().await {
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
        receipt = publisher.send(outgoing.clone()).await?;
    }
}

#[cfg(feature = "failpoints")]
mod sabotage {
    use super::*;

    /// Waits for room alone, the mistake that [`Protection::RoomAsInput`] prevents.
    pub(super) async fn wait_for_room(
        pending: &mut PendingConfirms,
        publisher: &Publisher,
        core: &mut SettleCore,
    ) {
        while let Some(Outbound { ticket, outgoing }) = core.next_message() {
            let Some(ticket) = ticket else {
                drop(publisher.send_and_forget(outgoing).await);
                continue;
            };
            let publisher = publisher.clone();
            pending.add(ticket, async move {
                let receipt = publisher.send(outgoing.clone()).await?;
                confirmed(publisher, outgoing, receipt).await
            });
        }
    }
}
