//! The relay: publishes what waits in an outbox, in order, and forgets it once the broker has it.
//!
//! What the broker refuses (the queue it goes to is full, say) or never confirms (that queue does not
//! answer) keeps nothing else waiting: the relay goes on with what comes after it, and tries again when
//! it has been through all.
//!
//! At least once: what was published and not yet forgotten when the process died is published again.
//! The same happens when two collectors share a store. So whatever goes through an outbox has an id by
//! which its readers know it again. What the entries mean is the business of [`crate::notices`] and
//! [`crate::resends`].

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use garenne_common::broker::{BrokerError, Outgoing, Publisher, Receipt};
use garenne_common::failpoints::Protection;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::store::{StoreError, StoreFuture};

/// Beside being woken, the relay looks so often; another collector's entries come without waking it.
const LOOK: Duration = Duration::from_secs(1);
/// After a failure.
const PAUSE: Duration = Duration::from_secs(1);
/// How often it is reported that entries are refused.
const REMINDER: Duration = Duration::from_secs(30);
/// How long a stopping collector goes on publishing; the rest stays in the outbox for the next one.
const DRAIN: Duration = Duration::from_secs(5);

/// A table of messages that wait for their confirm.
pub(crate) trait Outbox: Send + 'static {
    /// One of them, as it is stored.
    type Entry: Send;
    /// What it holds, for the log: "notices".
    const WHAT: &'static str;

    /// The oldest entries after this one, as many as should be under way at once, in order.
    fn oldest(&self, after: u64) -> impl StoreFuture<Vec<Self::Entry>>;
    /// An entry's place in line.
    fn seq(entry: &Self::Entry) -> u64;
    /// An entry as it goes to the broker.
    fn outgoing(&self, entry: &Self::Entry) -> Outgoing;
    /// Forgets what is confirmed.
    fn forget(&self, confirmed: Vec<u64>) -> impl StoreFuture<()>;
    /// Called with what is confirmed, before it is forgotten.
    fn confirmed(&mut self, entries: Vec<Self::Entry>) -> impl Future<Output = ()> + Send;
}

/// Relays one outbox.
pub(crate) struct Relay<O> {
    pub(crate) outbox: O,
    pub(crate) publisher: Publisher,
    pub(crate) filled: Arc<Notify>,
    pub(crate) stop: CancellationToken,
}

/// What became of a slice of the outbox.
enum Slice {
    /// There was nothing.
    Empty,
    /// The broker has all of it.
    Done,
    /// The broker does not have all of it, which ends with this entry.
    Refused { last: u64, count: usize, cause: BrokerError },
}

impl<O: Outbox> Relay<O> {
    /// Relays until it is told to stop, and then what is left, within a limit.
    pub(crate) async fn run(mut self) {
        let stop = self.stop.clone();
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.relay_forever() => {}
        }
        if tokio::time::timeout(DRAIN, self.relay_all(&mut None)).await.is_err() {
            tracing::warn!(
                "some {} are not published; the next collector on this store does it",
                O::WHAT
            );
        }
    }

    async fn relay_forever(&mut self) {
        let mut said = None;
        loop {
            if self.relay_all(&mut said).await {
                tokio::select! {
                    () = self.filled.notified() => {}
                    () = tokio::time::sleep(LOOK) => {}
                }
            } else {
                tokio::time::sleep(PAUSE).await;
            }
        }
    }

    /// Goes through the outbox once; whether nothing was left in it. `said` is when it was last
    /// reported that something was.
    async fn relay_all(&mut self, said: &mut Option<Instant>) -> bool {
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
                    tracing::warn!("{} are not published: {error}", O::WHAT);
                    return false;
                }
            }
        }
        if let Some((count, cause)) = &refused
            && said.is_none_or(|said| said.elapsed() >= REMINDER)
        {
            let what = O::WHAT;
            *said = Some(Instant::now());
            tracing::warn!("{count} {what} are not published, and stay in the outbox: {cause}");
        }
        refused.is_none()
    }

    /// Publishes the oldest entries after this one, all under way at once.
    async fn relay_slice(&mut self, after: u64) -> Result<Slice, StoreError> {
        let entries = self.outbox.oldest(after).await?;
        let Some(last) = entries.last().map(O::seq) else { return Ok(Slice::Empty) };
        if !Protection::ForgetAfterConfirm.is_enabled() {
            self.outbox.forget(entries.iter().map(O::seq).collect()).await?;
        }
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
            self.outbox.forget(seqs).await?;
        }
        Ok(failed.map_or(Slice::Done, |cause| Slice::Refused { last, count, cause }))
    }

    /// What the broker says of a message. It is waited for while it is away or takes nothing. What it
    /// takes and does not confirm goes to a queue that does not answer, and waits for its next turn.
    async fn outcome(&self, receipt: Receipt, begun: Instant) -> Result<(), BrokerError> {
        let patience = self.publisher.patience();
        let (mut confirmed, mut until) = (pin!(receipt.confirmed()), begun + patience);
        loop {
            match tokio::time::timeout_at(until, &mut confirmed).await {
                Ok(outcome) => return outcome,
                Err(_) if self.publisher.owes_confirms() => {
                    return Err(self.publisher.why_late(patience));
                }
                Err(_) => until = Instant::now() + patience,
            }
        }
    }
}
