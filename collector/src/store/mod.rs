//! The store: groups in, outcomes out, and what questions ask for.
//!
//! A small trait, because PostgreSQL will be a second implementation. What a group means is not the
//! store's business: it lends its transaction to [`crate::aggregate`] as a ledger.

mod cancels;
mod envelope;
mod error;
mod leases;
mod ledger;
mod letters;
mod pages;
mod parked;
mod place;
mod questions;
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

use crate::aggregate::{Committed, Resend};
use crate::group::{Group, Letter};

/// Where everything that must survive is kept.
///
/// Each writing method is one transaction that is on the disk when it returns `Ok`; after an error
/// nothing of it happened, and the same call may be made again.
pub trait Store: Clone + Send + Sync + 'static {
    /// Applies a group: results, batches, attempts, dead letters and notices together.
    fn commit(&self, group: Arc<Group>) -> impl StoreFuture<Committed>;

    /// The oldest notices after this one that nobody has confirmed yet.
    fn outbox(&self, after: u64, limit: usize) -> impl StoreFuture<Vec<OutboxEntry>>;

    /// Forgets notices that are confirmed.
    fn published(&self, entries: Vec<u64>) -> impl StoreFuture<()>;

    /// The oldest tasks after this one that go back to the broker and are not confirmed yet, as far
    /// as `max_bytes` of bodies go.
    fn resends(
        &self,
        after: u64,
        limit: usize,
        max_bytes: usize,
    ) -> impl StoreFuture<Vec<ResendEntry>>;

    /// Forgets tasks whose way back is confirmed.
    fn resent(&self, entries: Vec<u64>) -> impl StoreFuture<()>;

    /// Keeps a wish to cancel for each of these tasks that has not ended.
    fn cancel(&self, ids: Vec<TaskId>, reason: String) -> impl StoreFuture<CancelledTasks>;

    /// Keeps a wish to cancel a batch that is not done.
    fn cancel_batch(&self, id: BatchId, reason: String) -> impl StoreFuture<CancelledBatch>;

    /// The wishes with higher numbers than `after`, and the highest number given so far.
    fn cancels(&self, after: u64, limit: usize) -> impl StoreFuture<(Vec<CancelRequest>, u64)>;

    /// What parked tasks wait for, each pair of queue and name once.
    fn parked_kinds(&self, limit: usize) -> impl StoreFuture<Vec<(QueueName, TaskName)>>;

    /// Moves parked tasks of a kind that are due into the second outbox; how many there were.
    fn release(
        &self,
        kind: (QueueName, TaskName),
        exchange: String,
        limit: usize,
    ) -> impl StoreFuture<usize>;

    /// Ends parked tasks that are to be cancelled, at most `limit`.
    fn end_cancelled_parked(&self, limit: usize) -> impl StoreFuture<EndedParked>;

    /// Whether a batch waits for its seal beyond its deadline.
    fn has_overdue_batches(&self, now: Timestamp) -> impl StoreFuture<bool>;

    /// Ends as abandoned what [`has_overdue_batches`](Self::has_overdue_batches) found, at most
    /// `limit` of them; how many there were.
    fn abandon_overdue(&self, now: Timestamp, limit: usize) -> impl StoreFuture<usize>;

    /// Ends a batch as abandoned whatever its deadline; whether it was not over yet.
    fn abandon_batch(&self, id: BatchId) -> impl StoreFuture<bool>;

    /// Whether any task runs under a lease.
    fn has_leases(&self) -> impl StoreFuture<bool>;

    /// Publishes again what nobody has renewed for its term, at most `limit` tasks; how many there
    /// were. No term is counted from before `listening_since`.
    fn lapse_leases(
        &self,
        topology: Topology,
        listening_since: Timestamp,
        limit: usize,
    ) -> impl StoreFuture<usize>;

    /// Deletes at most `limit` records of each kind that were stored before `before`; how many.
    fn forget(&self, before: Timestamp, limit: usize) -> impl StoreFuture<usize>;

    /// What is known of a task.
    fn task(&self, id: TaskId) -> impl StoreFuture<TaskState>;

    /// The final records of those tasks that have one, in the order asked, as far as `max_bytes` go.
    fn results(&self, ids: Vec<TaskId>, max_bytes: usize) -> impl StoreFuture<Vec<TaskResult>>;

    /// What is known of a batch.
    fn batch(&self, id: BatchId) -> impl StoreFuture<Option<BatchStatus>>;

    /// Dead letters, the newest first.
    fn dead_page(&self, query: DeadQuery) -> impl StoreFuture<DeadPage>;

    /// One dead letter with its message, whatever became of it.
    fn dead(&self, id: TaskId) -> impl StoreFuture<Option<DeadSummary>>;

    /// The attempts of a task that failed and were followed by another one, the last fifty.
    fn attempts(&self, id: TaskId) -> impl StoreFuture<Vec<RetryNote>>;

    /// A piece of a dead letter's body in base64; empty at its end.
    fn dead_body(&self, id: TaskId, from: u64) -> impl StoreFuture<String>;

    /// What a task was replayed as, and what it is a replay of.
    fn replay_links(&self, id: TaskId) -> impl StoreFuture<ReplayLinks>;

    /// Marks dead letters as replayed and adds the tasks that they become to those that go back to the
    /// broker, by `exchange`. Large ones may leave the last items for another call.
    fn replay(
        &self,
        items: Vec<ReplayItem>,
        plan: ReplayPlan,
        exchange: String,
    ) -> impl StoreFuture<Vec<Replayed>>;

    /// Deletes dead letters. Final records stay, and parked tasks end by it; those are told.
    fn purge(&self, ids: Vec<TaskId>) -> impl StoreFuture<(Purged, EndedParked)>;

    /// What waits in the outboxes. Also refuses if the store's files are no longer those that are open.
    fn backlog(&self) -> impl StoreFuture<Backlog>;

    /// What is set aside, and which batches have not changed since then.
    fn standing(&self, quiet_since: Timestamp) -> impl StoreFuture<Stalled>;

    /// How much there is.
    fn totals(&self) -> impl StoreFuture<Totals>;
}

/// What the store says later.
pub trait StoreFuture<T>: Future<Output = Result<T, StoreError>> + Send {}
impl<T, F: Future<Output = Result<T, StoreError>> + Send> StoreFuture<T> for F {}

/// What became of a wish to cancel tasks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CancelledTasks {
    /// One answer for each task, in the order asked.
    pub tasks: Vec<Cancelled>,
    /// The wishes that are kept, old ones included.
    pub intents: Vec<CancelRequest>,
}

/// What became of a wish to cancel a batch.
#[derive(Debug, Clone, PartialEq)]
pub struct CancelledBatch {
    /// Whether the wish is kept.
    pub state: CancelState,
    /// The batch as it was then, if it is known.
    pub summary: Option<BatchSummary>,
    /// The wish, if it is kept.
    pub intent: Option<CancelRequest>,
}

/// Parked tasks that ended as cancelled.
#[derive(Debug, Clone, Default)]
pub struct EndedParked {
    /// Their letters and final records.
    pub letters: Vec<Letter>,
    /// Notices that now wait in the outbox.
    pub notices: u64,
}

/// A notice that waits to be published.
#[derive(Debug, Clone, PartialEq)]
pub struct OutboxEntry {
    /// Its place in line.
    pub seq: u64,
    /// The notice.
    pub notice: Notice,
}

/// A task that waits to be published again.
#[derive(Debug, Clone, PartialEq)]
pub struct ResendEntry {
    /// Its place in line.
    pub seq: u64,
    /// The task and its way.
    pub resend: Resend,
}

/// Which dead letters are asked for, and how much of them.
#[derive(Debug, Clone, PartialEq)]
pub struct DeadQuery {
    /// Which.
    pub filter: DeadFilter,
    /// Where the last page ended.
    pub from: Option<DeadCursor>,
    /// At most so many.
    pub limit: usize,
    /// Whether to count all that match.
    pub count: bool,
    /// Whether to give whole messages.
    pub whole: bool,
}

/// The two ends of a replay.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReplayLinks {
    /// The task that this one's dead letter became.
    pub replayed_as: Option<TaskId>,
    /// The dead task that this one was made of.
    pub replay_of: Option<TaskId>,
}

/// Which store it is, in the order of age.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct StoreIdentity {
    /// When it was made.
    pub created: Timestamp,
    /// Its UUID.
    pub id: String,
}

/// What waits to be published.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Backlog {
    /// Notices.
    pub notices: Option<Waiting>,
    /// Tasks that go back to the broker.
    pub resends: Option<Waiting>,
}

/// The entries of an outbox that is not empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waiting {
    /// The place in line of the oldest one.
    pub oldest: u64,
    /// How many there are at most.
    pub count: u64,
}

/// How much the store holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Final records.
    pub results: u64,
    /// Final records that came again.
    pub repeats: u64,
    /// Dead letters, without late ones.
    pub dead: u64,
    /// Batches.
    pub batches: u64,
}
