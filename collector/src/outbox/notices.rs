//! The outbox of done notices.
//!
//! A notice that is published twice has the same id both times ([`garenne_common::wire::Notice::key`]).

use std::time::Duration;

use garenne_common::broker::Outgoing;
use garenne_common::wire::Notice;
use tokio::sync::mpsc::{self, error::SendTimeoutError};

use crate::APP_ID;
use crate::outbox::Outbox;
use crate::store::{OutboxEntry, Store, StoreError};

/// Maximum number of notices that are unconfirmed at the same time.
const SLICE: usize = 500;
/// How long the relay waits for a reader of copies before it skips them.
const READER_TIMEOUT: Duration = Duration::from_secs(10);

pub(crate) struct Notices<S> {
    pub(crate) store: S,
    pub(crate) exchange: String,
    /// Receives a copy of every published notice.
    pub(crate) copies: Option<NoticeCopies>,
}

/// A reader of copies. The relay waits for a slow reader, so that no copy is skipped. A reader that stops
/// reading must not delay the notices of others.
pub(crate) struct NoticeCopies {
    to: mpsc::Sender<Notice>,
    /// Number of copies skipped since the reader last received one.
    skipped: u64,
}

impl NoticeCopies {
    pub(crate) fn new(to: mpsc::Sender<Notice>) -> Self {
        Self { to, skipped: 0 }
    }

    /// Sends or skips a copy. Returns `false` if the reader is gone.
    async fn send(&mut self, notice: Notice) -> bool {
        let timeout = if self.skipped == 0 { READER_TIMEOUT } else { Duration::ZERO };
        match self.to.send_timeout(notice, timeout).await {
            Ok(()) if self.skipped > 0 => {
                tracing::warn!(
                    skipped = self.skipped,
                    "the reader of printed notices reads again; some notices were skipped"
                );
                self.skipped = 0;
            }
            Ok(()) => {}
            Err(SendTimeoutError::Timeout(_)) => {
                if self.skipped == 0 {
                    tracing::warn!(
                        timeout = ?READER_TIMEOUT,
                        "the reader of printed notices does not read; skipping notices until it does"
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
    const NAME: &'static str = "notices";

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

    async fn delete(&self, confirmed: Vec<u64>) -> Result<(), StoreError> {
        self.store.published(confirmed).await
    }

    async fn confirmed(&mut self, entries: Vec<OutboxEntry>) {
        for entry in entries {
            let Some(copies) = &mut self.copies else { return };
            if !copies.send(entry.notice).await {
                tracing::debug!("the reader of copies of notices is gone");
                self.copies = None;
            }
        }
    }
}
