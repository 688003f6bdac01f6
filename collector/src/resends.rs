//! Tasks on their way from the store back to the broker; [`crate::relay`] does the work.
//!
//! Whoever brings a task back (a replayed dead letter, a parked task that a worker knows by now, a
//! lapsed lease) adds it in the transaction that changes the record it comes from
//! ([`Ledger::add_resend`](crate::aggregate::Ledger::add_resend)). So it is neither lost nor brought
//! back by two decisions. A task that is published twice has the same id both times, and the first
//! final result counts.

use garenne_common::broker::Outgoing;

use crate::relay::Outbox;
use crate::store::{ResendEntry, Store, StoreError};

/// Tasks published and confirmed together, and how large they may be: bodies are whole arguments.
const SLICE: usize = 200;
const SLICE_BYTES: usize = 8 * 1024 * 1024;

pub(crate) struct Resends<S> {
    pub(crate) store: S,
}

impl<S: Store> Outbox for Resends<S> {
    type Entry = ResendEntry;
    const WHAT: &'static str = "tasks to be sent again";

    async fn oldest(&self, after: u64) -> Result<Vec<ResendEntry>, StoreError> {
        self.store.resends(after, SLICE, SLICE_BYTES).await
    }

    fn seq(entry: &ResendEntry) -> u64 {
        entry.seq
    }

    fn outgoing(&self, entry: &ResendEntry) -> Outgoing {
        let resend = entry.resend.clone();
        Outgoing {
            exchange: resend.exchange,
            routing_key: resend.routing_key,
            message: resend.message,
        }
    }

    async fn forget(&self, confirmed: Vec<u64>) -> Result<(), StoreError> {
        self.store.resent(confirmed).await
    }

    async fn confirmed(&mut self, _: Vec<ResendEntry>) {}
}
