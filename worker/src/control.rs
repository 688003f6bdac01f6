//! Keeps the worker's list of what is to be cancelled in step with the collector's.
//!
//! New wishes come by the exchange `control` to an exclusive queue; the same queue takes the answers
//! when the worker asks for wishes that it missed: at its start, after every reconnect and every
//! [`ASK_AGAIN`]. A question that nobody answers lies in its queue until the next one is asked, so a
//! collector that comes up later answers at once.

use std::sync::Arc;
use std::time::Duration;

use garenne_common::broker::{Consumer, Outgoing, Publisher};
use garenne_common::topology::Topology;
use garenne_common::wire::control::CONTROL_KIND;
use garenne_common::wire::{Control, Message, Query, Response};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::cancels::Cancels;

/// How often the collector is asked although nothing happened: a broadcast may have been lost.
const ASK_AGAIN: Duration = Duration::from_secs(30);
/// Deliveries between the connection and this task, which never waits for long.
pub(crate) const BUFFER: u16 = 64;

/// Hears and asks.
pub(crate) struct Listener {
    pub(crate) consumer: Consumer,
    pub(crate) publisher: Publisher,
    pub(crate) topology: Topology,
    pub(crate) cancels: Arc<Cancels>,
    /// Becomes true when the collector has answered once, to the end of its list.
    pub(crate) in_step: watch::Sender<bool>,
    pub(crate) stop: CancellationToken,
}

/// A reading of the collector's whole list, page by page.
#[derive(Default)]
struct Reading {
    /// Marks the answers that belong to it.
    number: u64,
    /// The last number read.
    after: u64,
    live: Vec<u64>,
    /// The highest number given when it began; what is heard later is not its business.
    newest: Option<u64>,
}

impl Listener {
    pub(crate) async fn run(self) {
        let stop = self.stop.clone();
        stop.run_until_cancelled(self.listen()).await;
    }

    async fn listen(mut self) {
        let mut queue = self.consumer.queue();
        let mut again = tokio::time::interval(ASK_AGAIN);
        let mut reading = Reading::default();
        loop {
            tokio::select! {
                delivery = self.consumer.next() => match delivery {
                    Some(delivery) => self.hear(&delivery.message, &mut reading),
                    None => return,
                },
                // A new epoch: what was said meanwhile went to nobody.
                changed = queue.changed() => match changed {
                    Ok(()) => self.ask_anew(&mut reading),
                    Err(_) => return,
                },
                _ = again.tick() => self.ask_anew(&mut reading),
            }
        }
    }

    fn ask_anew(&self, reading: &mut Reading) {
        *reading = Reading { number: reading.number + 1, ..Reading::default() };
        self.ask(reading);
    }

    fn ask(&self, reading: &Reading) {
        let Some(reply_to) = self.consumer.queue().borrow().clone() else { return };
        let question = Query::Cancels { after: reading.after };
        let patience = u64::try_from(ASK_AGAIN.as_millis()).unwrap_or(u64::MAX);
        let message = question.encode(&reply_to, &reading.number.to_string(), patience);
        let outgoing =
            Outgoing { exchange: String::new(), routing_key: self.topology.queries(), message };
        // Without waiting: what comes meanwhile must be heard.
        if !self.publisher.offer(outgoing) {
            tracing::debug!("no room to ask the collector what is cancelled");
        }
    }

    fn hear(&self, message: &Message, reading: &mut Reading) {
        if message.properties.kind.as_deref() == Some(CONTROL_KIND) {
            return match Control::decode(message) {
                Ok(Control::Cancel(intents)) => self.cancels.hear(intents),
                Err(error) => tracing::warn!(%error, "a control message cannot be read"),
            };
        }
        let stale = message.properties.correlation_id != Some(reading.number.to_string());
        match Response::decode(message) {
            Ok(_) if stale => {}
            Ok(Response::Cancels { requests, more, newest }) => {
                let newest = *reading.newest.get_or_insert(newest);
                reading.live.extend(requests.iter().map(|request| request.seq));
                reading.after = reading.live.last().copied().unwrap_or(reading.after);
                self.cancels.hear(requests);
                if more {
                    self.ask(reading);
                } else {
                    self.cancels.keep_only(&reading.live, newest);
                    self.in_step.send_replace(true);
                }
            }
            Ok(other) => tracing::debug!(?other, "an answer that nobody asked for"),
            Err(error) => tracing::debug!(%error, "an answer cannot be read"),
        }
    }
}
