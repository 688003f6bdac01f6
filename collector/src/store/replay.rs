//! What people do with dead letters: replay and purge, each a part of one transaction.
//!
//! A replayed letter stays, with a mark: whoever asks for the old task learns what became of it, and
//! a letter that the broker delivers once more is known.

use std::collections::BTreeSet;

use garenne_common::wire::{
    Purged, ReplayItem, ReplayOutcome, ReplayPlan, Replayed, Report, replay,
};
use garenne_common::{DeadReason, Status, TaskId, TaskResult, Timestamp};
use rusqlite::{Connection, params};

use super::ledger::{SqliteLedger, from_count, from_time};
use super::letters::{Stored, stored};
use super::{EndedParked, StoreError};
use crate::ingest::group::{Group, Letter};
use crate::rules::aggregate::{Ledger, Resend, Rules, apply};

/// Bodies that one transaction moves; whoever asked asks again for the rest.
const MOVED_BYTES: usize = 8 * 1024 * 1024;

/// Marks the letters and puts their successors into the outbox, as far as [`MOVED_BYTES`] go.
pub(super) fn replay_letters(
    ledger: &mut SqliteLedger<'_>,
    items: &[ReplayItem],
    plan: &ReplayPlan,
    exchange: &str,
) -> Result<Vec<Replayed>, StoreError> {
    let (mut done, mut bytes) = (vec![], 0);
    for item in items {
        if bytes >= MOVED_BYTES {
            break;
        }
        let outcome = match successor(ledger.transaction, item, plan)? {
            Ok(task) => {
                bytes += task.message.body.len();
                let queue = task.queue.to_string();
                let resend = Resend {
                    exchange: exchange.to_owned(),
                    routing_key: queue.clone(),
                    message: task.message,
                };
                ledger.add_resend(&resend)?;
                ledger.mark_replayed(&item.id, &task.id)?;
                ReplayOutcome::Replayed { new_id: task.id, queue }
            }
            Err(refusal) => refusal,
        };
        done.push(Replayed { id: item.id.clone(), outcome });
    }
    Ok(done)
}

/// What [`replay_letters`] would do.
pub(super) fn rehearse(
    connection: &Connection,
    items: &[ReplayItem],
    plan: &ReplayPlan,
) -> Result<Vec<Replayed>, StoreError> {
    let rehearse = |item: &ReplayItem| {
        let outcome = match successor(connection, item, plan)? {
            Ok(task) => ReplayOutcome::Replayed { new_id: task.id, queue: task.queue.to_string() },
            Err(refusal) => refusal,
        };
        Ok(Replayed { id: item.id.clone(), outcome })
    };
    items.iter().map(rehearse).collect()
}

fn successor(
    connection: &Connection,
    item: &ReplayItem,
    plan: &ReplayPlan,
) -> Result<Result<replay::Replay, ReplayOutcome>, StoreError> {
    let Some(Stored { letter, late, replayed_as }) = stored(connection, &item.id)? else {
        return Ok(Err(ReplayOutcome::NotFound));
    };
    if let Some(new_id) = replayed_as {
        return Ok(Err(ReplayOutcome::Already { new_id }));
    }
    if late && !plan.late {
        let error = "its task has succeeded or was cancelled after all; --late replays it even so";
        return Ok(Err(ReplayOutcome::Refused { error: error.to_owned() }));
    }
    let new_id = item.new_id.clone().unwrap_or_else(TaskId::generate);
    let task = replay::replay(&letter, plan, new_id);
    Ok(task.map_err(|error| ReplayOutcome::Refused { error: error.to_string() }))
}

/// Deletes letters, whatever became of them. Final records stay; an unknown task, which has none,
/// ends by this, or its batch would wait for ever.
pub(super) fn purge(
    ledger: &mut SqliteLedger<'_>,
    ids: &[TaskId],
    rules: Rules,
) -> Result<(Purged, EndedParked), StoreError> {
    let (mut purged, mut group) = (Purged::default(), Group::new(ledger.now));
    let (ids, mut letters): (BTreeSet<&TaskId>, _) = (ids.iter().collect(), vec![]);
    for id in &ids {
        let Some(Stored { letter, late, replayed_as }) = stored(ledger.transaction, id)? else {
            continue;
        };
        let is_parked = !letter.reason.is_final() && !late && replayed_as.is_none();
        if is_parked && ledger.final_status(id)?.is_none() {
            let result =
                letter.to_result_as(DeadReason::UnknownTask, "purged; nobody knew its name");
            let result = result.map(|result| ended(result, ledger.now));
            group.reports.extend(result.clone().map(Report::Finished));
            letters.push(Letter { letter, result });
            purged.ended += 1;
        }
        purged.purged += 1;
    }
    let committed = apply(ledger, &group, rules)?;
    ledger.count("results", from_count(committed.fresh))?;
    let mut delete = ledger.transaction.prepare_cached("DELETE FROM dead_letters WHERE id = ?1")?;
    for id in ids {
        delete.execute([id.as_str()])?;
    }
    Ok((purged, EndedParked { letters, notices: committed.notices }))
}

fn ended(result: TaskResult, now: Timestamp) -> TaskResult {
    TaskResult { status: Status::Failed, finished_at: now, ..result }
}

impl SqliteLedger<'_> {
    /// Takes a letter out of the list of those that need a look: it goes to the workers as `new`,
    /// which is the same id for a task that has not ended.
    pub(super) fn mark_replayed(&self, id: &TaskId, new: &TaskId) -> Result<(), StoreError> {
        let mut update = self.transaction.prepare_cached(
            "UPDATE dead_letters SET replayed_as = ?2, replayed_at = ?3 WHERE id = ?1",
        )?;
        update.execute(params![id.as_str(), new.as_str(), from_time(self.now)])?;
        Ok(())
    }
}
