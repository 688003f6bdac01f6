//! The task that settles: carries out what [`SettleCore`] says, and tells it what the broker answers.
//!
//! It waits for all its inputs at once (settlements, confirms, room at the publisher) and for nothing
//! in line: the publishes that it has begun are polled by nobody else, so while it waited for room in
//! line, the one that stands first in the queue for room could not take it, and the worker would stop
//! for ever.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::stream::{FuturesUnordered, StreamExt};
use garenne_common::broker::{BrokerError, Outgoing, Publisher, Receipt, Room, Settler};
use garenne_common::failpoints::Protection;
use tokio::sync::mpsc;

use super::bundle::MAX_REPORTS;
use super::core::{Action, Answer, Outbound, SettleCore, Ticket};
use super::gauge::SettleGauge;
use super::order::Settlement;

type Answered = Pin<Box<dyn Future<Output = (Ticket, Answer)> + Send>>;

/// The task that settles.
pub(crate) struct SettleTask {
    pub(crate) inbox: mpsc::Receiver<Settlement>,
    pub(crate) core: SettleCore,
    pub(crate) publisher: Publisher,
    /// One for each queue of the worker, in the order of the core's lanes.
    pub(crate) settlers: Vec<Settler>,
    pub(crate) gauge: Arc<SettleGauge>,
}

impl SettleTask {
    /// Settles until every sender is gone and everything taken in is answered.
    pub(crate) async fn run(self) {
        let Self { mut inbox, mut core, publisher, settlers, gauge } = self;
        let mut unconfirmed = Unconfirmed::default();
        let (mut arrived, mut actions) = (Vec::with_capacity(MAX_REPORTS), Vec::new());
        let mut open = true;
        while open || !core.is_idle() {
            tokio::select! {
                Some((ticket, answer)) = unconfirmed.answers.next() => {
                    unconfirmed.since.remove(&ticket);
                    core.answered(ticket, answer, &mut actions);
                }
                room = publisher.room(), if core.wants_room() => match room {
                    Ok(room) => unconfirmed.publish(&publisher, room, core.room()),
                    Err(_) => core.no_more_room(&mut actions),
                },
                count = inbox.recv_many(&mut arrived, MAX_REPORTS), if open && core.has_room() => {
                    open = count > 0;
                    for settlement in arrived.drain(..) {
                        core.settle(settlement, &mut actions);
                    }
                }
            }
            core.flush(&mut actions);
            for action in actions.drain(..) {
                carry_out(action, &settlers);
            }
            if !Protection::RoomAsInput.is_enabled() {
                unconfirmed.publish_in_line(&publisher, &mut core).await;
            }
            while core.wants_room()
                && let Some(room) = publisher.try_room()
            {
                unconfirmed.publish(&publisher, room, core.room());
            }
            gauge.update(core.concluded(), unconfirmed.oldest());
        }
    }
}

fn carry_out(action: Action, settlers: &[Settler]) {
    match action {
        Action::Acknowledge { lane, ack } => {
            if !settlers[lane].ack(ack.tag, ack.multiple) {
                // Its channel is gone: it comes again, and `Inflight` knows it as settled.
                tracing::debug!(?ack, "the acknowledgement came too late");
            }
        }
        Action::HandBack(delivery) => {
            settlers[delivery.queue].requeue(delivery.tag);
        }
    }
}

/// Successors that are handed to the publisher and not answered yet.
#[derive(Default)]
struct Unconfirmed {
    answers: FuturesUnordered<Answered>,
    since: BTreeMap<Ticket, Instant>,
}

impl Unconfirmed {
    fn publish(&mut self, publisher: &Publisher, room: Room<'_>, outbound: Option<Outbound>) {
        match outbound {
            Some(Outbound::Successor { ticket, outgoing }) => {
                let receipt = room.send(outgoing.clone());
                self.await_answer(publisher, ticket, outgoing, receipt);
            }
            Some(Outbound::Reply(outgoing)) => room.send_and_forget(outgoing),
            None => {}
        }
    }

    fn await_answer(
        &mut self,
        publisher: &Publisher,
        ticket: Ticket,
        outgoing: Outgoing,
        receipt: Receipt,
    ) {
        let publisher = publisher.clone();
        self.since.insert(ticket, Instant::now());
        self.answers.push(Box::pin(async move {
            if !Protection::SuccessorBeforeAck.is_enabled() {
                return (ticket, Answer::Confirmed);
            }
            (ticket, answer(&publisher, outgoing, receipt).await)
        }));
    }

    /// When the oldest one was handed over.
    fn oldest(&self) -> Option<Instant> {
        // Tickets ascend, and so do the times.
        self.since.first_key_value().map(|(_, since)| *since)
    }

    /// The mistake that [`Protection::RoomAsInput`] protects from.
    async fn publish_in_line(&mut self, publisher: &Publisher, core: &mut SettleCore) {
        while let Some(outbound) = core.room() {
            match outbound {
                Outbound::Successor { ticket, outgoing } => {
                    let publisher = publisher.clone();
                    self.since.insert(ticket, Instant::now());
                    self.answers.push(Box::pin(async move {
                        match publisher.send(outgoing.clone()).await {
                            Ok(receipt) => (ticket, answer(&publisher, outgoing, receipt).await),
                            Err(_) => (ticket, Answer::Unknown),
                        }
                    }));
                }
                Outbound::Reply(outgoing) => drop(publisher.send_and_forget(outgoing).await),
            }
        }
    }
}

/// The broker's answer, however long it takes.
async fn answer(publisher: &Publisher, outgoing: Outgoing, receipt: Receipt) -> Answer {
    match until_taken(publisher, outgoing, receipt).await {
        Ok(()) => Answer::Confirmed,
        Err(BrokerError::Closed) => Answer::Unknown,
        Err(error) => {
            tracing::error!(%error, "a successor cannot be published; handing the tasks back");
            // They may come straight back here.
            tokio::time::sleep(Duration::from_secs(1)).await;
            Answer::Impossible
        }
    }
}

/// Publishes until the broker has it. A refusal (a full queue, a permission that was revoked, an
/// exchange that is gone) may pass, and to hand the task back would only make it run again.
async fn until_taken(
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
