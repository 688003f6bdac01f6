//! A SQLite transaction as the ledger of [`crate::rules::aggregate`].
//!
//! Writes row by row with cached statements, the fastest way that reports for each row whether it is new
//! (docs/decisions/0003). Checks that most results do not need are skipped (docs/decisions/0018).

use garenne_common::outcome::Status;
use garenne_common::wire::{BatchState, Codec, DeadLetter, Lease, Notice, RetryNote, replay};
use garenne_common::{BatchId, DeadReason, TaskId, TaskResult, Timestamp};
use rusqlite::types::Type;
use rusqlite::{CachedStatement, OptionalExtension, Row, Transaction, params};

use super::{StoreError, cancels, leases, parked, seal_envelope};
use crate::rules::aggregate::{Inserted, Ledger, Resend};
use crate::rules::batch::Batch;
use crate::rules::lease::{LeaseRecord, LeaseState};

/// One transaction, at one moment.
pub(super) struct SqliteLedger<'a> {
    pub(super) transaction: &'a Transaction<'a>,
    pub(super) now: Timestamp,
    /// Whether any cancel request or parked task exists. Usually none does, and then no result needs a
    /// lookup. `None` before the first check.
    pub(super) has_cancel_requests: Option<bool>,
    /// The same for dead letters.
    has_letters: Option<bool>,
    /// The statement that inserts results; kept, since even the lookup in the cache costs time.
    insert_result: Option<CachedStatement<'a>>,
}

const INSERT_RESULT: &str = "INSERT INTO results (id, name, queue, batch, status, bincode, output, \
     error, reason, attempt, redelivered, worker, started_at, finished_at, stored_at, fingerprint) \
     VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16) \
     ON CONFLICT (id) DO NOTHING";

impl Ledger for SqliteLedger<'_> {
    type Error = StoreError;

    fn insert_result(&mut self, result: &TaskResult) -> Result<Inserted, StoreError> {
        #[cfg(feature = "failpoints")]
        let replaced = sabotage::replaces_result(self, &result.id)?;
        let insert = match &mut self.insert_result {
            Some(known) => known,
            none => none.insert(self.transaction.prepare_cached(INSERT_RESULT)?),
        };
        let output = result.output.as_ref();
        let inserted = insert.execute(params![
            result.id.as_str(),
            result.name.as_str(),
            result.queue.as_str(),
            result.batch.as_ref().map(BatchId::as_str),
            result.status.as_str(),
            output.is_some_and(|output| output.codec == Codec::Bincode),
            output.map(|output| &output.bytes[..]),
            result.error,
            result.reason.map(DeadReason::as_str),
            result.attempt,
            result.redelivered,
            &*result.worker,
            from_time(result.started_at),
            from_time(result.finished_at),
            from_time(self.now),
            result.fingerprint.map(|fingerprint| fingerprint.as_u64().cast_signed()),
        ])?;
        #[cfg(feature = "failpoints")]
        if replaced {
            return Ok(Inserted::Repeat(result.status));
        }
        if inserted == 1 {
            return Ok(Inserted::Fresh);
        }
        let mut repeat = self.transaction.prepare_cached(
            "UPDATE results SET repeats = repeats + 1 WHERE id = ?1 RETURNING status",
        )?;
        Ok(Inserted::Repeat(repeat.query_row([result.id.as_str()], |row| status(row, 0))?))
    }

    fn final_status(&mut self, id: &TaskId) -> Result<Option<Status>, StoreError> {
        let mut select =
            self.transaction.prepare_cached("SELECT status FROM results WHERE id = ?1")?;
        Ok(select.query_row([id.as_str()], |row| status(row, 0)).optional()?)
    }

    fn insert_attempt(&mut self, note: &RetryNote) -> Result<(), StoreError> {
        let mut insert = self.transaction.prepare_cached(
            "INSERT INTO attempts (task, attempt, name, batch, error, next_at, worker, at, stored_at) \
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9) ON CONFLICT (task, attempt) DO NOTHING",
        )?;
        insert.execute(params![
            note.id.as_str(),
            note.attempt,
            note.name.as_str(),
            note.batch.as_ref().map(BatchId::as_str),
            note.error,
            from_time(note.next_at),
            note.worker,
            from_time(note.at),
            from_time(self.now),
        ])?;
        Ok(())
    }

    /// `OR REPLACE`, not an update: the new row gets the newest rowid, by which retention goes.
    fn keep_letter(&mut self, letter: &DeadLetter, late: bool) -> Result<(), StoreError> {
        self.has_letters = Some(true);
        // A parked task may die for good later, or be parked again after a replay. But the same letter
        // once more must not park again what was sent to the workers meanwhile.
        let known = self.letter(&letter.id)?;
        let is_known = |(reason, at): (DeadReason, _)| {
            reason.is_final() || (reason, at) == (letter.reason, letter.at)
        };
        if known.is_some_and(is_known) {
            return Ok(());
        }
        let envelope = seal_envelope(&letter.message);
        let envelope = envelope.map_err(|error| StoreError::Other(error.to_string()))?;
        let mut insert = self.transaction.prepare_cached(
            "INSERT OR REPLACE INTO dead_letters (id, kind, queue, reason, error, given_up_by, \
             started_at, at, redelivered, late, envelope, body, stored_at, batch, replay_of, replays) \
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16)",
        )?;
        insert.execute(params![
            letter.id.as_str(),
            letter.message.properties.kind,
            letter.queue,
            letter.reason.as_str(),
            letter.error,
            letter.by,
            letter.started_at.map(from_time),
            from_time(letter.at),
            letter.redelivered,
            late,
            envelope,
            &letter.message.body[..],
            from_time(self.now),
            letter.batch().as_ref().map(BatchId::as_str),
            replay::replay_of(&letter.message).as_ref().map(TaskId::as_str),
            replay::replays(&letter.message),
        ])?;
        Ok(())
    }

    fn hide_letter(&mut self, id: &TaskId) -> Result<(), StoreError> {
        // Looked for first: an update opens every index of the table before it finds nothing to do.
        if self.has_letters()? && self.letter(id)?.is_some() {
            let mut update = self
                .transaction
                .prepare_cached("UPDATE dead_letters SET late = 1 WHERE id = ?1 AND late = 0")?;
            update.execute([id.as_str()])?;
        }
        Ok(())
    }

    fn load_batch(&mut self, id: &BatchId) -> Result<Option<Batch>, StoreError> {
        let mut select = self.transaction.prepare_cached(&select_batches("id = ?1"))?;
        Ok(select.query_row([id.as_str()], batch).optional()?)
    }

    fn save_batch(&mut self, batch: &Batch) -> Result<(), StoreError> {
        let mut save = self.transaction.prepare_cached(
            "INSERT INTO batches (id, state, total, succeeded, failed, cancelled, opened_at, deadline, \
             announced, sealed_at, last_ended_at, finished_at, stored_at) \
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13) \
             ON CONFLICT (id) DO UPDATE SET state = ?2, total = ?3, succeeded = ?4, failed = ?5, \
             cancelled = ?6, opened_at = ?7, deadline = ?8, announced = ?9, sealed_at = ?10, \
             last_ended_at = ?11, finished_at = ?12, stored_at = ?13",
        )?;
        save.execute(params![
            batch.id.as_str(),
            batch.state.as_str(),
            batch.total.map(from_count),
            from_count(batch.succeeded),
            from_count(batch.failed),
            from_count(batch.cancelled),
            from_time(batch.opened_at),
            from_time(batch.deadline),
            batch.announced,
            batch.sealed_at.map(from_time),
            batch.last_ended_at.map(from_time),
            batch.finished_at.map(from_time),
            from_time(self.now),
        ])?;
        Ok(())
    }

    fn add_notice(&mut self, notice: &Notice) -> Result<(), StoreError> {
        #[cfg(feature = "failpoints")]
        sabotage::commit_before_notice(self)?;
        let json = serde_json::to_string(notice);
        let json = json.map_err(|error| StoreError::Other(error.to_string()))?;
        let mut insert =
            self.transaction.prepare_cached("INSERT INTO outbox (notice) VALUES (?1)")?;
        insert.execute([json])?;
        Ok(())
    }

    fn park(&mut self, letter: &DeadLetter) -> Result<(), StoreError> {
        parked::park(self, letter)
    }

    fn task_ended(&mut self, id: &TaskId) -> Result<(), StoreError> {
        if self.has_cancel_requests()? {
            cancels::delete(self, false, id.as_str())?;
            parked::delete(self, id.as_str())?;
        }
        Ok(())
    }

    fn batch_ended(&mut self, id: &BatchId) -> Result<(), StoreError> {
        if self.has_cancel_requests()? { cancels::delete(self, true, id.as_str()) } else { Ok(()) }
    }

    fn add_resend(&mut self, resend: &Resend) -> Result<(), StoreError> {
        let envelope = seal_envelope(&resend.message);
        let envelope = envelope.map_err(|error| StoreError::Other(error.to_string()))?;
        let mut insert = self.transaction.prepare_cached(
            "INSERT INTO resends (exchange, routing_key, envelope, body) VALUES (?1, ?2, ?3, ?4)",
        )?;
        let body = &resend.message.body[..];
        insert.execute(params![resend.exchange, resend.routing_key, envelope, body])?;
        Ok(())
    }

    fn lease(&mut self, id: &TaskId) -> Result<Option<LeaseRecord>, StoreError> {
        leases::record(self, id)
    }

    fn begin_lease(&mut self, lease: &Lease) -> Result<(), StoreError> {
        leases::begin(self, lease)
    }

    fn mark_lease(&mut self, id: &TaskId, state: LeaseState) -> Result<(), StoreError> {
        leases::mark(self, id, state)
    }

    fn drop_lease(&mut self, id: &TaskId) -> Result<(), StoreError> {
        leases::remove(self, id)
    }
}

impl<'a> SqliteLedger<'a> {
    pub(super) fn new(transaction: &'a Transaction<'a>, now: Timestamp) -> Self {
        Self { transaction, now, has_cancel_requests: None, has_letters: None, insert_result: None }
    }

    fn has_letters(&mut self) -> Result<bool, StoreError> {
        if let Some(known) = self.has_letters {
            return Ok(known);
        }
        let mut select =
            self.transaction.prepare_cached("SELECT EXISTS (SELECT 1 FROM dead_letters)")?;
        let any = select.query_row([], |row| row.get(0))?;
        self.has_letters = Some(any);
        Ok(any)
    }

    fn has_cancel_requests(&mut self) -> Result<bool, StoreError> {
        if let Some(known) = self.has_cancel_requests {
            return Ok(known);
        }
        let mut select = self.transaction.prepare_cached(
            "SELECT EXISTS (SELECT 1 FROM cancels) OR EXISTS (SELECT 1 FROM parked)",
        )?;
        let any = select.query_row([], |row| row.get(0))?;
        self.has_cancel_requests = Some(any);
        Ok(any)
    }

    fn letter(&self, id: &TaskId) -> Result<Option<(DeadReason, Timestamp)>, StoreError> {
        let mut select =
            self.transaction.prepare_cached("SELECT reason, at FROM dead_letters WHERE id = ?1")?;
        let letter = select.query_row([id.as_str()], |row| Ok((reason(row, 0)?, time(row, 1)?)));
        Ok(letter.optional()?)
    }

    /// Adds to one of the counters.
    pub(super) fn count(&self, name: &str, by: i64) -> Result<(), StoreError> {
        if by != 0 {
            let mut update = self
                .transaction
                .prepare_cached("UPDATE counters SET value = value + ?2 WHERE name = ?1")?;
            update.execute(params![name, by])?;
        }
        Ok(())
    }
}

/// The statement that finds batches; [`batch`] reads its rows.
pub(super) fn select_batches(condition: &str) -> String {
    format!(
        "SELECT id, state, total, succeeded, failed, cancelled, opened_at, deadline, announced, \
         sealed_at, last_ended_at, finished_at FROM batches WHERE {condition}"
    )
}

/// A row of [`select_batches`].
pub(super) fn batch(row: &Row<'_>) -> rusqlite::Result<Batch> {
    Ok(Batch {
        id: parsed(row, 0, BatchId::new)?,
        state: state(row, 1)?,
        total: row.get::<_, Option<i64>>(2)?.map(to_count),
        succeeded: to_count(row.get(3)?),
        failed: to_count(row.get(4)?),
        cancelled: to_count(row.get(5)?),
        opened_at: time(row, 6)?,
        deadline: time(row, 7)?,
        announced: row.get(8)?,
        sealed_at: maybe_time(row, 9)?,
        last_ended_at: maybe_time(row, 10)?,
        finished_at: maybe_time(row, 11)?,
    })
}

/// Text that had to be valid to be written.
pub(super) fn parsed<T, E: std::error::Error + Send + Sync + 'static>(
    row: &Row<'_>,
    column: usize,
    parse: impl Fn(&str) -> Result<T, E>,
) -> rusqlite::Result<T> {
    let text = row.get_ref(column)?.as_str()?;
    parse(text).map_err(|error| {
        rusqlite::Error::FromSqlConversionFailure(column, Type::Text, Box::new(error))
    })
}

/// One of a fixed list of words.
pub(super) fn word<T>(
    row: &Row<'_>,
    column: usize,
    find: impl Fn(&str) -> Option<T>,
) -> rusqlite::Result<T> {
    parsed(row, column, |text| find(text).ok_or_else(|| UnknownWord(text.to_owned())))
}

#[derive(Debug, thiserror::Error)]
#[error("unknown word {0:?}")]
struct UnknownWord(String);

pub(super) fn status(row: &Row<'_>, column: usize) -> rusqlite::Result<Status> {
    word(row, column, |text| Status::ALL.into_iter().find(|status| status.as_str() == text))
}

pub(super) fn reason(row: &Row<'_>, column: usize) -> rusqlite::Result<DeadReason> {
    word(row, column, DeadReason::from_code)
}

fn state(row: &Row<'_>, column: usize) -> rusqlite::Result<BatchState> {
    word(row, column, |text| BatchState::ALL.into_iter().find(|state| state.as_str() == text))
}

/// SQLite's integers are signed; a moment beyond the year 292,000,000 is cut to the last one.
pub(super) fn from_time(at: Timestamp) -> i64 {
    from_count(at.as_millis())
}

pub(super) fn time(row: &Row<'_>, column: usize) -> rusqlite::Result<Timestamp> {
    Ok(Timestamp::from_millis(to_count(row.get(column)?)))
}

pub(super) fn maybe_time(row: &Row<'_>, column: usize) -> rusqlite::Result<Option<Timestamp>> {
    Ok(row.get::<_, Option<i64>>(column)?.map(|millis| Timestamp::from_millis(to_count(millis))))
}

pub(super) fn from_count(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

pub(super) fn to_count(number: i64) -> u64 {
    u64::try_from(number).unwrap_or_default()
}

/// The mistakes that protections prevent.
#[cfg(feature = "failpoints")]
mod sabotage {
    use super::{SqliteLedger, StoreError, TaskId};
    use garenne_common::failpoints::Protection;

    /// Deletes an earlier result, which the next one then replaces.
    pub(super) fn replaces_result(
        ledger: &SqliteLedger<'_>,
        id: &TaskId,
    ) -> Result<bool, StoreError> {
        if Protection::FirstResultWins.is_enabled() {
            return Ok(false);
        }
        let delete = "DELETE FROM results WHERE id = ?1";
        Ok(ledger.transaction.execute(delete, [id.as_str()])? == 1)
    }

    /// Commits before a notice is added, which is then stored by another transaction.
    pub(super) fn commit_before_notice(ledger: &SqliteLedger<'_>) -> Result<(), StoreError> {
        if !Protection::OutboxInTransaction.is_enabled() {
            ledger.transaction.execute_batch("COMMIT; BEGIN IMMEDIATE")?;
        }
        Ok(())
    }
}
