//! Leases in SQLite: the whole task of a held lease, and the state of each other lease.

use bytes::Bytes;
use garenne_common::topology::Topology;
use garenne_common::wire::{Fence, Lease, lease};
use garenne_common::{TaskId, Timestamp};
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::ledger::{SqliteLedger, from_time, parsed, to_count, word};
use super::{StoreError, open_envelope, seal_envelope};
use crate::rules::aggregate::{Ledger, Resend};
use crate::rules::lease::{LeaseRecord, LeaseState};

/// A held lease that was not renewed in time.
struct LapsedLease {
    id: TaskId,
    queue: String,
    envelope: String,
    body: Vec<u8>,
    fence: u64,
    worker: String,
}

pub(super) fn record(
    ledger: &SqliteLedger<'_>,
    id: &TaskId,
) -> Result<Option<LeaseRecord>, StoreError> {
    let mut select = ledger
        .transaction
        .prepare_cached("SELECT fence, execution, state FROM leases WHERE id = ?1")?;
    let row = |row: &Row<'_>| {
        let find = |text: &str| LeaseState::ALL.into_iter().find(|state| state.as_str() == text);
        let fence = Fence { number: to_count(row.get(0)?), execution: row.get(1)? };
        Ok(LeaseRecord { fence, state: word(row, 2, find)? })
    };
    Ok(select.query_row([id.as_str()], row).optional()?)
}

pub(super) fn begin(ledger: &SqliteLedger<'_>, lease: &Lease) -> Result<(), StoreError> {
    let envelope = seal_envelope(&lease.message);
    let envelope = envelope.map_err(|error| StoreError::Other(error.to_string()))?;
    let mut insert = ledger.transaction.prepare_cached(
        "INSERT OR REPLACE INTO leases (id, fence, execution, state, worker, queue, term, envelope, \
         body, stored_at) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
    )?;
    insert.execute(params![
        lease.id.as_str(),
        i64::try_from(lease.fence.number).unwrap_or(i64::MAX),
        lease.fence.execution,
        LeaseState::Held.as_str(),
        lease.worker,
        lease.queue.as_str(),
        i64::try_from(lease.term.as_millis()).unwrap_or(i64::MAX),
        envelope,
        &lease.message.body[..],
        from_time(ledger.now),
    ])?;
    Ok(())
}

pub(super) fn mark(
    ledger: &SqliteLedger<'_>,
    id: &TaskId,
    state: LeaseState,
) -> Result<(), StoreError> {
    let mut update = ledger.transaction.prepare_cached(match state {
        LeaseState::Held => "UPDATE leases SET state = ?2, stored_at = ?3 WHERE id = ?1",
        LeaseState::Released | LeaseState::Lapsed => {
            "UPDATE leases SET state = ?2, stored_at = ?3, envelope = '', body = x'' WHERE id = ?1"
        }
    })?;
    update.execute(params![id.as_str(), state.as_str(), from_time(ledger.now)])?;
    Ok(())
}

pub(super) fn remove(ledger: &SqliteLedger<'_>, id: &TaskId) -> Result<(), StoreError> {
    let mut delete = ledger.transaction.prepare_cached("DELETE FROM leases WHERE id = ?1")?;
    delete.execute([id.as_str()])?;
    Ok(())
}

/// Whether any lease is held.
pub(super) fn any_held(connection: &Connection) -> Result<bool, StoreError> {
    let mut select =
        connection.prepare_cached("SELECT EXISTS (SELECT 1 FROM leases WHERE state = 'held')")?;
    Ok(select.query_row([], |row| row.get(0))?)
}

/// Publishes tasks again, through the outbox, whose lease was not renewed for its term. The term starts with
/// the last renewal, but not before `listening_since`. Returns their number.
pub(super) fn lapse(
    ledger: &mut SqliteLedger<'_>,
    topology: &Topology,
    listening_since: Timestamp,
    limit: usize,
) -> Result<usize, StoreError> {
    let lapsed = lapsed(ledger, listening_since, limit)?;
    for lease in &lapsed {
        if ledger.final_status(&lease.id)?.is_some() {
            remove(ledger, &lease.id)?;
            continue;
        }
        ledger.add_resend(&again(lease, topology)?)?;
        mark(ledger, &lease.id, LeaseState::Lapsed)?;
        tracing::warn!(id = %lease.id, worker = lease.worker, fence = lease.fence, "lease lapsed");
    }
    Ok(lapsed.len())
}

fn lapsed(
    ledger: &SqliteLedger<'_>,
    listening_since: Timestamp,
    limit: usize,
) -> Result<Vec<LapsedLease>, StoreError> {
    let mut select = ledger.transaction.prepare_cached(
        "SELECT id, queue, envelope, body, fence, worker FROM leases \
         WHERE state = 'held' AND MAX(stored_at, ?1) + term <= ?2 ORDER BY stored_at LIMIT ?3",
    )?;
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let row = |row: &Row<'_>| {
        Ok(LapsedLease {
            id: parsed(row, 0, TaskId::new)?,
            queue: row.get(1)?,
            envelope: row.get(2)?,
            body: row.get(3)?,
            fence: to_count(row.get(4)?),
            worker: row.get(5)?,
        })
    };
    let bounds = params![from_time(listening_since), from_time(ledger.now), limit];
    Ok(select.query_map(bounds, row)?.collect::<Result<_, _>>()?)
}

/// The task to publish: with the fence of the lapsed execution, which the next one exceeds, and marked as a
/// suspect, since it may have crashed its worker.
fn again(lease: &LapsedLease, topology: &Topology) -> Result<Resend, StoreError> {
    let message = open_envelope(&lease.envelope, Bytes::copy_from_slice(&lease.body));
    let mut message = message.map_err(|error| StoreError::Other(error.to_string()))?;
    lease::set_fence(&mut message, lease.fence);
    lease::mark_lapsed(&mut message);
    Ok(Resend { exchange: topology.tasks_exchange(), routing_key: lease.queue.clone(), message })
}
