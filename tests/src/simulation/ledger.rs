//! The collector's store as a few maps: a transaction is a copy that replaces the original or does not.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;

use garenne_collector::rules::aggregate::{Inserted, Ledger, Resend};
use garenne_collector::rules::batch::Batch;
use garenne_collector::rules::lease::{LeaseRecord, LeaseState};
use garenne_common::topology::Topology;
use garenne_common::wire::{DeadLetter, Lease, Message, Notice, RetryNote, lease};
use garenne_common::{BatchId, DeadReason, Status, TaskId, TaskResult, Timestamp};

/// All that survives a collector.
#[derive(Clone, Default)]
pub(super) struct Store {
    pub(super) results: BTreeMap<TaskId, TaskResult>,
    pub(super) attempts: BTreeSet<(TaskId, u32)>,
    /// With whether each is late.
    pub(super) letters: BTreeMap<TaskId, (DeadReason, bool)>,
    pub(super) batches: BTreeMap<BatchId, Batch>,
    pub(super) leases: BTreeMap<TaskId, HeldLease>,
    pub(super) notices: BTreeMap<u64, Notice>,
    pub(super) resends: BTreeMap<u64, Resend>,
    /// How often a notice was ever put into the outbox, by its id.
    pub(super) announced: BTreeMap<String, u32>,
    last_seq: u64,
}

/// A lease, and when it was last heard of.
#[derive(Clone)]
pub(super) struct HeldLease {
    pub(super) lease: Lease,
    pub(super) state: LeaseState,
    heard_at: Timestamp,
}

/// One transaction over a copy of the store.
pub(super) struct Transaction {
    pub(super) at: Timestamp,
    pub(super) store: Store,
    /// A planted mistake: a later result replaces the first.
    pub(super) last_result_wins: bool,
    /// A planted mistake: notices are kept here instead of in the outbox.
    pub(super) beside: Option<Vec<Notice>>,
}

impl Ledger for Transaction {
    type Error = Infallible;

    fn insert_result(&mut self, result: &TaskResult) -> Result<Inserted, Infallible> {
        let known = self.store.results.get(&result.id).map(|known| known.status);
        if let Some(status) = known.filter(|_| !self.last_result_wins) {
            return Ok(Inserted::Repeat(status));
        }
        self.store.results.insert(result.id.clone(), result.clone());
        Ok(Inserted::Fresh)
    }

    fn final_status(&mut self, id: &TaskId) -> Result<Option<Status>, Infallible> {
        Ok(self.store.results.get(id).map(|result| result.status))
    }

    /// Nobody cancels here, and nobody announces a worker that would know more.
    fn park(&mut self, _: &DeadLetter) -> Result<(), Infallible> {
        Ok(())
    }

    fn task_ended(&mut self, _: &TaskId) -> Result<(), Infallible> {
        Ok(())
    }

    fn batch_ended(&mut self, _: &BatchId) -> Result<(), Infallible> {
        Ok(())
    }

    fn insert_attempt(&mut self, note: &RetryNote) -> Result<(), Infallible> {
        self.store.attempts.insert((note.id.clone(), note.attempt));
        Ok(())
    }

    fn keep_letter(&mut self, letter: &DeadLetter, late: bool) -> Result<(), Infallible> {
        let known = self.store.letters.get(&letter.id);
        if !known.is_some_and(|(reason, _)| reason.is_final()) {
            self.store.letters.insert(letter.id.clone(), (letter.reason, late));
        }
        Ok(())
    }

    fn hide_letter(&mut self, id: &TaskId) -> Result<(), Infallible> {
        if let Some((_, late)) = self.store.letters.get_mut(id) {
            *late = true;
        }
        Ok(())
    }

    fn load_batch(&mut self, id: &BatchId) -> Result<Option<Batch>, Infallible> {
        Ok(self.store.batches.get(id).cloned())
    }

    fn save_batch(&mut self, batch: &Batch) -> Result<(), Infallible> {
        self.store.batches.insert(batch.id.clone(), batch.clone());
        Ok(())
    }

    fn add_notice(&mut self, notice: &Notice) -> Result<(), Infallible> {
        match &mut self.beside {
            Some(beside) => beside.push(notice.clone()),
            None => self.store.announce(notice.clone()),
        }
        Ok(())
    }

    fn add_resend(&mut self, resend: &Resend) -> Result<(), Infallible> {
        self.store.resend(resend.clone());
        Ok(())
    }

    fn lease(&mut self, id: &TaskId) -> Result<Option<LeaseRecord>, Infallible> {
        let standing = |held: &HeldLease| {
            let (fence, state) = (held.lease.fence.clone(), held.state);
            LeaseRecord { fence, state }
        };
        Ok(self.store.leases.get(id).map(standing))
    }

    fn begin_lease(&mut self, lease: &Lease) -> Result<(), Infallible> {
        let (state, heard_at) = (LeaseState::Held, self.at);
        let held = HeldLease { lease: lease.clone(), state, heard_at };
        self.store.leases.insert(lease.id.clone(), held);
        Ok(())
    }

    fn mark_lease(&mut self, id: &TaskId, state: LeaseState) -> Result<(), Infallible> {
        if let Some(held) = self.store.leases.get_mut(id) {
            (held.state, held.heard_at) = (state, self.at);
        }
        Ok(())
    }

    fn drop_lease(&mut self, id: &TaskId) -> Result<(), Infallible> {
        self.store.leases.remove(id);
        Ok(())
    }
}

impl HeldLease {
    /// When it lapses, if it is not renewed.
    pub(super) fn ends_at(&self) -> Option<Timestamp> {
        (self.state == LeaseState::Held).then(|| self.heard_at.plus(self.lease.term))
    }
}

impl Store {
    fn resend(&mut self, resend: Resend) {
        self.last_seq += 1;
        self.resends.insert(self.last_seq, resend);
    }

    /// Sends tasks again whose lease has lapsed, as `collector/src/store/leases.rs` does.
    pub(super) fn lapse(
        &mut self,
        topology: &Topology,
        listening_since: Timestamp,
        now: Timestamp,
    ) -> Vec<Message> {
        let mut sent = vec![];
        for held in self.leases.clone().into_values() {
            let term = held.lease.term;
            let over = held.ends_at().is_some_and(|at| at.max(listening_since.plus(term)) <= now);
            if !over {
                continue;
            }
            let id = held.lease.id.clone();
            if self.results.contains_key(&id) {
                self.leases.remove(&id);
                continue;
            }
            let mut message = held.lease.message.clone();
            lease::set_fence(&mut message, held.lease.fence.number);
            lease::mark_lapsed(&mut message);
            sent.push(message.clone());
            let routing_key = held.lease.queue.to_string();
            self.resend(Resend { exchange: topology.tasks_exchange(), routing_key, message });
            if let Some(held) = self.leases.get_mut(&id) {
                held.state = LeaseState::Lapsed;
            }
        }
        sent
    }

    pub(super) fn announce(&mut self, notice: Notice) {
        *self.announced.entry(notice.key()).or_default() += 1;
        self.last_seq += 1;
        self.notices.insert(self.last_seq, notice);
    }
}
