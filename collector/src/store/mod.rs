//! The store: groups are committed to it, and queries read from it.
//!
//! A trait, since PostgreSQL will be a second implementation. The store does not interpret groups: it lends
//! its transaction to [`crate::rules::aggregate`] as a ledger.

mod cancels;
mod envelope;
mod error;
mod files;
mod leases;
mod ledger;
mod letters;
mod pages;
mod parked;
mod queries;
mod replay;
mod schema;
mod sqlite;

use std::sync::Arc;

use garenne_common::topology::Topology;
use garenne_common::wire::{
    BatchStatus, BatchSummary, CancelRequest, CancelState, Cancelled, DeadCursor, DeadFilter,
    DeadPage, DeadSummary, Notice, Purged, ReplayItem, ReplayPlan, Replayed, RetryNote, Stalled,
    TaskState,
};
use garenne_common::{BatchId, QueueName, TaskId, TaskName, TaskResult, Timestamp};

pub use envelope::{EnvelopeError, open_envelope, seal_envelope};
pub use error::StoreError;
pub use sqlite::SqliteStore;
pub(crate) use sqlite::WeakStore;

use crate::ingest::group::{Group, Letter};
use crate::rules::aggregate::{Committed, Resend};

/// Durable storage of the collector.
///
/// Each writing method is one transaction, which is on disk when it returns `Ok`. After an error nothing has
/// changed, and the call may be repeated.
pub trait Store: Clone + Send + Sync + 'static {
    /// Applies a group: results, batches, attempts, dead letters and notices together.
    fn commit(&self, group: Arc<Group>) -> impl StoreFuture<Committed>;

    /// The oldest unconfirmed notices after this one.
    fn outbox(&self, after: u64, limit: usize) -> impl StoreFuture<Vec<OutboxEntry>>;

    /// Deletes confirmed notices.
    fn published(&self, entries: Vec<u64>) -> impl StoreFuture<()>;

    /// The oldest unconfirmed tasks to publish again after this one, up to `max_bytes` of bodies.
    fn resends(
        &self,
        after: u64,
        limit: usize,
        max_bytes: usize,
    ) -> impl StoreFuture<Vec<ResendEntry>>;

    /// Deletes confirmed tasks from that outbox.
    fn resent(&self, entries: Vec<u64>) -> impl StoreFuture<()>;

    /// Stores a cancel request for each of these tasks that has not ended.
    fn cancel(&self, ids: Vec<TaskId>, reason: String) -> impl StoreFuture<CancelledTasks>;

    /// Stores a cancel request for a batch that is not done.
    fn cancel_batch(&self, id: BatchId, reason: String) -> impl StoreFuture<CancelledBatch>;

    /// The cancel requests with higher numbers than `after`, and the highest number so far.
    fn cancels(&self, after: u64, limit: usize) -> impl StoreFuture<(Vec<CancelRequest>, u64)>;

    /// The pairs of queue and task name of parked tasks.
    fn parked_kinds(&self, limit: usize) -> impl StoreFuture<Vec<(QueueName, TaskName)>>;

    /// Moves due parked tasks of this queue and name into the outbox of tasks to publish again. Returns their
    /// number.
    fn release(
        &self,
        kind: (QueueName, TaskName),
        exchange: String,
        limit: usize,
    ) -> impl StoreFuture<usize>;

    /// Ends cancelled parked tasks, at most `limit`.
    fn end_cancelled_parked(&self, limit: usize) -> impl StoreFuture<EndedParked>;

    /// Whether a batch is past its deadline and not sealed.
    fn has_overdue_batches(&self, now: Timestamp) -> impl StoreFuture<bool>;

    /// Abandons batches that are past their deadline and not sealed, at most `limit`. Returns their number.
    fn abandon_overdue(&self, now: Timestamp, limit: usize) -> impl StoreFuture<usize>;

    /// Abandons a batch independent of its deadline. Returns whether it had not ended.
    fn abandon_batch(&self, id: BatchId) -> impl StoreFuture<bool>;

    /// Whether any task runs under a lease.
    fn has_leases(&self) -> impl StoreFuture<bool>;

    /// Publishes tasks again whose lease was not renewed for its term, at most `limit`. Returns their number.
    /// No term starts before `listening_since`.
    fn lapse_leases(
        &self,
        topology: Topology,
        listening_since: Timestamp,
        limit: usize,
    ) -> impl StoreFuture<usize>;

    /// Deletes at most `limit` records of each kind that were stored before `before`. Returns their number.
    fn delete_old(&self, before: Timestamp, limit: usize) -> impl StoreFuture<usize>;

    /// The state of a task.
    fn task(&self, id: TaskId) -> impl StoreFuture<TaskState>;

    /// The final records of the tasks that have one, in the given order, up to `max_bytes`.
    fn results(&self, ids: Vec<TaskId>, max_bytes: usize) -> impl StoreFuture<Vec<TaskResult>>;

    /// The status of a batch.
    fn batch(&self, id: BatchId) -> impl StoreFuture<Option<BatchStatus>>;

    /// Dead letters, the newest first.
    fn dead_page(&self, query: DeadQuery) -> impl StoreFuture<DeadPage>;

    /// A dead letter in any state, with its message.
    fn dead(&self, id: TaskId) -> impl StoreFuture<Option<DeadSummary>>;

    /// The last fifty failed attempts of a task that were followed by another one.
    fn attempts(&self, id: TaskId) -> impl StoreFuture<Vec<RetryNote>>;

    /// A part of the body of a dead letter in base64; empty at its end.
    fn dead_body(&self, id: TaskId, from: u64) -> impl StoreFuture<String>;

    /// The replay of a task, and the task that it is a replay of.
    fn replay_links(&self, id: TaskId) -> impl StoreFuture<ReplayLinks>;

    /// Marks dead letters as replayed, and adds their tasks to those that are published again through
    /// `exchange`. If they are large, the last items are left for another call.
    fn replay(
        &self,
        items: Vec<ReplayItem>,
        plan: ReplayPlan,
        exchange: String,
    ) -> impl StoreFuture<Vec<Replayed>>;

    /// Deletes dead letters. Final records stay. Parked tasks end, and are returned.
    fn purge(&self, ids: Vec<TaskId>) -> impl StoreFuture<(Purged, EndedParked)>;

    /// The entries in the outboxes. Fails if the open files are no longer those at the path of the store.
    fn backlog(&self) -> impl StoreFuture<Backlog>;

    /// Parked tasks, and batches that have not changed since `quiet_since`.
    fn stalled(&self, quiet_since: Timestamp) -> impl StoreFuture<Stalled>;

    /// Counts of the records.
    fn totals(&self) -> impl StoreFuture<Totals>;
}

/// A future result of the store.
pub trait StoreFuture<T>: Future<Output = Result<T, StoreError>> + Send {}
impl<T, F: Future<Output = Result<T, StoreError>> + Send> StoreFuture<T> for F {}

/// Result of storing cancel requests for tasks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CancelledTasks {
    /// One for each task, in the given order.
    pub tasks: Vec<Cancelled>,
    /// The stored requests, including earlier ones.
    pub requests: Vec<CancelRequest>,
}

/// Result of storing a cancel request for a batch.
#[derive(Debug, Clone, PartialEq)]
pub struct CancelledBatch {
    /// Whether the request is stored.
    pub state: CancelState,
    /// The batch at that time, if it is known.
    pub summary: Option<BatchSummary>,
    /// The request, if it is stored.
    pub request: Option<CancelRequest>,
}

/// Parked tasks that have ended.
#[derive(Debug, Clone, Default)]
pub struct EndedParked {
    /// Their letters and final records.
    pub letters: Vec<Letter>,
    /// Number of notices added to the outbox.
    pub notices: u64,
}

/// A notice to publish.
#[derive(Debug, Clone, PartialEq)]
pub struct OutboxEntry {
    /// Its sequence number.
    pub seq: u64,
    /// The notice.
    pub notice: Notice,
}

/// A task to publish again.
#[derive(Debug, Clone, PartialEq)]
pub struct ResendEntry {
    /// Its sequence number.
    pub seq: u64,
    /// The task and its route.
    pub resend: Resend,
}

/// A query for dead letters.
#[derive(Debug, Clone, PartialEq)]
pub struct DeadQuery {
    /// Which dead letters.
    pub filter: DeadFilter,
    /// Where the last page ended.
    pub from: Option<DeadCursor>,
    /// Maximum number of letters.
    pub limit: usize,
    /// Whether to count all matches.
    pub count: bool,
    /// Whether to include whole messages.
    pub whole: bool,
}

/// The replays of a task.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReplayLinks {
    /// The task that its dead letter was replayed as.
    pub replayed_as: Option<TaskId>,
    /// The task whose dead letter it is a replay of.
    pub replay_of: Option<TaskId>,
}

/// Identifies a store; ordered by age.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct StoreIdentity {
    /// When it was created.
    pub created: Timestamp,
    /// Its UUID.
    pub id: String,
}

/// The entries of the outboxes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Backlog {
    /// Notices.
    pub notices: Option<Waiting>,
    /// Tasks to publish again.
    pub resends: Option<Waiting>,
}

/// The entries of an outbox that is not empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waiting {
    /// The sequence number of the oldest one.
    pub oldest: u64,
    /// An upper bound of their number.
    pub count: u64,
}

/// Counts of the records in a store.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Final records.
    pub results: u64,
    /// Repeated final records.
    pub repeats: u64,
    /// Dead letters, without late ones.
    pub dead: u64,
    /// Batches.
    pub batches: u64,
}
