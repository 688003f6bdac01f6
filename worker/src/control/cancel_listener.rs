//! Keeps the worker's copy of the cancel requests in sync with the collector's list.
//!
//! New requests arrive through the exchange `control` in an exclusive queue. The same queue receives the
//! responses when the worker queries the whole list: at its start, after each reconnect and every
//! [`QUERY_INTERVAL`]. A query without a response stays in its queue until the next one is sent, so that a
//! collector that starts later responds at once.

use std::sync::Arc;
use std::time::Duration;

use garenne_common::broker::{Consumer, Outgoing, Publisher};
use garenne_common::topology::Topology;
use garenne_common::wire::control::CONTROL_KIND;
use garenne_common::wire::{Control, Message, Query, Response};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::cancel_requests::CancelRequests;

/// How often the list is queried without a reason: a broadcast may have been lost.
const QUERY_INTERVAL: Duration = Duration::from_secs(30);
/// Number of deliveries that wait for this task, which never blocks for long.
pub(crate) const BUFFER: u16 = 64;

/// The task that receives cancel requests.
pub(crate) struct CancelListener {
    pub(crate) consumer: Consumer,
    pub(crate) publisher: Publisher,
    pub(crate) topology: Topology,
    pub(crate) cancel_requests: Arc<CancelRequests>,
    /// Becomes true when the whole list has been received once.
    pub(crate) synced: watch::Sender<bool>,
    pub(crate) stop: CancellationToken,
}

/// A query of the whole list, page by page.
#[derive(Default)]
struct Sync {
    /// Identifies its responses.
    number: u64,
    /// The last number received.
    after: u64,
    /// Numbers of the requests that are in the list.
    open: Vec<u64>,
    /// The highest number that existed when the query started. Later requests are not affected by it.
    newest: Option<u64>,
}

impl CancelListener {
    pub(crate) async fn run(self) {
        let stop = self.stop.clone();
        stop.run_until_cancelled(self.listen()).await;
    }

    async fn listen(mut self) {
        let mut queue = self.consumer.queue();
        let mut interval = tokio::time::interval(QUERY_INTERVAL);
        let mut sync = Sync::default();
        loop {
            tokio::select! {
                delivery = self.consumer.next() => match delivery {
                    Some(delivery) => self.receive(&delivery.message, &mut sync),
                    None => return,
                },
                // A new queue: broadcasts in between have been lost.
                changed = queue.changed() => match changed {
                    Ok(()) => self.restart(&mut sync),
                    Err(_) => return,
                },
                _ = interval.tick() => self.restart(&mut sync),
            }
        }
    }

    fn restart(&self, sync: &mut Sync) {
        *sync = Sync { number: sync.number + 1, ..Sync::default() };
        self.query(sync);
    }

    fn query(&self, sync: &Sync) {
        let Some(reply_to) = self.consumer.queue().borrow().clone() else { return };
        let query = Query::Cancels { after: sync.after };
        let expiration = u64::try_from(QUERY_INTERVAL.as_millis()).unwrap_or(u64::MAX);
        let message = query.encode(&reply_to, &sync.number.to_string(), expiration);
        let outgoing =
            Outgoing { exchange: String::new(), routing_key: self.topology.queries(), message };
        // Does not wait: deliveries must be received meanwhile.
        if !self.publisher.offer(outgoing) {
            tracing::debug!("no room to query the cancel requests");
        }
    }

    fn receive(&self, message: &Message, sync: &mut Sync) {
        if message.properties.kind.as_deref() == Some(CONTROL_KIND) {
            return match Control::decode(message) {
                Ok(Control::Cancel(requests)) => self.cancel_requests.add(requests),
                Err(error) => tracing::warn!(%error, "invalid control message"),
            };
        }
        let stale = message.properties.correlation_id != Some(sync.number.to_string());
        match Response::decode(message) {
            Ok(_) if stale => {}
            Ok(Response::Cancels { requests, more, newest }) => {
                let newest = *sync.newest.get_or_insert(newest);
                sync.open.extend(requests.iter().map(|request| request.seq));
                sync.after = sync.open.last().copied().unwrap_or(sync.after);
                self.cancel_requests.add(requests);
                if more {
                    self.query(sync);
                } else {
                    self.cancel_requests.retain(&sync.open, newest);
                    self.synced.send_replace(true);
                }
            }
            Ok(other) => tracing::debug!(?other, "unexpected response"),
            Err(error) => tracing::debug!(%error, "invalid response"),
        }
    }
}
