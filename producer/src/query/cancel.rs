//! Cancelling tasks and batches: the collector keeps a cancel request until it has taken effect.
//!
//! Ids come in; the state of each cancel request goes out. A cancel request never removes a message
//! from a queue: workers apply it when they meet the task.

use std::time::Duration;

use garenne_common::wire::{BatchSummary, CancelState, Cancelled, Query, Response};
use garenne_common::{BatchId, TaskId};
use tokio::time::{Instant, sleep};

use super::client::{MAX_IDS, unexpected};
use crate::{Producer, QueryError};

/// How long [`Producer::cancel`] waits: a running task that reacts to its cancellation has ended by
/// then.
const CANCEL_WAIT: Duration = Duration::from_secs(3);
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// The outcome of a cancel request for a batch.
#[derive(Debug, Clone, PartialEq)]
pub struct BatchCancelled {
    /// `TooLate` if all tasks of the batch had ended before, otherwise `Requested`.
    pub state: CancelState,
    /// The counts when the collector stored the request; `None` if it does not know the batch yet.
    pub batch: Option<BatchSummary>,
}

impl Producer {
    /// Cancels a task that is queued, delayed, parked or running, and waits up to 3 seconds for its
    /// end.
    ///
    /// [`CancelState::Requested`] means that the collector keeps the request: no worker that has it
    /// starts the task, and a worker that runs it notifies the handler (`Context::cancelled`) and
    /// ends it after a grace period. Unknown ids are `Requested` too, since the collector learns of
    /// a task only when an attempt ends.
    pub async fn cancel(&self, id: &TaskId) -> Result<Cancelled, QueryError> {
        let mut tasks = self.cancel_tasks(std::slice::from_ref(id), None, CANCEL_WAIT).await?;
        tasks.pop().ok_or_else(|| unexpected("cancel"))
    }

    /// [`cancel`](Self::cancel) for many tasks, with the reason that their results will contain,
    /// waiting at most `wait` for their ends. The outcomes are in the order of `ids`.
    pub async fn cancel_tasks(
        &self,
        ids: &[TaskId],
        reason: Option<&str>,
        wait: Duration,
    ) -> Result<Vec<Cancelled>, QueryError> {
        let mut cancelled = Vec::with_capacity(ids.len());
        for slice in ids.chunks(MAX_IDS) {
            let reason = Some(self.cancel_reason(reason));
            let query = Query::Cancel { ids: slice.to_vec(), reason };
            let Response::Cancel { tasks } = self.query(query).await? else {
                return Err(unexpected("cancel"));
            };
            cancelled.extend(tasks);
        }
        self.await_ends(&mut cancelled, Instant::now() + wait).await?;
        Ok(cancelled)
    }

    /// Cancels all tasks of a batch that have not ended, and those that are submitted to it later.
    pub async fn cancel_batch(
        &self,
        id: &BatchId,
        reason: Option<&str>,
    ) -> Result<BatchCancelled, QueryError> {
        let reason = Some(self.cancel_reason(reason));
        let query = Query::CancelBatch { id: id.clone(), reason };
        let Response::CancelBatch { state, batch } = self.query(query).await? else {
            return Err(unexpected("cancel_batch"));
        };
        Ok(BatchCancelled { state, batch })
    }

    fn cancel_reason(&self, reason: Option<&str>) -> String {
        reason.map_or_else(|| format!("cancelled by {}", self.app()), str::to_owned)
    }

    /// Polls the results of tasks whose cancellation is requested, until all have ended or `by`.
    async fn await_ends(&self, all: &mut [Cancelled], by: Instant) -> Result<(), QueryError> {
        let mut pause = FIRST_PAUSE;
        loop {
            let open = all.iter().filter(|one| one.state == CancelState::Requested);
            let open: Vec<TaskId> = open.map(|one| one.id.clone()).collect();
            if open.is_empty() || Instant::now() >= by {
                return Ok(());
            }
            sleep(pause.min(by.saturating_duration_since(Instant::now()))).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
            for result in self.results(&open).await? {
                let ended = all.iter_mut().filter(|one| one.id == result.id);
                ended.for_each(|one| {
                    *one = Cancelled::ended(result.id.clone(), result.status, result.finished_at);
                });
            }
        }
    }
}
