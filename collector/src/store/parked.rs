//! Parked tasks in SQLite: their queue and task name, and when they may be released.
//!
//! The task itself is a dead letter. Its row here is kept after the release, so that a task which is parked
//! again waits longer each time.

use std::time::Duration;

use bytes::Bytes;
use garenne_common::wire::{DeadLetter, Message, ParkedKind, Report};
use garenne_common::{DeadReason, QueueName, TaskId, TaskName, Timestamp};
use rusqlite::{Connection, OptionalExtension, params};

use super::ledger::{SqliteLedger, from_count, from_time, parsed, time, to_count};
use super::{EndedParked, StoreError, open_envelope};
use crate::APP_ID;
use crate::ingest::group::{Group, Letter};
use crate::rules::aggregate::{Ledger, Resend, Rules, apply};

/// Pause of a task that is parked again after its first release; it doubles each time.
const FIRST_PAUSE: Duration = Duration::from_secs(2);
const LONGEST_PAUSE: Duration = Duration::from_mins(5);
/// Maximum number of kinds of parked tasks in a response.
const MAX_KINDS: u32 = 20;

/// Parks a task until a worker has a handler for it. Does nothing if its queue or name is invalid.
pub(super) fn park(ledger: &mut SqliteLedger<'_>, letter: &DeadLetter) -> Result<(), StoreError> {
    let name = letter.message.properties.kind.as_deref().map(TaskName::new);
    let (Some(Ok(name)), Ok(queue)) = (name, QueueName::new(&letter.queue)) else {
        return Ok(());
    };
    let id = letter.id.as_str();
    let releases: Option<u32> = ledger
        .transaction
        .prepare_cached("SELECT releases FROM parked WHERE id = ?1")?
        .query_row([id], |row| row.get(0))
        .optional()?;
    let due = ledger.now.plus(pause(releases.unwrap_or(0)));
    let mut save = ledger.transaction.prepare_cached(
        "INSERT INTO parked (id, queue, name, batch, releases, waiting, due, stored_at) \
         VALUES (?1, ?2, ?3, ?4, 0, 1, ?5, ?6) \
         ON CONFLICT (id) DO UPDATE SET queue = ?2, name = ?3, batch = ?4, waiting = 1, due = ?5, \
         stored_at = ?6",
    )?;
    let batch = letter.batch();
    let batch = batch.as_ref().map(garenne_common::BatchId::as_str);
    let (due, now) = (from_time(due), from_time(ledger.now));
    save.execute(params![id, queue.as_str(), name.as_str(), batch, due, now])?;
    ledger.has_cancel_requests = Some(true);
    Ok(())
}

fn pause(releases: u32) -> Duration {
    match releases.checked_sub(1) {
        None => Duration::ZERO,
        Some(again) => FIRST_PAUSE.saturating_mul(2_u32.saturating_pow(again)).min(LONGEST_PAUSE),
    }
}

/// Deletes the row of a task that has ended.
pub(super) fn delete(ledger: &SqliteLedger<'_>, id: &str) -> Result<(), StoreError> {
    let mut delete = ledger.transaction.prepare_cached("DELETE FROM parked WHERE id = ?1")?;
    delete.execute([id])?;
    Ok(())
}

/// The pairs of queue and task name of parked tasks, at most `limit`.
pub(super) fn kinds(
    connection: &Connection,
    limit: usize,
) -> Result<Vec<(QueueName, TaskName)>, StoreError> {
    // Walks the index from pair to pair: there may be a hundred thousand tasks of one kind.
    let mut next = connection.prepare_cached(
        "SELECT queue, name FROM parked WHERE waiting = 1 AND (queue, name) > (?1, ?2) \
         ORDER BY queue, name LIMIT 1",
    )?;
    let (mut kinds, mut place) = (vec![], (String::new(), String::new()));
    while kinds.len() < limit {
        let row = next.query_row([&place.0, &place.1], |row| Ok((row.get(0)?, row.get(1)?)));
        let Some(found) = row.optional()? else { break };
        place = found;
        // Letters of foreign clients may contain invalid names, and must not block the others.
        if let (Ok(queue), Ok(name)) = (QueueName::new(&place.0), TaskName::new(&place.1)) {
            kinds.push((queue, name));
        }
    }
    Ok(kinds)
}

/// The kinds of parked tasks with their numbers, the most frequent first.
pub(super) fn waiting(connection: &Connection) -> Result<Vec<ParkedKind>, StoreError> {
    let mut select = connection.prepare_cached(
        "SELECT queue, name, COUNT(*), MIN(stored_at) FROM parked WHERE waiting = 1 \
         GROUP BY queue, name ORDER BY COUNT(*) DESC LIMIT ?1",
    )?;
    let rows = select.query_map([MAX_KINDS], |row| {
        Ok((row.get(0)?, row.get(1)?, to_count(row.get(2)?), time(row, 3)?))
    })?;
    let kinds: Vec<(String, String, u64, Timestamp)> = rows.collect::<Result<_, _>>()?;
    let named = |(queue, name, tasks, since): (String, String, u64, Timestamp)| {
        // Letters of foreign clients may contain invalid names, and must not hide the others.
        let (queue, name) = (QueueName::new(&queue).ok()?, TaskName::new(&name).ok()?);
        Some(ParkedKind { queue, name, tasks, since })
    };
    Ok(kinds.into_iter().filter_map(named).collect())
}

/// Releases due parked tasks of a kind to their queue, at most `limit`. Returns their number.
pub(super) fn release(
    ledger: &mut SqliteLedger<'_>,
    (queue, name): (&QueueName, &TaskName),
    exchange: &str,
    limit: usize,
) -> Result<usize, StoreError> {
    let due: Vec<String> = {
        let mut select = ledger.transaction.prepare_cached(
            "SELECT id FROM parked WHERE waiting = 1 AND queue = ?1 AND name = ?2 AND due <= ?3 \
             ORDER BY due LIMIT ?4",
        )?;
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let rows = select.query_map(
            params![queue.as_str(), name.as_str(), from_time(ledger.now), limit],
            |row| row.get(0),
        )?;
        rows.collect::<Result<_, _>>()?
    };
    let mut released = 0;
    for id in due {
        let Some(message) = letter_of(ledger, &id)? else {
            // It has been replayed or purged.
            delete(ledger, &id)?;
            continue;
        };
        let (exchange, routing_key) = (exchange.to_owned(), queue.to_string());
        ledger.add_resend(&Resend { exchange, routing_key, message })?;
        let transaction = ledger.transaction;
        transaction.prepare_cached("DELETE FROM dead_letters WHERE id = ?1")?.execute([&id])?;
        transaction
            .prepare_cached(
                "UPDATE parked SET waiting = 0, releases = releases + 1, stored_at = ?2 \
                 WHERE id = ?1",
            )?
            .execute(params![id, from_time(ledger.now)])?;
        released += 1;
    }
    Ok(released)
}

fn letter_of(ledger: &SqliteLedger<'_>, id: &str) -> Result<Option<Message>, StoreError> {
    let mut select = ledger.transaction.prepare_cached(
        "SELECT envelope, body FROM dead_letters WHERE id = ?1 AND reason = ?2 AND late = 0 AND replayed_as IS NULL",
    )?;
    let message = select.query_row([id, DeadReason::UnknownTask.as_str()], |row| {
        let body: Vec<u8> = row.get(1)?;
        parsed(row, 0, |envelope| open_envelope(envelope, Bytes::from(body.clone())))
    });
    Ok(message.optional()?)
}

/// Parked tasks with a cancel request, and its reason; at most `limit`.
pub(super) fn cancelled(
    connection: &Connection,
    limit: usize,
) -> Result<Vec<(TaskId, String)>, StoreError> {
    let any = connection
        .prepare_cached("SELECT EXISTS (SELECT 1 FROM parked WHERE waiting = 1)")?
        .query_row([], |row| row.get::<_, bool>(0))?;
    if !any {
        return Ok(vec![]);
    }
    let mut select = connection.prepare_cached(
        "SELECT parked.id, cancels.reason FROM cancels JOIN parked ON parked.id = cancels.id \
         WHERE cancels.batch = 0 AND parked.waiting = 1 \
         UNION \
         SELECT parked.id, cancels.reason FROM cancels JOIN parked ON parked.batch = cancels.id \
         WHERE cancels.batch = 1 AND parked.waiting = 1 LIMIT ?1",
    )?;
    let rows = select.query_map([i64::try_from(limit).unwrap_or(i64::MAX)], |row| {
        Ok((parsed(row, 0, TaskId::new)?, row.get(1)?))
    })?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// Ends parked tasks as cancelled.
pub(super) fn end_cancelled(
    ledger: &mut SqliteLedger<'_>,
    tasks: Vec<(TaskId, String)>,
    rules: Rules,
) -> Result<EndedParked, StoreError> {
    let mut group = Group::new(ledger.now);
    let mut letters = vec![];
    for (id, reason) in tasks {
        let Some(message) = letter_of(ledger, id.as_str())? else {
            delete(ledger, id.as_str())?;
            continue;
        };
        let queue: String = ledger
            .transaction
            .prepare_cached("SELECT queue FROM parked WHERE id = ?1")?
            .query_row([id.as_str()], |row| row.get(0))?;
        let letter = DeadLetter::new(&message, &queue, DeadReason::UnknownTask, &reason, APP_ID);
        let Some(result) = letter.to_cancelled() else { continue };
        group.reports.push(Report::Finished(result.clone()));
        letters.push(Letter { letter, result: Some(result) });
    }
    let committed = apply(ledger, &group, rules)?;
    ledger.count("results", from_count(committed.fresh))?;
    ledger.count("repeats", from_count(committed.repeats))?;
    Ok(EndedParked { letters, notices: committed.notices })
}
