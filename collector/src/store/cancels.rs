//! Cancel requests in SQLite: stored until their task or batch has ended, and read by workers in pages.

#[cfg(feature = "failpoints")]
use garenne_common::failpoints::Protection;
use garenne_common::topology::MAX_DELAY;
use garenne_common::wire::{BatchState, CancelRequest, CancelState, CancelTarget, Cancelled};
use garenne_common::{BatchId, TaskId, Timestamp};
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::ledger::{
    SqliteLedger, batch, from_count, from_time, parsed, select_batches, status, time, to_count,
};
use super::{CancelledBatch, CancelledTasks, StoreError};

/// Stores a request for each task that has not ended.
pub(super) fn cancel(
    ledger: &mut SqliteLedger<'_>,
    ids: Vec<TaskId>,
    reason: &str,
) -> Result<CancelledTasks, StoreError> {
    let mut done = CancelledTasks { tasks: Vec::with_capacity(ids.len()), requests: vec![] };
    for id in ids {
        if let Some(ended) = ended(ledger, &id)? {
            done.tasks.push(ended);
            continue;
        }
        done.requests.push(store_request(ledger, &CancelTarget::Task(id.clone()), reason)?);
        done.tasks.push(Cancelled::requested(id));
    }
    Ok(done)
}

/// Stores a request for a batch unless all of it has ended.
///
/// An abandoned batch has ended, but its members may not have: they can still be cancelled.
pub(super) fn cancel_batch(
    ledger: &mut SqliteLedger<'_>,
    id: BatchId,
    reason: &str,
) -> Result<CancelledBatch, StoreError> {
    let known = {
        let mut select = ledger.transaction.prepare_cached(&select_batches("id = ?1"))?;
        select.query_row([id.as_str()], batch).optional()?
    };
    let summary = known.as_ref().map(crate::rules::batch::Batch::summary);
    if known.is_some_and(|batch| batch.state == BatchState::Done) {
        return Ok(CancelledBatch { state: CancelState::TooLate, summary, request: None });
    }
    let request = Some(store_request(ledger, &CancelTarget::Batch(id), reason)?);
    Ok(CancelledBatch { state: CancelState::Requested, summary, request })
}

fn ended(ledger: &SqliteLedger<'_>, id: &TaskId) -> Result<Option<Cancelled>, StoreError> {
    let mut select = ledger
        .transaction
        .prepare_cached("SELECT status, finished_at FROM results WHERE id = ?1")?;
    let ended = select.query_row([id.as_str()], |row| {
        Ok(Cancelled::ended(id.clone(), status(row, 0)?, time(row, 1)?))
    });
    Ok(ended.optional()?)
}

/// The first request counts: another one changes neither its number nor its reason.
fn store_request(
    ledger: &mut SqliteLedger<'_>,
    target: &CancelTarget,
    reason: &str,
) -> Result<CancelRequest, StoreError> {
    #[cfg(feature = "failpoints")]
    if !Protection::KeptCancelRequests.is_enabled() {
        return Ok(sabotage::unstored(ledger, target, reason));
    }
    let (is_batch, id) = columns(target);
    let mut insert = ledger.transaction.prepare_cached(
        "INSERT INTO cancels (batch, id, reason, stored_at) VALUES (?1, ?2, ?3, ?4) \
         ON CONFLICT (batch, id) DO UPDATE SET reason = reason RETURNING seq, reason",
    )?;
    let now = from_time(ledger.now);
    let kept = insert.query_row(params![is_batch, id, reason, now], |row| {
        let (seq, reason) = (to_count(row.get(0)?), row.get(1)?);
        Ok(CancelRequest { seq, target: target.clone(), reason })
    })?;
    ledger.has_cancel_requests = Some(true);
    Ok(kept)
}

fn columns(target: &CancelTarget) -> (bool, &str) {
    match target {
        CancelTarget::Task(id) => (false, id.as_str()),
        CancelTarget::Batch(id) => (true, id.as_str()),
    }
}

/// Deletes the request for a task or batch that has ended.
pub(super) fn delete(
    ledger: &SqliteLedger<'_>,
    is_batch: bool,
    id: &str,
) -> Result<(), StoreError> {
    let mut delete =
        ledger.transaction.prepare_cached("DELETE FROM cancels WHERE batch = ?1 AND id = ?2")?;
    delete.execute(params![is_batch, id])?;
    Ok(())
}

/// Deletes old requests for unknown tasks and batches. A delayed task may arrive after [`MAX_DELAY`], and its
/// request must exist until then.
pub(super) fn delete_old(
    ledger: &SqliteLedger<'_>,
    before: Timestamp,
    limit: i64,
) -> Result<usize, StoreError> {
    let delay = u64::try_from(MAX_DELAY.as_millis()).unwrap_or(u64::MAX);
    let before = Timestamp::from_millis(before.as_millis().saturating_sub(delay));
    let mut delete = ledger.transaction.prepare_cached(
        "DELETE FROM cancels WHERE seq IN (SELECT seq FROM \
         (SELECT seq, stored_at FROM cancels ORDER BY seq LIMIT ?2) WHERE stored_at < ?1)",
    )?;
    Ok(delete.execute(params![from_time(before), limit])?)
}

/// The requests with higher numbers than `after`, and the highest number so far.
pub(super) fn page(
    connection: &Connection,
    after: u64,
    limit: usize,
) -> Result<(Vec<CancelRequest>, u64), StoreError> {
    // Read first: a request that is stored between the two is in the page and above the number.
    let newest = connection
        .prepare_cached("SELECT seq FROM sqlite_sequence WHERE name = 'cancels'")?
        .query_row([], |row| row.get(0))
        .optional()?
        .map_or(0, to_count);
    let mut select = connection.prepare_cached(
        "SELECT seq, batch, id, reason FROM cancels WHERE seq > ?1 ORDER BY seq LIMIT ?2",
    )?;
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let rows = select.query_map(params![from_count(after), limit], cancel_request)?;
    Ok((rows.collect::<Result<_, _>>()?, newest))
}

fn cancel_request(row: &Row<'_>) -> rusqlite::Result<CancelRequest> {
    let target = if row.get(1)? {
        CancelTarget::Batch(parsed(row, 2, BatchId::new)?)
    } else {
        CancelTarget::Task(parsed(row, 2, TaskId::new)?)
    };
    Ok(CancelRequest { seq: to_count(row.get(0)?), target, reason: row.get(3)? })
}

/// The mistake that a protection prevents.
#[cfg(feature = "failpoints")]
mod sabotage {
    use super::{CancelRequest, CancelTarget, SqliteLedger};

    /// A request that is broadcast and not stored.
    pub(super) fn unstored(
        ledger: &SqliteLedger<'_>,
        target: &CancelTarget,
        reason: &str,
    ) -> CancelRequest {
        let (seq, target) = (ledger.now.as_millis(), target.clone());
        CancelRequest { seq, target, reason: reason.to_owned() }
    }
}
