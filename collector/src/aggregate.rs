//! What a group of reports changes: the rules of counting, apart from where things are kept.
//!
//! Pure but for the [`Ledger`] it is given: a transaction of the store, or a few maps in a test or a
//! simulation. The rules: the first final record of a task wins; a batch counts a task once; a notice
//! is written in the same transaction as what it tells of.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::time::Duration;

use garenne_common::failpoints::Protection;
use garenne_common::outcome::Status;
use garenne_common::wire::lease::execution_of;
use garenne_common::wire::{
    DeadLetter, Fence, Lease, LeaseNote, Message, Notice, Report, RetryNote,
};
use garenne_common::{BatchId, DeadReason, TaskId, TaskResult, Timestamp};

use crate::batch::Batch;
use crate::group::{Group, Letter};
use crate::lease::{LeaseStanding, LeaseState};

/// What an operator may choose.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// How long a batch may stay unsealed whose producer did not say.
    pub batch_deadline: Duration,
    /// Whether tasks outside a batch get a notice each.
    pub task_notices: bool,
}

/// Where a group's changes go. All of them take effect together or not at all.
pub trait Ledger {
    /// What can go wrong.
    type Error;
    /// Keeps a final record, unless there is one of that task.
    fn insert_result(&mut self, result: &TaskResult) -> Result<Inserted, Self::Error>;
    /// How a task ended, if it did.
    fn final_status(&mut self, id: &TaskId) -> Result<Option<Status>, Self::Error>;
    /// Keeps the note of a failed attempt, unless it is there.
    fn insert_attempt(&mut self, note: &RetryNote) -> Result<(), Self::Error>;
    /// Keeps a dead letter, unless there is a final one of that task. A `late` one is not listed.
    fn keep_letter(&mut self, letter: &DeadLetter, late: bool) -> Result<(), Self::Error>;
    /// Takes a task's dead letter, if there is one, out of the lists: the task ended after all.
    fn hide_letter(&mut self, id: &TaskId) -> Result<(), Self::Error>;
    /// A batch as it was last saved.
    fn load_batch(&mut self, id: &BatchId) -> Result<Option<Batch>, Self::Error>;
    /// Saves a batch.
    fn save_batch(&mut self, batch: &Batch) -> Result<(), Self::Error>;
    /// Puts a notice into the outbox.
    fn add_notice(&mut self, notice: &Notice) -> Result<(), Self::Error>;
    /// Notes that a task waits for a worker that knows it.
    fn park(&mut self, letter: &DeadLetter) -> Result<(), Self::Error>;
    /// Forgets what was wished or waited for about a task: it has ended.
    fn task_over(&mut self, id: &TaskId) -> Result<(), Self::Error>;
    /// Forgets what was wished about a batch: it is done.
    fn batch_over(&mut self, id: &BatchId) -> Result<(), Self::Error>;
    /// Puts a task that goes back to the broker into the second outbox.
    fn add_resend(&mut self, resend: &Resend) -> Result<(), Self::Error>;
    /// How a task's lease stands, if it ever had one.
    fn lease(&mut self, id: &TaskId) -> Result<Option<LeaseStanding>, Self::Error>;
    /// Keeps a lease that begins, in place of an earlier one of that task.
    fn begin_lease(&mut self, lease: &Lease) -> Result<(), Self::Error>;
    /// Notes that a lease was heard of now, and how it stands.
    fn mark_lease(&mut self, id: &TaskId, state: LeaseState) -> Result<(), Self::Error>;
    /// Forgets the lease of a task that has ended.
    fn drop_lease(&mut self, id: &TaskId) -> Result<(), Self::Error>;
}

/// A task that goes from the store back to the broker, and the way it takes.
#[derive(Debug, Clone, PartialEq)]
pub struct Resend {
    /// The exchange, such as that of tasks, or of a delay.
    pub exchange: String,
    /// The routing key: the short name of the task's queue.
    pub routing_key: String,
    /// The task, ready to be published.
    pub message: Message,
}

/// What became of a final record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inserted {
    /// It is the task's first.
    Fresh,
    /// The task has ended before, with this status; the repeat was counted.
    Repeat(Status),
}

/// What a group did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Committed {
    /// Tasks that ended.
    pub fresh: u64,
    /// Final records of tasks that had ended before.
    pub repeats: u64,
    /// Notices that now wait in the outbox.
    pub notices: u64,
    /// Words of executions whose lease had lapsed or passed on; nothing came of them.
    pub outdated: u64,
    /// Tasks that ended by a dead letter of this group.
    pub given_up: Vec<TaskId>,
}

/// Applies a group.
pub fn apply<L: Ledger>(
    ledger: &mut L,
    group: &Group,
    rules: Rules,
) -> Result<Committed, L::Error> {
    let done = Committed::default();
    let mut run = Run { ledger, rules, at: group.at, batches: BTreeMap::new(), done };
    for lease in &group.leases {
        run.lease(lease)?;
    }
    // Reports first: where a group holds both, a success beats the stray dead letter of a retry fork.
    for report in &group.reports {
        run.report(report)?;
    }
    for letter in &group.letters {
        run.letter(letter)?;
    }
    run.settle_batches()
}

struct Run<'a, L> {
    ledger: &'a mut L,
    rules: Rules,
    at: Timestamp,
    /// Batches that the group touches: loaded once, saved once.
    batches: BTreeMap<BatchId, Batch>,
    done: Committed,
}

impl<L: Ledger> Run<'_, L> {
    fn report(&mut self, report: &Report) -> Result<(), L::Error> {
        match report {
            Report::Finished(result) => {
                if self.finished(result)? == Inserted::Fresh {
                    self.ledger.hide_letter(&result.id)?;
                    if result.status == Status::Cancelled {
                        // A lapsed lease must not bring back what was cancelled.
                        self.ledger.drop_lease(&result.id)?;
                    }
                }
            }
            Report::Retrying(note) => {
                self.ledger.insert_attempt(note)?;
                if let Some(id) = &note.batch {
                    self.batch(id, note.at)?.mentioned(note.at);
                }
            }
            Report::BatchOpened { batch, at, deadline } => {
                self.batch(batch, *at)?.opened(*at, *deadline);
            }
            Report::BatchSealed { batch, count, at } => {
                self.batch(batch, *at)?.sealed(*count, *at);
            }
            Report::Lease(note) => self.lease_note(note)?,
            Report::FinishedUnderLease { fence, result } => {
                if self.admits(&result.id, Some(fence))? {
                    if self.finished(result)? == Inserted::Fresh {
                        self.ledger.hide_letter(&result.id)?;
                    }
                    self.ledger.drop_lease(&result.id)?;
                }
            }
        }
        Ok(())
    }

    fn lease(&mut self, lease: &Lease) -> Result<(), L::Error> {
        if self.ledger.final_status(&lease.id)?.is_some() {
            return Ok(());
        }
        let standing = self.ledger.lease(&lease.id)?;
        if standing.is_none_or(|standing| standing.yields_to(&lease.fence)) {
            self.ledger.begin_lease(lease)?;
        }
        Ok(())
    }

    fn lease_note(&mut self, note: &LeaseNote) -> Result<(), L::Error> {
        let standing = self.ledger.lease(&note.id)?;
        match standing.and_then(|standing| standing.after(&note.fence, note.change)) {
            Some(state) => self.ledger.mark_lease(&note.id, state),
            None => Ok(()),
        }
    }

    /// Whether an execution may say how its task ends. Without a lease anybody may.
    fn admits(&mut self, id: &TaskId, fence: Option<&Fence>) -> Result<bool, L::Error> {
        let Some(fence) = fence.filter(|_| Protection::FenceCheck.is_enabled()) else {
            return Ok(true);
        };
        let standing = self.ledger.lease(id)?;
        let admitted = standing.is_none_or(|standing| standing.admits(fence));
        self.done.outdated += u64::from(!admitted);
        Ok(admitted)
    }

    fn letter(&mut self, Letter { letter, result }: &Letter) -> Result<(), L::Error> {
        let fence = execution_of(&letter.message);
        if !self.admits(&letter.id, fence.as_ref())? {
            // Nothing is lost: the task itself is on its way again.
            return Ok(());
        }
        if fence.is_some() {
            self.ledger.drop_lease(&letter.id)?;
        }
        let ended_as = match result {
            Some(result) => match self.finished(result)? {
                Inserted::Fresh => {
                    self.done.given_up.push(result.id.clone());
                    None
                }
                Inserted::Repeat(status) => Some(status),
            },
            None => self.ledger.final_status(&letter.id)?,
        };
        let late = ended_as.is_some_and(|status| status != Status::Failed);
        self.ledger.keep_letter(letter, late)?;
        if ended_as.is_none() && letter.reason == DeadReason::UnknownTask {
            self.ledger.park(letter)?;
        }
        Ok(())
    }

    fn finished(&mut self, result: &TaskResult) -> Result<Inserted, L::Error> {
        let inserted = self.ledger.insert_result(result)?;
        if inserted != Inserted::Fresh {
            self.done.repeats += 1;
            if Protection::MemberCountedOnce.is_enabled() {
                return Ok(inserted);
            }
        }
        self.done.fresh += 1;
        self.ledger.task_over(&result.id)?;
        match &result.batch {
            Some(id) => {
                let at = result.finished_at;
                self.batch(id, at)?.member_ended(result.status, at);
            }
            None if self.rules.task_notices => self.notice(&Notice::of_task(result))?,
            None => {}
        }
        Ok(inserted)
    }

    fn batch(&mut self, id: &BatchId, at: Timestamp) -> Result<&mut Batch, L::Error> {
        match self.batches.entry(id.clone()) {
            Entry::Occupied(known) => Ok(known.into_mut()),
            Entry::Vacant(place) => {
                // The default deadline counts from our clock: a sender's may be anywhere.
                let deadline = self.at.plus(self.rules.batch_deadline);
                let batch = self.ledger.load_batch(id)?;
                let fresh = || Batch::first_seen(id.clone(), at, deadline);
                Ok(place.insert(batch.unwrap_or_else(fresh)))
            }
        }
    }

    fn settle_batches(mut self) -> Result<Committed, L::Error> {
        for mut batch in std::mem::take(&mut self.batches).into_values() {
            let notice = batch.settle();
            self.ledger.save_batch(&batch)?;
            if let Some(notice) = notice {
                self.ledger.batch_over(&batch.id)?;
                self.notice(&notice)?;
            }
        }
        Ok(self.done)
    }

    fn notice(&mut self, notice: &Notice) -> Result<(), L::Error> {
        self.done.notices += 1;
        self.ledger.add_notice(notice)
    }
}

#[cfg(test)]
mod tests;
