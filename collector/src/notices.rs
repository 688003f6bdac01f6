//! The relay: publishes what waits in the outbox, and forgets it once the broker has it.
//!
//! At least once: a notice that was published and not yet forgotten when the process died is published
//! again, under the same id ([`garenne_common::wire::Notice::key`]). The same happens when two
//! collectors share a store.

use std::sync::Arc;
use std::time::Duration;

use garenne_common::broker::{BrokerError, Outgoing, Publisher};
use garenne_common::wire::Notice;
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;

use crate::answers::APP_ID;
use crate::store::{Store, StoreError};

/// Notices published and confirmed together.
const SLICE: usize = 500;
/// Beside being woken, the relay looks so often; another collector's notices come without waking it.
const LOOK: Duration = Duration::from_secs(1);
/// After a failure.
const PAUSE: Duration = Duration::from_secs(1);
/// How long a stopping collector goes on publishing; the rest stays in the outbox for the next one.
const DRAIN: Duration = Duration::from_secs(5);

pub(crate) struct Relay<S> {
    pub(crate) store: S,
    pub(crate) publisher: Publisher,
    pub(crate) exchange: String,
    pub(crate) outbox_filled: Arc<Notify>,
    /// Gets every notice that was published; full, it makes the relay wait, so that none is skipped.
    pub(crate) copies: Option<mpsc::Sender<Notice>>,
    pub(crate) stop: CancellationToken,
}

#[derive(Debug, thiserror::Error)]
enum RelayError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("{unconfirmed} notices are not published, and stay in the outbox: {cause}")]
    Broker { unconfirmed: usize, cause: BrokerError },
}

impl<S: Store> Relay<S> {
    /// Relays until it is told to stop, and then what is left, within a limit.
    pub(crate) async fn run(mut self) {
        let stop = self.stop.clone();
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.relay_forever() => {}
        }
        if tokio::time::timeout(DRAIN, self.drain()).await.is_err() {
            tracing::warn!(
                "some notices are not published; the next collector on this store does it"
            );
        }
    }

    async fn relay_forever(&mut self) {
        loop {
            match self.relay_slice().await {
                Ok(0) => {
                    tokio::select! {
                        () = self.outbox_filled.notified() => {}
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

    /// Publishes the oldest notices, all under way at once; how many there were.
    async fn relay_slice(&mut self) -> Result<usize, RelayError> {
        let entries = self.store.outbox(SLICE).await?;
        let mut receipts = Vec::with_capacity(entries.len());
        for entry in &entries {
            let outgoing = Outgoing {
                exchange: self.exchange.clone(),
                routing_key: entry.notice.key(),
                message: entry.notice.encode(APP_ID),
            };
            receipts.push(self.publisher.send(outgoing).await);
        }
        let (mut confirmed, mut failed) = (Vec::with_capacity(entries.len()), None);
        for (entry, receipt) in entries.iter().zip(receipts) {
            let outcome = match receipt {
                Ok(receipt) => receipt.confirmed().await,
                Err(error) => Err(error),
            };
            match outcome {
                Ok(()) => confirmed.push(entry.seq),
                Err(error) => failed = Some(error),
            }
        }
        let unconfirmed = entries.len() - confirmed.len();
        self.copy(
            entries
                .into_iter()
                .filter(|entry| confirmed.binary_search(&entry.seq).is_ok())
                .map(|entry| entry.notice),
        )
        .await;
        let done = confirmed.len();
        if done > 0 {
            self.store.published(confirmed).await?;
        }
        match failed {
            Some(cause) => Err(RelayError::Broker { unconfirmed, cause }),
            None => Ok(done),
        }
    }

    async fn copy(&mut self, notices: impl Iterator<Item = Notice>) {
        for notice in notices {
            let Some(copies) = &self.copies else { return };
            if copies.send(notice).await.is_err() {
                tracing::debug!("nobody reads copies of notices any more");
                self.copies = None;
            }
        }
    }
}
