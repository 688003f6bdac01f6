//! The relay: publishes what waits in an outbox, in order, and forgets it once the broker has it.
//!
//! At least once: what was published and not yet forgotten when the process died is published again.
//! The same happens when two collectors share a store. So whatever goes through an outbox has an id by
//! which its readers know it again. What the entries mean is the business of [`crate::notices`] and
//! [`crate::resends`].

use std::sync::Arc;
use std::time::Duration;

use garenne_common::broker::{BrokerError, Outgoing, Publisher};
use garenne_common::guards::Guard;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::store::{Answer, StoreError};

/// Beside being woken, the relay looks so often; another collector's entries come without waking it.
const LOOK: Duration = Duration::from_secs(1);
/// After a failure.
const PAUSE: Duration = Duration::from_secs(1);
/// How long a stopping collector goes on publishing; the rest stays in the outbox for the next one.
const DRAIN: Duration = Duration::from_secs(5);

/// A table of messages that wait for their confirm.
pub(crate) trait Outbox: Send + 'static {
    /// One of them, as it is stored.
    type Entry: Send;
    /// What it holds, for the log: "notices".
    const WHAT: &'static str;

    /// The oldest entries, as many as should be under way at once, in order.
    fn oldest(&self) -> impl Answer<Vec<Self::Entry>>;
    /// An entry's place in line.
    fn seq(entry: &Self::Entry) -> u64;
    /// An entry as it goes to the broker.
    fn outgoing(&self, entry: &Self::Entry) -> Outgoing;
    /// Forgets what is confirmed.
    fn forget(&self, confirmed: Vec<u64>) -> impl Answer<()>;
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

#[derive(Debug, thiserror::Error)]
enum RelayError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("{unconfirmed} {what} are not published, and stay in the outbox: {cause}")]
    Broker { unconfirmed: usize, what: &'static str, cause: BrokerError },
}

impl<O: Outbox> Relay<O> {
    /// Relays until it is told to stop, and then what is left, within a limit.
    pub(crate) async fn run(mut self) {
        let stop = self.stop.clone();
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.relay_forever() => {}
        }
        if tokio::time::timeout(DRAIN, self.drain()).await.is_err() {
            tracing::warn!(
                "some {} are not published; the next collector on this store does it",
                O::WHAT
            );
        }
    }

    async fn relay_forever(&mut self) {
        loop {
            match self.relay_slice().await {
                Ok(0) => {
                    tokio::select! {
                        () = self.filled.notified() => {}
                        () = tokio::time::sleep(LOOK) => {}
                    }
                }
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!("{error}");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    async fn drain(&mut self) {
        loop {
            match self.relay_slice().await {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!("{error}");
                    return;
                }
            }
        }
    }

    /// Publishes the oldest entries, all under way at once; how many the broker has now.
    async fn relay_slice(&mut self) -> Result<usize, RelayError> {
        let entries = self.outbox.oldest().await?;
        if !Guard::ForgetAfterConfirm.holds() {
            self.outbox.forget(entries.iter().map(O::seq).collect()).await?;
        }
        let mut receipts = Vec::with_capacity(entries.len());
        for entry in &entries {
            receipts.push(self.publisher.send(self.outbox.outgoing(entry)).await);
        }
        let (mut confirmed, mut failed) = (Vec::with_capacity(entries.len()), None);
        let all = entries.len();
        for (entry, receipt) in entries.into_iter().zip(receipts) {
            let outcome = match receipt {
                Ok(receipt) => receipt.confirmed().await,
                Err(error) => Err(error),
            };
            match outcome {
                Ok(()) => confirmed.push(entry),
                Err(error) => failed = Some(error),
            }
        }
        let (done, seqs) = (confirmed.len(), confirmed.iter().map(O::seq).collect());
        self.outbox.confirmed(confirmed).await;
        if done > 0 {
            self.outbox.forget(seqs).await?;
        }
        match failed {
            Some(cause) => {
                Err(RelayError::Broker { unconfirmed: all - done, what: O::WHAT, cause })
            }
            None => Ok(done),
        }
    }
}
