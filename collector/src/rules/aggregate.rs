//! What a group of reports changes, independent of the store.
//!
//! Pure except for the given [`Ledger`]: a transaction of the store, or maps in tests and the simulation.
//! The rules: the first final record of a task wins; a batch counts a task once; a notice is stored in the
//! same transaction as the event.

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

use crate::ingest::group::{Group, Letter};
use crate::rules::batch::Batch;
use crate::rules::lease::{LeaseRecord, LeaseState};

/// Rules that the configuration determines.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// The deadline of batches whose producer has not given one.
    pub batch_deadline: Duration,
    /// Whether tasks without a batch get a notice.
    pub task_notices: bool,
}

/// Where the changes of a group are stored. They take effect together or not at all.
pub trait Ledger {
    /// The error of the store.
    type Error;
    /// Stores a final record unless the task has one.
    fn insert_result(&mut self, result: &TaskResult) -> Result<Inserted, Self::Error>;
    /// How a task has ended, if it has.
    fn final_status(&mut self, id: &TaskId) -> Result<Option<Status>, Self::Error>;
    /// Stores the note of a failed attempt unless it is stored.
    fn insert_attempt(&mut self, note: &RetryNote) -> Result<(), Self::Error>;
    /// Stores a dead letter unless the task has a final one. A `late` one is not listed.
    fn keep_letter(&mut self, letter: &DeadLetter, late: bool) -> Result<(), Self::Error>;
    /// Removes the dead letter of a task from the lists: the task has ended otherwise.
    fn hide_letter(&mut self, id: &TaskId) -> Result<(), Self::Error>;
    /// Loads a batch.
    fn load_batch(&mut self, id: &BatchId) -> Result<Option<Batch>, Self::Error>;
    /// Saves a batch.
    fn save_batch(&mut self, batch: &Batch) -> Result<(), Self::Error>;
    /// Adds a notice to the outbox.
    fn add_notice(&mut self, notice: &Notice) -> Result<(), Self::Error>;
    /// Parks a task until a worker knows its name.
    fn park(&mut self, letter: &DeadLetter) -> Result<(), Self::Error>;
    /// Deletes the cancel request and parking of a task that has ended.
    fn task_ended(&mut self, id: &TaskId) -> Result<(), Self::Error>;
    /// Deletes the cancel request of a batch that has ended.
    fn batch_ended(&mut self, id: &BatchId) -> Result<(), Self::Error>;
    /// Adds a task to the outbox of tasks that are published again.
    fn add_resend(&mut self, resend: &Resend) -> Result<(), Self::Error>;
    /// The lease of a task, if it has ever had one.
    fn lease(&mut self, id: &TaskId) -> Result<Option<LeaseRecord>, Self::Error>;
    /// Stores a lease that begins, replacing an earlier one of the task.
    fn begin_lease(&mut self, lease: &Lease) -> Result<(), Self::Error>;
    /// Updates the state of a lease and the time of its last report.
    fn mark_lease(&mut self, id: &TaskId, state: LeaseState) -> Result<(), Self::Error>;
    /// Deletes the lease of a task that has ended.
    fn drop_lease(&mut self, id: &TaskId) -> Result<(), Self::Error>;
}

/// A task that is published again.
#[derive(Debug, Clone, PartialEq)]
pub struct Resend {
    /// The exchange: that of tasks or of a delay.
    pub exchange: String,
    /// The routing key: the name of the task's queue.
    pub routing_key: String,
    /// The task, ready to be published.
    pub message: Message,
}

/// Result of storing a final record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inserted {
    /// It is the first of its task.
    Fresh,
    /// The task had ended with this status; the repetition is counted.
    Repeat(Status),
}

/// What a group has changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Committed {
    /// Number of tasks that ended.
    pub fresh: u64,
    /// Number of final records of tasks that had ended before.
    pub repeats: u64,
    /// Number of notices added to the outbox.
    pub notices: u64,
    /// Number of rejected reports of executions that no longer hold their lease.
    pub outdated: u64,
    /// Tasks that a dead letter of this group has ended.
    pub given_up: Vec<TaskId>,
}

/// Applies a group.
pub fn apply<L: Ledger>(
    ledger: &mut L,
    group: &Group,
    rules: Rules,
) -> Result<Committed, L::Error> {
    let done = Committed::default();
    let mut run = GroupChanges { ledger, rules, at: group.at, batches: BTreeMap::new(), done };
    for lease in &group.leases {
        run.lease(lease)?;
    }
    // Reports before letters: if a group contains both, a success wins over the dead letter of a duplicate.
    for report in &group.reports {
        run.report(report)?;
    }
    for letter in &group.letters {
        run.letter(letter)?;
    }
    run.settle_batches()
}

struct GroupChanges<'a, L> {
    ledger: &'a mut L,
    rules: Rules,
    at: Timestamp,
    /// Batches in the group; each is loaded and saved once.
    batches: BTreeMap<BatchId, Batch>,
    done: Committed,
}

impl<L: Ledger> GroupChanges<'_, L> {
    fn report(&mut self, report: &Report) -> Result<(), L::Error> {
        match report {
            Report::Finished(result) => {
                if self.finished(result)? == Inserted::Fresh {
                    self.ledger.hide_letter(&result.id)?;
                    if result.status == Status::Cancelled {
                        // A lapsed lease must not publish a cancelled task again.
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
            // Only in responses; `Group` drops it.
            Report::Conflict { .. } => {}
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
        let record = self.ledger.lease(&lease.id)?;
        if record.is_none_or(|record| record.yields_to(&lease.fence)) {
            self.ledger.begin_lease(lease)?;
        }
        Ok(())
    }

    fn lease_note(&mut self, note: &LeaseNote) -> Result<(), L::Error> {
        let record = self.ledger.lease(&note.id)?;
        match record.and_then(|record| record.after(&note.fence, note.change)) {
            Some(state) => self.ledger.mark_lease(&note.id, state),
            None => Ok(()),
        }
    }

    /// Whether an execution may report the end of its task. Any may if the task has no lease.
    fn admits(&mut self, id: &TaskId, fence: Option<&Fence>) -> Result<bool, L::Error> {
        let Some(fence) = fence.filter(|_| Protection::FenceCheck.is_enabled()) else {
            return Ok(true);
        };
        let record = self.ledger.lease(id)?;
        let admitted = record.is_none_or(|record| record.admits(fence));
        self.done.outdated += u64::from(!admitted);
        Ok(admitted)
    }

    fn letter(&mut self, Letter { letter, result }: &Letter) -> Result<(), L::Error> {
        let fence = execution_of(&letter.message);
        if !self.admits(&letter.id, fence.as_ref())? {
            // Nothing is lost: the task has been published again.
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
        self.ledger.task_ended(&result.id)?;
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
                // The default deadline is relative to the clock of this machine; senders' clocks may be wrong.
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
                self.ledger.batch_ended(&batch.id)?;
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
