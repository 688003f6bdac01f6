//! The outbox of tasks that are published again: replayed dead letters, parked tasks, lapsed leases.
//!
//! A task is added by the transaction that changes the record it comes from
//! ([`Ledger::add_resend`](crate::rules::aggregate::Ledger::add_resend)), so it is neither lost nor added
//! twice. If it is published twice, it has the same id both times, and the first final result counts.

use garenne_common::broker::Outgoing;

use crate::outbox::Outbox;
use crate::store::{ResendEntry, Store, StoreError};

/// Maximum number and size of tasks that are unconfirmed at the same time.
const SLICE: usize = 200;
const SLICE_BYTES: usize = 8 * 1024 * 1024;

pub(crate) struct Resends<S> {
    pub(crate) store: S,
}

impl<S: Store> Outbox for Resends<S> {
    type Entry = ResendEntry;
    const NAME: &'static str = "tasks to publish again";

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

    async fn delete(&self, confirmed: Vec<u64>) -> Result<(), StoreError> {
        self.store.resent(confirmed).await
    }

    async fn confirmed(&mut self, _: Vec<ResendEntry>) {}
}
