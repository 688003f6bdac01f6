//! What is read from SQLite, for queries and for the outbox. Nothing here writes.

use garenne_common::wire::{BatchStatus, Codec, Notice, Payload, QuietBatch, RetryNote, TaskState};
use garenne_common::{BatchId, Fingerprint, QueueName, TaskId, TaskName, TaskResult, Timestamp};
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::ledger::{
    batch, from_count, from_time, parsed, reason, select_batches, status, time, to_count,
};
use super::{
    Backlog, OutboxEntry, ResendEntry, StoreError, StoreIdentity, Totals, Waiting, letters,
    open_envelope,
};
use crate::rules::aggregate::Resend;

/// How many failed attempts of a dead task are shown.
const NAMED_ATTEMPTS: u32 = 50;
/// How many failed members the status of a batch names.
const NAMED_FAILURES: u32 = 10;
/// How many quiet batches an answer names.
const NAMED_BATCHES: u32 = 10;

/// What is shown of an error, and of a worker's name.
const ERROR_CHARS: usize = 4_000;
const WORKER_CHARS: usize = 255;

const RESULT_COLUMNS: &str = "id, name, queue, batch, status, bincode, output, error, \
     reason, attempt, redelivered, worker, started_at, finished_at, fingerprint";

pub(super) fn task(connection: &Connection, id: &TaskId) -> Result<TaskState, StoreError> {
    if let Some(result) = result(connection, id)? {
        return Ok(TaskState::Finished { result });
    }
    let letter = letters::parked(connection, id)?;
    let note = latest_attempts(connection, id, 1)?.pop();
    Ok(match (letter, note) {
        // A parked task that was replayed may be retrying again; what was stored last holds.
        (Some((letter, stored)), Some((_, noted))) if stored >= noted => {
            TaskState::Parked { letter }
        }
        (Some((letter, _)), None) => TaskState::Parked { letter },
        (_, Some((last, _))) => TaskState::Retrying { last },
        (None, None) => TaskState::Unknown,
    })
}

/// The results in the order of `ids`; stops before `max_bytes` but never before the first.
pub(super) fn results(
    connection: &Connection,
    ids: &[TaskId],
    max_bytes: usize,
) -> Result<Vec<TaskResult>, StoreError> {
    let (mut found, mut bytes) = (vec![], 0);
    for id in ids {
        let Some(result) = result(connection, id)? else { continue };
        bytes += result.output.as_ref().map_or(0, |output| output.bytes.len()) + 1_000;
        bytes += result.error.as_ref().map_or(0, String::len);
        if bytes > max_bytes && !found.is_empty() {
            break;
        }
        found.push(result);
    }
    Ok(found)
}

pub(super) fn batch_status(
    connection: &Connection,
    id: &BatchId,
) -> Result<Option<BatchStatus>, StoreError> {
    let mut select = connection.prepare_cached(&select_batches("id = ?1"))?;
    let Some(batch) = select.query_row([id.as_str()], batch).optional()? else {
        return Ok(None);
    };
    let changed_at = connection
        .prepare_cached("SELECT stored_at FROM batches WHERE id = ?1")?
        .query_row([id.as_str()], |row| time(row, 0))
        .optional()?;
    let mut select = connection.prepare_cached(&format!(
        "SELECT {RESULT_COLUMNS} FROM results \
         WHERE batch = ?1 AND status <> 'succeeded' ORDER BY rowid DESC LIMIT ?2"
    ))?;
    let failures = select.query_map(params![id.as_str(), NAMED_FAILURES], result_row)?;
    let mut failures = failures.collect::<Result<Vec<_>, _>>()?;
    // Only a foreign worker reports an output of a task that failed.
    for failure in &mut failures {
        failure.output = None;
    }
    let parked = connection
        .prepare_cached("SELECT COUNT(*) FROM parked WHERE batch = ?1 AND waiting = 1")?
        .query_row([id.as_str()], |row| row.get(0).map(to_count))?;
    Ok(Some(BatchStatus { summary: batch.summary(), failures, changed_at, parked }))
}

/// Batches that are not over and in which nothing has changed since then, the most quiet first.
pub(super) fn quiet_batches(
    connection: &Connection,
    since: Timestamp,
) -> Result<Vec<QuietBatch>, StoreError> {
    let quiet: Vec<(String, Timestamp)> = connection
        .prepare_cached(
            "SELECT id, stored_at FROM batches \
             WHERE state IN ('open', 'sealed') AND stored_at <= ?1 ORDER BY stored_at LIMIT ?2",
        )?
        .query_map([from_time(since), i64::from(NAMED_BATCHES)], |row| {
            Ok((row.get(0)?, time(row, 1)?))
        })?
        .collect::<Result<_, _>>()?;
    let mut select = connection.prepare_cached(&select_batches("id = ?1"))?;
    let mut batches = vec![];
    for (id, changed_at) in quiet {
        if let Some(batch) = select.query_row([id], batch).optional()? {
            batches.push(QuietBatch { summary: batch.summary(), changed_at });
        }
    }
    Ok(batches)
}

pub(super) fn identity(connection: &Connection) -> Result<StoreIdentity, StoreError> {
    let select = "SELECT id, created_at FROM store";
    Ok(connection.query_row(select, [], |row| {
        Ok(StoreIdentity { id: row.get(0)?, created: time(row, 1)? })
    })?)
}

/// When a result, a failed attempt or a dead letter was stored last. Rows ascend with the time.
pub(super) fn last_commit(connection: &Connection) -> Result<Option<Timestamp>, StoreError> {
    let mut last = None;
    for table in ["results", "attempts", "dead_letters"] {
        let select = format!("SELECT stored_at FROM {table} ORDER BY rowid DESC LIMIT 1");
        let stored = connection.query_row(&select, [], |row| time(row, 0)).optional()?;
        last = last.max(stored);
    }
    Ok(last)
}

pub(super) fn totals(connection: &Connection) -> Result<Totals, StoreError> {
    let mut select = connection.prepare_cached(
        "SELECT (SELECT value FROM counters WHERE name = 'results'), \
                (SELECT value FROM counters WHERE name = 'repeats'), \
                (SELECT COUNT(*) FROM dead_letters WHERE late = 0 AND replayed_as IS NULL), \
                (SELECT COUNT(*) FROM batches)",
    )?;
    let totals = select.query_row([], |row| {
        Ok(Totals {
            results: to_count(row.get(0)?),
            repeats: to_count(row.get(1)?),
            dead: to_count(row.get(2)?),
            batches: to_count(row.get(3)?),
        })
    })?;
    Ok(totals)
}

/// By the two ends of each outbox: to count the entries would read all of them.
pub(super) fn backlog(connection: &Connection) -> Result<Backlog, StoreError> {
    let ends = |table: &str| {
        let sql = format!(
            "SELECT (SELECT seq FROM {table} ORDER BY seq LIMIT 1), \
                    (SELECT seq FROM {table} ORDER BY seq DESC LIMIT 1)"
        );
        let mut select = connection.prepare_cached(&sql)?;
        let ends: (Option<i64>, Option<i64>) =
            select.query_row([], |row| Ok((row.get(0)?, row.get(1)?)))?;
        Ok::<_, StoreError>(ends.0.zip(ends.1).map(|(first, last)| Waiting {
            oldest: to_count(first),
            count: to_count(last - first) + 1,
        }))
    };
    Ok(Backlog { notices: ends("outbox")?, resends: ends("resends")? })
}

pub(super) fn outbox(
    connection: &Connection,
    after: u64,
    limit: usize,
) -> Result<Vec<OutboxEntry>, StoreError> {
    let mut select = connection
        .prepare_cached("SELECT seq, notice FROM outbox WHERE seq > ?1 ORDER BY seq LIMIT ?2")?;
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let rows = select.query_map([from_count(after), limit], |row| {
        let notice = parsed(row, 1, |text| serde_json::from_str::<Notice>(text))?;
        Ok(OutboxEntry { seq: to_count(row.get(0)?), notice })
    })?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// Stops before `max_bytes` of bodies but never before the first.
pub(super) fn resends(
    connection: &Connection,
    after: u64,
    limit: usize,
    max_bytes: usize,
) -> Result<Vec<ResendEntry>, StoreError> {
    let mut select = connection.prepare_cached(
        "SELECT seq, exchange, routing_key, envelope, body FROM resends WHERE seq > ?1
         ORDER BY seq LIMIT ?2",
    )?;
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let mut rows = select.query([from_count(after), limit])?;
    let (mut found, mut bytes) = (vec![], 0);
    while let Some(row) = rows.next()? {
        let body: Vec<u8> = row.get(4)?;
        bytes += body.len();
        if bytes > max_bytes && !found.is_empty() {
            break;
        }
        let message = parsed(row, 3, |envelope| open_envelope(envelope, body.clone().into()))?;
        let (exchange, routing_key) = (row.get(1)?, row.get(2)?);
        let resend = Resend { exchange, routing_key, message };
        found.push(ResendEntry { seq: to_count(row.get(0)?), resend });
    }
    Ok(found)
}

pub(super) fn has_overdue_batches(
    connection: &Connection,
    now: Timestamp,
) -> Result<bool, StoreError> {
    let mut select = connection.prepare_cached(
        "SELECT EXISTS (SELECT 1 FROM batches WHERE state = 'open' AND deadline <= ?1)",
    )?;
    Ok(select.query_row([from_time(now)], |row| row.get(0))?)
}

fn result(connection: &Connection, id: &TaskId) -> Result<Option<TaskResult>, StoreError> {
    let mut select = connection
        .prepare_cached(&format!("SELECT {RESULT_COLUMNS} FROM results WHERE id = ?1"))?;
    Ok(select.query_row([id.as_str()], result_row).optional()?)
}

/// The failed attempts that were followed by another one: the last [`NAMED_ATTEMPTS`], oldest first.
pub(super) fn attempts(connection: &Connection, id: &TaskId) -> Result<Vec<RetryNote>, StoreError> {
    let mut notes = latest_attempts(connection, id, NAMED_ATTEMPTS)?;
    notes.reverse();
    Ok(notes.into_iter().map(|(note, _)| note).collect())
}

fn latest_attempts(
    connection: &Connection,
    id: &TaskId,
    limit: u32,
) -> Result<Vec<(RetryNote, Timestamp)>, StoreError> {
    let mut select = connection.prepare_cached(
        "SELECT task, name, batch, attempt, error, next_at, \
         worker, at, stored_at \
         FROM attempts WHERE task = ?1 ORDER BY attempt DESC LIMIT ?2",
    )?;
    let notes = select.query_map(params![id.as_str(), limit], |row| {
        let note = RetryNote {
            id: parsed(row, 0, TaskId::new)?,
            name: parsed(row, 1, TaskName::new)?,
            batch: maybe_batch(row, 2)?,
            attempt: row.get(3)?,
            error: cut(row.get(4)?, ERROR_CHARS),
            next_at: time(row, 5)?,
            worker: cut(row.get(6)?, WORKER_CHARS),
            at: time(row, 7)?,
        };
        Ok((note, time(row, 8)?))
    })?;
    Ok(notes.collect::<Result<_, _>>()?)
}

/// A row of [`RESULT_COLUMNS`].
fn result_row(row: &Row<'_>) -> rusqlite::Result<TaskResult> {
    let codec = if row.get(5)? { Codec::Bincode } else { Codec::Json };
    let output: Option<Vec<u8>> = row.get(6)?;
    let error: Option<String> = row.get(7)?;
    let given_up: Option<String> = row.get(8)?;
    let reason = given_up.map(|_| reason(row, 8)).transpose()?;
    Ok(TaskResult {
        id: parsed(row, 0, TaskId::new)?,
        name: parsed(row, 1, TaskName::new)?,
        queue: parsed(row, 2, QueueName::new)?,
        batch: maybe_batch(row, 3)?,
        status: status(row, 4)?,
        output: output.map(|bytes| Payload { codec, bytes: bytes.into() }),
        error: error.map(|error| cut(error, ERROR_CHARS)),
        reason,
        attempt: row.get(9)?,
        redelivered: row.get(10)?,
        worker: cut(row.get(11)?, WORKER_CHARS).into(),
        started_at: time(row, 12)?,
        finished_at: time(row, 13)?,
        fingerprint: row
            .get::<_, Option<i64>>(14)?
            .map(|number| Fingerprint::from_u64(number.cast_unsigned())),
    })
}

/// Reports of other senders may hold megabytes of text, and an answer must fit into a message.
fn cut(mut text: String, most: usize) -> String {
    if let Some((end, _)) = text.char_indices().nth(most) {
        text.truncate(end);
    }
    text
}

fn maybe_batch(row: &Row<'_>, column: usize) -> rusqlite::Result<Option<BatchId>> {
    let text: Option<String> = row.get(column)?;
    text.map(|_| parsed(row, column, BatchId::new)).transpose()
}
