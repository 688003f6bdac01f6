//! Done notices on their way from the outbox to the broker; [`crate::relay`] does the work.
//!
//! A notice that is published twice has the same id both times
//! ([`garenne_common::wire::Notice::key`]).

use std::time::Duration;

use garenne_common::broker::Outgoing;
use garenne_common::wire::Notice;
use tokio::sync::mpsc::{self, error::SendTimeoutError};

use crate::APP_ID;
use crate::relay::Outbox;
use crate::store::{OutboxEntry, Store, StoreError};

/// Notices published and confirmed together.
const SLICE: usize = 500;
/// How long a reader of copies may take none before they are skipped.
const READER_PATIENCE: Duration = Duration::from_secs(10);

pub(crate) struct Notices<S> {
    pub(crate) store: S,
    pub(crate) exchange: String,
    /// Gets every notice that was published.
    pub(crate) copies: Option<Copies>,
}

/// A reader of copies. A slow one makes the relay wait, so that none is skipped; one that takes none
/// for a while must not keep notices from everybody else.
pub(crate) struct Copies {
    to: mpsc::Sender<Notice>,
    /// How many were skipped since the reader last took one.
    skipped: u64,
}

impl Copies {
    pub(crate) fn new(to: mpsc::Sender<Notice>) -> Self {
        Self { to, skipped: 0 }
    }

    /// Hands a copy over or skips it; `false` if there is no reader any more.
    async fn send(&mut self, notice: Notice) -> bool {
        let patience = if self.skipped == 0 { READER_PATIENCE } else { Duration::ZERO };
        match self.to.send_timeout(notice, patience).await {
            Ok(()) if self.skipped > 0 => {
                tracing::warn!(
                    skipped = self.skipped,
                    "notices are printed again; some were skipped"
                );
                self.skipped = 0;
            }
            Ok(()) => {}
            Err(SendTimeoutError::Timeout(_)) => {
                if self.skipped == 0 {
                    tracing::warn!(
                        patience = ?READER_PATIENCE,
                        "the reader of printed notices takes none; they are skipped until it does"
                    );
                }
                self.skipped += 1;
            }
            Err(SendTimeoutError::Closed(_)) => return false,
        }
        true
    }
}

impl<S: Store> Outbox for Notices<S> {
    type Entry = OutboxEntry;
    const WHAT: &'static str = "notices";

    async fn oldest(&self, after: u64) -> Result<Vec<OutboxEntry>, StoreError> {
        self.store.outbox(after, SLICE).await
    }

    fn seq(entry: &OutboxEntry) -> u64 {
        entry.seq
    }

    fn outgoing(&self, entry: &OutboxEntry) -> Outgoing {
        Outgoing {
            exchange: self.exchange.clone(),
            routing_key: entry.notice.key(),
            message: entry.notice.encode(APP_ID),
        }
    }

    async fn forget(&self, confirmed: Vec<u64>) -> Result<(), StoreError> {
        self.store.published(confirmed).await
    }

    async fn confirmed(&mut self, entries: Vec<OutboxEntry>) {
        for entry in entries {
            let Some(copies) = &mut self.copies else { return };
            if !copies.send(entry.notice).await {
                tracing::debug!("nobody reads copies of notices any more");
                self.copies = None;
            }
        }
    }
}
