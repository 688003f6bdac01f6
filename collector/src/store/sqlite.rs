//! The [`Store`] in SQLite: one thread writes, another one reads.
//!
//! rusqlite blocks, so async tasks do not call it: jobs are sent to a thread that owns a connection. There is
//! a thread for reading, since in WAL mode a reader does not wait for a commit.
//!
//! A SQLite file belongs to one host: its locks and shared memory do not work over network file systems.
//! Several collectors on one host may share it.

use std::path::Path;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use garenne_common::topology::Topology;
use garenne_common::wire::{
    BatchStatus, CancelRequest, DeadPage, DeadSummary, Purged, ReplayItem, ReplayPlan, Replayed,
    RetryNote, Stalled, TaskState,
};
use garenne_common::{BatchId, QueueName, TaskId, TaskName, TaskResult, Timestamp};
use rusqlite::{Connection, Transaction, TransactionBehavior, params};
use tokio::sync::{mpsc, oneshot};

use super::files::StoreFiles;
use super::ledger::{SqliteLedger, batch, from_count, from_time, select_batches};
use super::{
    Backlog, CancelledBatch, CancelledTasks, DeadQuery, EndedParked, OutboxEntry, ReplayLinks,
    ResendEntry, Store, StoreError, StoreIdentity, Totals, cancels, leases, letters, pages, parked,
    queries, replay, schema,
};
use crate::ingest::group::Group;
use crate::rules::aggregate::{Committed, Ledger, Rules, apply};

/// Maximum number of jobs that wait for a thread.
const WAITING_JOBS: usize = 16;
/// Attempts to open the file: another collector may be starting with it.
const OPEN_ATTEMPTS: u32 = 5;
const OPEN_PAUSE: Duration = Duration::from_millis(200);

/// The embedded store. Clones share its threads, and dropping the last one joins them.
#[derive(Clone)]
pub struct SqliteStore(Arc<Inner>);

/// A handle that does not keep the store open.
#[derive(Clone)]
pub(crate) struct WeakStore(Weak<Inner>);

impl WeakStore {
    pub(crate) fn upgrade(&self) -> Option<SqliteStore> {
        self.0.upgrade().map(SqliteStore)
    }
}

struct Inner {
    writer: StoreThread,
    reader: StoreThread,
    rules: Rules,
    files: StoreFiles,
    identity: StoreIdentity,
    last_commit: Option<Timestamp>,
}

impl SqliteStore {
    /// Opens a file, creates it if it is missing, and migrates it to the current schema. Blocks.
    ///
    /// # Errors
    ///
    /// If the file is damaged, of a newer version, or not a store.
    pub fn open(path: &Path, rules: Rules) -> Result<Self, StoreError> {
        let mut attempt = 1;
        let writer = loop {
            match schema::open(path) {
                Err(StoreError::Busy(_)) if attempt < OPEN_ATTEMPTS => {
                    attempt += 1;
                    std::thread::sleep(OPEN_PAUSE);
                }
                opened => break opened?,
            }
        };
        let reader = schema::open_to_read(path)?;
        let files = StoreFiles::of(path)?;
        let identity = queries::identity(&reader)?;
        let last_commit = queries::last_commit(&reader)?;
        Ok(Self(Arc::new(Inner {
            writer: StoreThread::start("store writer", writer)?,
            reader: StoreThread::start("store reader", reader)?,
            rules,
            files,
            identity,
            last_commit,
        })))
    }

    /// A handle that does not keep the store open.
    pub(crate) fn downgrade(&self) -> WeakStore {
        WeakStore(Arc::downgrade(&self.0))
    }

    /// The identity of the store.
    pub fn identity(&self) -> StoreIdentity {
        self.0.identity.clone()
    }

    /// The last commit before it was opened.
    pub fn last_commit(&self) -> Option<Timestamp> {
        self.0.last_commit
    }

    async fn write<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut SqliteLedger<'_>) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let files = self.0.files.clone();
        let job = move |connection: &mut Connection| {
            files.check()?;
            let immediate = TransactionBehavior::Immediate;
            // Immediate: a transaction that reads first and then needs the write lock while another process
            // holds it would fail instead of waiting.
            let transaction = connection.transaction_with_behavior(immediate)?;
            let done = job(&mut SqliteLedger::new(&transaction, Timestamp::now()))?;
            transaction.commit()?;
            // Again after the commit: what was stored in a deleted file must not be acknowledged.
            files.check()?;
            Ok(done)
        };
        self.0.writer.run(job).await
    }

    async fn read<T: Send + 'static>(
        &self,
        job: impl FnOnce(&Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        self.0.reader.run(|connection| job(connection)).await
    }
}

impl Store for SqliteStore {
    async fn commit(&self, group: Arc<Group>) -> Result<Committed, StoreError> {
        let rules = self.0.rules;
        let job = move |ledger: &mut SqliteLedger<'_>| {
            let committed = apply(ledger, &group, rules)?;
            ledger.count("results", from_count(committed.fresh))?;
            ledger.count("repeats", from_count(committed.repeats))?;
            Ok(committed)
        };
        self.write(job).await
    }

    async fn outbox(&self, after: u64, limit: usize) -> Result<Vec<OutboxEntry>, StoreError> {
        self.read(move |connection| queries::outbox(connection, after, limit)).await
    }

    async fn published(&self, entries: Vec<u64>) -> Result<(), StoreError> {
        self.write(move |ledger| delete_entries(ledger, "outbox", entries)).await
    }

    async fn resends(
        &self,
        after: u64,
        limit: usize,
        max_bytes: usize,
    ) -> Result<Vec<ResendEntry>, StoreError> {
        self.read(move |connection| queries::resends(connection, after, limit, max_bytes)).await
    }

    async fn resent(&self, entries: Vec<u64>) -> Result<(), StoreError> {
        self.write(move |ledger| delete_entries(ledger, "resends", entries)).await
    }

    async fn cancel(&self, ids: Vec<TaskId>, reason: String) -> Result<CancelledTasks, StoreError> {
        self.write(move |ledger| cancels::cancel(ledger, ids, &reason)).await
    }

    async fn cancel_batch(
        &self,
        id: BatchId,
        reason: String,
    ) -> Result<CancelledBatch, StoreError> {
        self.write(move |ledger| cancels::cancel_batch(ledger, id, &reason)).await
    }

    async fn cancels(
        &self,
        after: u64,
        limit: usize,
    ) -> Result<(Vec<CancelRequest>, u64), StoreError> {
        self.read(move |connection| cancels::page(connection, after, limit)).await
    }

    async fn parked_kinds(&self, limit: usize) -> Result<Vec<(QueueName, TaskName)>, StoreError> {
        self.read(move |connection| parked::kinds(connection, limit)).await
    }

    async fn release(
        &self,
        (queue, name): (QueueName, TaskName),
        exchange: String,
        limit: usize,
    ) -> Result<usize, StoreError> {
        self.write(move |ledger| parked::release(ledger, (&queue, &name), &exchange, limit)).await
    }

    async fn end_cancelled_parked(&self, limit: usize) -> Result<EndedParked, StoreError> {
        let found = self.read(move |connection| parked::cancelled(connection, limit)).await?;
        if found.is_empty() {
            return Ok(EndedParked::default());
        }
        let rules = self.0.rules;
        self.write(move |ledger| parked::end_cancelled(ledger, found, rules)).await
    }

    async fn has_overdue_batches(&self, now: Timestamp) -> Result<bool, StoreError> {
        self.read(move |connection| queries::has_overdue_batches(connection, now)).await
    }

    async fn abandon_overdue(&self, now: Timestamp, limit: usize) -> Result<usize, StoreError> {
        self.write(move |ledger| abandon_overdue(ledger, now, limit)).await
    }

    async fn abandon_batch(&self, id: BatchId) -> Result<bool, StoreError> {
        self.write(move |ledger| abandon_batch(ledger, &id)).await
    }

    async fn has_leases(&self) -> Result<bool, StoreError> {
        self.read(leases::any_held).await
    }

    async fn lapse_leases(
        &self,
        topology: Topology,
        listening_since: Timestamp,
        limit: usize,
    ) -> Result<usize, StoreError> {
        self.write(move |ledger| leases::lapse(ledger, &topology, listening_since, limit)).await
    }

    async fn delete_old(&self, before: Timestamp, limit: usize) -> Result<usize, StoreError> {
        self.write(move |ledger| delete_old(ledger, before, limit)).await
    }

    async fn task(&self, id: TaskId) -> Result<TaskState, StoreError> {
        self.read(move |connection| queries::task(connection, &id)).await
    }

    async fn results(
        &self,
        ids: Vec<TaskId>,
        max_bytes: usize,
    ) -> Result<Vec<TaskResult>, StoreError> {
        self.read(move |connection| queries::results(connection, &ids, max_bytes)).await
    }

    async fn batch(&self, id: BatchId) -> Result<Option<BatchStatus>, StoreError> {
        self.read(move |connection| queries::batch_status(connection, &id)).await
    }

    async fn dead_page(&self, query: DeadQuery) -> Result<DeadPage, StoreError> {
        self.read(move |connection| pages::page(connection, &query)).await
    }

    async fn dead(&self, id: TaskId) -> Result<Option<DeadSummary>, StoreError> {
        self.read(move |connection| letters::one(connection, &id)).await
    }

    async fn attempts(&self, id: TaskId) -> Result<Vec<RetryNote>, StoreError> {
        self.read(move |connection| queries::attempts(connection, &id)).await
    }

    async fn dead_body(&self, id: TaskId, from: u64) -> Result<String, StoreError> {
        self.read(move |connection| letters::body(connection, &id, from)).await
    }

    async fn replay_links(&self, id: TaskId) -> Result<ReplayLinks, StoreError> {
        self.read(move |connection| letters::links(connection, &id)).await
    }

    async fn replay(
        &self,
        items: Vec<ReplayItem>,
        plan: ReplayPlan,
        exchange: String,
    ) -> Result<Vec<Replayed>, StoreError> {
        if plan.dry_run {
            return self.read(move |connection| replay::rehearse(connection, &items, &plan)).await;
        }
        self.write(move |ledger| replay::replay_letters(ledger, &items, &plan, &exchange)).await
    }

    async fn purge(&self, ids: Vec<TaskId>) -> Result<(Purged, EndedParked), StoreError> {
        let rules = self.0.rules;
        self.write(move |ledger| replay::purge(ledger, &ids, rules)).await
    }

    async fn backlog(&self) -> Result<Backlog, StoreError> {
        let files = self.0.files.clone();
        let look = move |connection: &Connection| {
            files.check()?;
            queries::backlog(connection)
        };
        self.read(look).await
    }

    async fn stalled(&self, quiet_since: Timestamp) -> Result<Stalled, StoreError> {
        self.read(move |connection| {
            Ok(Stalled {
                parked: parked::waiting(connection)?,
                batches: queries::quiet_batches(connection, quiet_since)?,
            })
        })
        .await
    }

    async fn totals(&self) -> Result<Totals, StoreError> {
        self.read(queries::totals).await
    }
}

/// Deletes entries of an outbox.
fn delete_entries(
    ledger: &mut SqliteLedger<'_>,
    outbox: &str,
    entries: Vec<u64>,
) -> Result<(), StoreError> {
    let delete = format!("DELETE FROM {outbox} WHERE seq = ?1");
    let mut delete = ledger.transaction.prepare_cached(&delete)?;
    for seq in entries {
        delete.execute([from_count(seq)])?;
    }
    Ok(())
}

fn abandon_overdue(
    ledger: &mut SqliteLedger<'_>,
    now: Timestamp,
    limit: usize,
) -> Result<usize, StoreError> {
    let overdue: Vec<_> = {
        let mut select = ledger.transaction.prepare_cached(&select_batches(
            "state = 'open' AND deadline <= ?1 ORDER BY deadline LIMIT ?2",
        ))?;
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        select.query_map(params![from_time(now), limit], batch)?.collect::<Result<_, _>>()?
    };
    let mut abandoned = 0;
    for mut batch in overdue {
        if let Some(notice) = batch.abandon(now) {
            ledger.save_batch(&batch)?;
            ledger.add_notice(&notice)?;
            abandoned += 1;
        }
    }
    Ok(abandoned)
}

fn abandon_batch(ledger: &mut SqliteLedger<'_>, id: &BatchId) -> Result<bool, StoreError> {
    let now = ledger.now;
    let Some(mut batch) = ledger.load_batch(id)? else { return Ok(false) };
    let Some(notice) = batch.abandon_on_request(now) else { return Ok(false) };
    ledger.save_batch(&batch)?;
    ledger.add_notice(&notice)?;
    Ok(true)
}

/// Reads only the oldest `limit` rows of each table, so that its cost does not depend on their size. Open and
/// sealed batches and the outboxes are not deleted.
fn delete_old(
    ledger: &mut SqliteLedger<'_>,
    before: Timestamp,
    limit: usize,
) -> Result<usize, StoreError> {
    let (since, before, limit) =
        (before, from_time(before), i64::try_from(limit).unwrap_or(i64::MAX));
    let oldest = |table: &str| {
        format!(
            "DELETE FROM {table} WHERE stored_at < ?1 AND rowid <= (SELECT MAX(rowid) FROM \
             (SELECT rowid FROM {table} ORDER BY rowid LIMIT ?2))"
        )
    };
    let delete = |transaction: &Transaction<'_>, sql: &str| {
        transaction.prepare_cached(sql)?.execute(params![before, limit])
    };
    let transaction = ledger.transaction;
    let results = delete(transaction, &oldest("results"))?;
    let attempts = delete(transaction, &oldest("attempts"))?;
    // Parked tasks have not ended and are kept.
    let letters = delete(
        transaction,
        "DELETE FROM dead_letters WHERE rowid IN (SELECT rowid FROM \
         (SELECT rowid, stored_at FROM dead_letters WHERE late = 1 OR reason <> 'unknown_task' \
         OR replayed_as IS NOT NULL \
         ORDER BY rowid LIMIT ?2) WHERE stored_at < ?1)",
    )?;
    let released = delete(
        transaction,
        "DELETE FROM parked WHERE rowid IN (SELECT rowid FROM (SELECT rowid, stored_at FROM parked \
         WHERE waiting = 0 ORDER BY rowid LIMIT ?2) WHERE stored_at < ?1)",
    )?;
    let batches = delete(
        transaction,
        "DELETE FROM batches WHERE rowid IN (SELECT rowid FROM batches \
         WHERE state IN ('done', 'abandoned') AND stored_at < ?1 ORDER BY stored_at LIMIT ?2)",
    )?;
    // Leases of tasks that never ended, or whose end was reported in another way.
    let leases = delete(
        transaction,
        "DELETE FROM leases WHERE id IN (SELECT id FROM leases \
         WHERE state <> 'held' AND stored_at < ?1 ORDER BY stored_at LIMIT ?2)",
    )?;
    ledger.count("results", -i64::try_from(results).unwrap_or(0))?;
    let requests = cancels::delete_old(ledger, since, limit)?;
    Ok(results + attempts + letters + released + batches + leases + requests)
}

type Job = Box<dyn FnOnce(&mut Connection) + Send>;

/// A thread that owns a connection and runs one job after another.
struct StoreThread {
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl StoreThread {
    fn start(name: &str, mut connection: Connection) -> Result<Self, StoreError> {
        let (jobs, mut inbox) = mpsc::channel::<Job>(WAITING_JOBS);
        let work = move || {
            while let Some(job) = inbox.blocking_recv() {
                job(&mut connection);
            }
        };
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(work);
        let thread = thread.map_err(|error| StoreError::Other(error.to_string()))?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread) })
    }

    async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Connection) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (respond, response) = oneshot::channel();
        let job: Job = Box::new(move |connection| {
            if respond.send(job(connection)).is_err() {
                tracing::trace!("result of a store job dropped");
            }
        });
        let jobs = self.jobs.as_ref().ok_or(StoreError::Closed)?;
        jobs.send(job).await.map_err(|_| StoreError::Closed)?;
        response.await.map_err(|_| StoreError::Closed)?
    }
}

impl Drop for StoreThread {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a thread of the store panicked");
        }
    }
}

#[cfg(test)]
mod tests;
