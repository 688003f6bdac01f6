//! Done notices on their way from the outbox to the broker; [`crate::relay`] does the work.
//!
//! A notice that is published twice has the same id both times
//! ([`garenne_common::wire::Notice::key`]).

use garenne_common::broker::Outgoing;
use garenne_common::wire::Notice;
use tokio::sync::mpsc;

use crate::answers::APP_ID;
use crate::relay::Outbox;
use crate::store::{OutboxEntry, Store, StoreError};

/// Notices published and confirmed together.
const SLICE: usize = 500;

pub(crate) struct Notices<S> {
    pub(crate) store: S,
    pub(crate) exchange: String,
    /// Gets every notice that was published; full, it makes the relay wait, so that none is skipped.
    pub(crate) copies: Option<mpsc::Sender<Notice>>,
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
            let Some(copies) = &self.copies else { return };
            if copies.send(entry.notice).await.is_err() {
                tracing::debug!("nobody reads copies of notices any more");
                self.copies = None;
            }
        }
    }
}
