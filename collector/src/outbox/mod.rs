//! Outboxes: messages that are stored by a transaction and published afterwards, by a relay.
//!
//! Entries come from the store. The relay publishes them in order and deletes them once the broker has
//! confirmed them. An entry that the broker refuses (a full queue) or does not confirm (a queue that does not
//! respond) delays no other: the relay continues with the next one, and tries again after the last.
//!
//! Entries are published at least once: again if the process dies between the confirm and the deletion, and
//! by both of two collectors that share a store. So each has an id by which readers recognise repetitions.
//! [`notices`] and [`resends`] define the entries.

pub(crate) mod notices;
pub(crate) mod publishers;
pub(crate) mod resends;

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use garenne_common::broker::{BrokerError, Outgoing, Publisher, Receipt};
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::store::{StoreError, StoreFuture};

/// How often the relay polls the store; entries of other collectors do not wake it.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// Pause after a failure.
const PAUSE: Duration = Duration::from_secs(1);
/// How often refused entries are logged.
const REMINDER_INTERVAL: Duration = Duration::from_secs(30);
/// How long a stopping collector keeps publishing; the rest stays in the outbox.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// A table of messages to publish.
pub(crate) trait Outbox: Send + 'static {
    /// A stored message.
    type Entry: Send;
    /// What the entries are called in the log: "notices".
    const NAME: &'static str;

    /// The oldest entries after this one in order, as many as may be unconfirmed at the same time.
    fn oldest(&self, after: u64) -> impl StoreFuture<Vec<Self::Entry>>;
    /// The sequence number of an entry.
    fn seq(entry: &Self::Entry) -> u64;
    /// The message of an entry.
    fn outgoing(&self, entry: &Self::Entry) -> Outgoing;
    /// Deletes confirmed entries.
    fn delete(&self, confirmed: Vec<u64>) -> impl StoreFuture<()>;
    /// Called with confirmed entries before they are deleted.
    fn confirmed(&mut self, entries: Vec<Self::Entry>) -> impl Future<Output = ()> + Send;
}

/// Relays one outbox.
pub(crate) struct Relay<O> {
    pub(crate) outbox: O,
    pub(crate) publisher: Publisher,
    pub(crate) filled: Arc<Notify>,
    pub(crate) stop: CancellationToken,
}

/// What became of some entries.
enum Slice {
    /// There are no entries.
    Empty,
    /// All are confirmed.
    Done,
    /// Not all are confirmed; `last` is the last of them.
    Refused { last: u64, count: usize, cause: BrokerError },
}

impl<O: Outbox> Relay<O> {
    /// Relays until `stop`, then publishes the rest within a time limit.
    pub(crate) async fn run(mut self) {
        let stop = self.stop.clone();
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.relay_forever() => {}
        }
        if tokio::time::timeout(DRAIN_TIMEOUT, self.relay_all(&mut None)).await.is_err() {
            tracing::warn!(
                "some {} are not published; the next collector on this store publishes them",
                O::NAME
            );
        }
    }

    async fn relay_forever(&mut self) {
        let mut logged = None;
        loop {
            if self.relay_all(&mut logged).await {
                tokio::select! {
                    () = self.filled.notified() => {}
                    () = tokio::time::sleep(POLL_INTERVAL) => {}
                }
            } else {
                tokio::time::sleep(PAUSE).await;
            }
        }
    }

    /// Goes through the outbox once. Returns whether it is empty. `logged` is when refused entries were
    /// last logged.
    async fn relay_all(&mut self, logged: &mut Option<Instant>) -> bool {
        let (mut after, mut refused) = (0, None);
        loop {
            match self.relay_slice(after).await {
                Ok(Slice::Empty) => break,
                Ok(Slice::Done) => {}
                Ok(Slice::Refused { last, count, cause }) => {
                    after = last;
                    refused = Some((refused.map_or(0, |(before, _)| before) + count, cause));
                }
                Err(error) => {
                    tracing::warn!("{} are not published: {error}", O::NAME);
                    return false;
                }
            }
        }
        if let Some((count, cause)) = &refused
            && logged.is_none_or(|logged| logged.elapsed() >= REMINDER_INTERVAL)
        {
            let name = O::NAME;
            *logged = Some(Instant::now());
            tracing::warn!("{count} {name} are not published and stay in the outbox: {cause}");
        }
        refused.is_none()
    }

    /// Publishes the oldest entries after this one at the same time.
    async fn relay_slice(&mut self, after: u64) -> Result<Slice, StoreError> {
        let entries = self.outbox.oldest(after).await?;
        let Some(last) = entries.last().map(O::seq) else { return Ok(Slice::Empty) };
        #[cfg(feature = "failpoints")]
        sabotage::delete_unconfirmed(&self.outbox, &entries).await?;
        let (begun, mut receipts) = (Instant::now(), Vec::with_capacity(entries.len()));
        for entry in &entries {
            receipts.push(self.publisher.send(self.outbox.outgoing(entry)).await);
        }
        let (mut confirmed, mut failed) = (Vec::with_capacity(entries.len()), None);
        let all = entries.len();
        for (entry, receipt) in entries.into_iter().zip(receipts) {
            let outcome = match receipt {
                Ok(receipt) => self.outcome(receipt, begun).await,
                Err(error) => Err(error),
            };
            match outcome {
                Ok(()) => confirmed.push(entry),
                Err(error) => failed = Some(error),
            }
        }
        let (count, seqs) = (all - confirmed.len(), confirmed.iter().map(O::seq).collect());
        if count < all {
            self.outbox.confirmed(confirmed).await;
            self.outbox.delete(seqs).await?;
        }
        Ok(failed.map_or(Slice::Done, |cause| Slice::Refused { last, count, cause }))
    }

    /// Waits for the confirm of a message, without limit while the broker cannot be reached or blocks
    /// publishers. A message that is accepted and not confirmed goes to a queue that does not respond; it
    /// is tried again later.
    async fn outcome(&self, receipt: Receipt, begun: Instant) -> Result<(), BrokerError> {
        let timeout = self.publisher.confirm_timeout();
        let (mut confirmed, mut until) = (pin!(receipt.confirmed()), begun + timeout);
        loop {
            match tokio::time::timeout_at(until, &mut confirmed).await {
                Ok(outcome) => return outcome,
                Err(_) if self.publisher.expects_confirms() => {
                    return Err(self.publisher.timeout_error(timeout));
                }
                Err(_) => until = Instant::now() + timeout,
            }
        }
    }
}

#[cfg(feature = "failpoints")]
mod sabotage {
    use garenne_common::failpoints::Protection;

    use super::{Outbox, StoreError};

    /// Without `ForgetAfterConfirm`: deletes entries before they are published.
    pub(super) async fn delete_unconfirmed<O: Outbox>(
        outbox: &O,
        entries: &[O::Entry],
    ) -> Result<(), StoreError> {
        if Protection::ForgetAfterConfirm.is_enabled() {
            return Ok(());
        }
        outbox.delete(entries.iter().map(O::seq).collect()).await
    }
}
