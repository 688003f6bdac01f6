//! Dead letters one by one as they are read: rows, whole messages, bodies. Nothing here writes.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use garenne_common::wire::{DeadLetter, DeadSummary, LetterMessage, LetterState, Payload};
use garenne_common::{BatchId, DeadReason, TaskId, Timestamp};
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::ledger::{maybe_time, parsed, reason, time, to_count};
use super::{ReplayLinks, StoreError, open_envelope};

/// One letter alone may show more; and no body above it is part of a whole message.
pub(super) const SHOWN_BODY_BYTES: u32 = 1024 * 1024;

/// `?1` is the largest body to read; [`summary`] reads the row.
pub(super) const COLUMNS: &str = "id, kind, queue, reason, error, given_up_by, at, LENGTH(body), \
     CASE WHEN LENGTH(body) <= ?1 THEN body END, late, started_at, batch, replay_of, replays, \
     replayed_as, replayed_at, envelope";

/// The pile that needs a look; the partial indexes have the same words.
pub(super) const IS_DEAD: &str = "late = 0 AND replayed_as IS NULL";

/// One letter with its message, whatever became of it.
pub(super) fn one(connection: &Connection, id: &TaskId) -> Result<Option<DeadSummary>, StoreError> {
    let sql = format!("SELECT {COLUMNS} FROM dead_letters WHERE id = ?2");
    let mut select = connection.prepare_cached(&sql)?;
    let read = |row: &Row<'_>| summary(row, true);
    let mut letter = select.query_row(params![SHOWN_BODY_BYTES, id.as_str()], read).optional()?;
    if let Some(letter) = &mut letter {
        let text = letter.message.as_ref().and_then(|message| message.body_text.as_deref());
        letter.args = text.and_then(|text| Payload::of_showable_json(text.as_bytes()));
    }
    Ok(letter)
}

/// The task's letter, if it is parked: its name is unknown and nobody has sent it again.
pub(super) fn parked(
    connection: &Connection,
    id: &TaskId,
) -> Result<Option<(DeadSummary, Timestamp)>, StoreError> {
    let sql = format!(
        "SELECT {COLUMNS}, stored_at FROM dead_letters WHERE id = ?2 AND {IS_DEAD} AND reason = ?3"
    );
    let mut select = connection.prepare_cached(&sql)?;
    let unknown = DeadReason::UnknownTask.as_str();
    let parked = select.query_row(params![SHOWN_BODY_BYTES, id.as_str(), unknown], |row| {
        Ok((summary(row, false)?, time(row, 17)?))
    });
    Ok(parked.optional()?)
}

/// A letter as it was when it was given up, and what became of it since.
pub(super) struct Stored {
    pub(super) letter: DeadLetter,
    pub(super) late: bool,
    pub(super) replayed_as: Option<TaskId>,
}

pub(super) fn stored(connection: &Connection, id: &TaskId) -> Result<Option<Stored>, StoreError> {
    let mut select = connection.prepare_cached(
        "SELECT envelope, body, queue, reason, error, given_up_by, started_at, at, redelivered, \
         late, replayed_as FROM dead_letters WHERE id = ?1",
    )?;
    let stored = select.query_row([id.as_str()], |row| {
        let body: Vec<u8> = row.get(1)?;
        let message = parsed(row, 0, |envelope| open_envelope(envelope, body.clone().into()))?;
        let letter = DeadLetter {
            message,
            id: id.clone(),
            queue: row.get(2)?,
            reason: reason(row, 3)?,
            error: row.get(4)?,
            by: row.get(5)?,
            started_at: maybe_time(row, 6)?,
            at: time(row, 7)?,
            redelivered: row.get(8)?,
        };
        Ok(Stored { letter, late: row.get(9)?, replayed_as: maybe_id(row, 10)? })
    });
    Ok(stored.optional()?)
}

/// A piece of a body, in base64.
pub(super) fn body(connection: &Connection, id: &TaskId, from: u64) -> Result<String, StoreError> {
    let mut select = connection
        .prepare_cached("SELECT SUBSTR(body, ?2 + 1, ?3) FROM dead_letters WHERE id = ?1")?;
    let from = i64::try_from(from).unwrap_or(i64::MAX - 1);
    // A multiple of three, so that pieces can be strung together as text too.
    let length = 3 * SHOWN_BODY_BYTES;
    let piece: Option<Vec<u8>> =
        select.query_row(params![id.as_str(), from, length], |row| row.get(0)).optional()?;
    Ok(BASE64.encode(piece.unwrap_or_default()))
}

/// What a task was replayed as, and what it is a replay of.
pub(super) fn links(connection: &Connection, id: &TaskId) -> Result<ReplayLinks, StoreError> {
    let find = |sql: &str| -> Result<Option<TaskId>, StoreError> {
        let mut select = connection.prepare_cached(sql)?;
        Ok(select.query_row([id.as_str()], |row| maybe_id(row, 0)).optional()?.flatten())
    };
    Ok(ReplayLinks {
        replayed_as: find("SELECT replayed_as FROM dead_letters WHERE id = ?1")?
            .filter(|new| new != id),
        replay_of: find(
            "SELECT id FROM dead_letters WHERE replayed_as IS NOT NULL AND replayed_as = ?1 \
             AND id <> ?1",
        )?,
    })
}

pub(super) fn state_of(late: bool, replayed: bool) -> LetterState {
    match (replayed, late) {
        (true, _) => LetterState::Replayed,
        (false, true) => LetterState::Late,
        (false, false) => LetterState::Dead,
    }
}

/// A row of [`COLUMNS`].
pub(super) fn summary(row: &Row<'_>, whole: bool) -> rusqlite::Result<DeadSummary> {
    let body: Option<Vec<u8>> = row.get(8)?;
    let message = if whole {
        Some(Box::new(parsed(row, 16, |envelope| whole_message(envelope, body.clone()))?))
    } else {
        None
    };
    let replayed_as = maybe_id(row, 14)?;
    let batch: Option<String> = row.get(11)?;
    Ok(DeadSummary {
        id: parsed(row, 0, TaskId::new)?,
        name: row.get(1)?,
        queue: row.get(2)?,
        reason: reason(row, 3)?,
        error: row.get(4)?,
        by: row.get(5)?,
        at: time(row, 6)?,
        body_bytes: to_count(row.get(7)?),
        args: body.filter(|_| !whole).and_then(|body| Payload::of_showable_json(&body)),
        batch: batch.and_then(|batch| BatchId::new(&batch).ok()),
        state: state_of(row.get(9)?, replayed_as.is_some()),
        started_at: maybe_time(row, 10)?,
        replay_of: maybe_id(row, 12)?,
        replays: row.get(13)?,
        replayed_as,
        replayed_at: maybe_time(row, 15)?,
        message,
    })
}

fn whole_message(
    envelope: &str,
    body: Option<Vec<u8>>,
) -> Result<LetterMessage, super::EnvelopeError> {
    let mut shown = LetterMessage::without_body(&open_envelope(envelope, bytes::Bytes::new())?);
    if let Some(body) = body {
        match String::from_utf8(body) {
            Ok(text) => shown.body_text = Some(text),
            Err(error) => shown.body_base64 = Some(BASE64.encode(error.as_bytes())),
        }
    }
    Ok(shown)
}

fn maybe_id(row: &Row<'_>, column: usize) -> rusqlite::Result<Option<TaskId>> {
    let text: Option<String> = row.get(column)?;
    text.map(|_| parsed(row, column, TaskId::new)).transpose()
}
