//! Cancelling tasks and batches: a wish that the collector keeps until it took effect.

use std::time::Duration;

use garenne_common::wire::{BatchSummary, CancelState, Cancelled, Query, Response};
use garenne_common::{BatchId, TaskId};
use tokio::time::{Instant, sleep};

use crate::ask::{MOST_IDS, unexpected};
use crate::{Producer, QueryError};

/// How long [`Producer::cancel`] waits: what runs and heeds its cancellation has ended by then.
const WAIT: Duration = Duration::from_secs(3);
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// What became of the wish to cancel a batch.
#[derive(Debug, Clone, PartialEq)]
pub struct BatchCancelled {
    /// Too late when every task of it had ended before; else requested.
    pub state: CancelState,
    /// The counts when the collector took the wish; `None` if it has not heard of the batch yet.
    pub batch: Option<BatchSummary>,
}

impl Producer {
    /// Cancels a task that is queued, delayed, parked or running, and waits up to 3 seconds for it.
    ///
    /// [`CancelState::Requested`] means that the collector keeps the wish: no worker that knows of it
    /// begins the task, one that runs it tells the handler (`Context::cancelled`) and ends it after a
    /// grace period. An id that nobody has heard of is `Requested` too, since the collector hears of
    /// a task only when an attempt of it ends.
    pub async fn cancel(&self, id: &TaskId) -> Result<Cancelled, QueryError> {
        let mut tasks = self.cancel_tasks(std::slice::from_ref(id), None, WAIT).await?;
        tasks.pop().ok_or_else(|| unexpected("a cancellation"))
    }

    /// [`cancel`](Self::cancel) for many tasks, with the reason that their results will carry, and
    /// another patience. The answers come in the order of `ids`.
    pub async fn cancel_tasks(
        &self,
        ids: &[TaskId],
        reason: Option<&str>,
        wait: Duration,
    ) -> Result<Vec<Cancelled>, QueryError> {
        let mut cancelled = Vec::with_capacity(ids.len());
        for slice in ids.chunks(MOST_IDS) {
            let question = Query::Cancel { ids: slice.to_vec(), reason: Some(self.why(reason)) };
            let Response::Cancel { tasks } = self.ask(question).await? else {
                return Err(unexpected("a cancellation"));
            };
            cancelled.extend(tasks);
        }
        self.await_ends(&mut cancelled, Instant::now() + wait).await?;
        Ok(cancelled)
    }

    /// Cancels every task of a batch that has not ended, and those that are submitted to it later.
    pub async fn cancel_batch(
        &self,
        id: &BatchId,
        reason: Option<&str>,
    ) -> Result<BatchCancelled, QueryError> {
        let question = Query::CancelBatch { id: id.clone(), reason: Some(self.why(reason)) };
        let Response::CancelBatch { state, batch } = self.ask(question).await? else {
            return Err(unexpected("a cancellation"));
        };
        Ok(BatchCancelled { state, batch })
    }

    fn why(&self, reason: Option<&str>) -> String {
        reason.map_or_else(|| format!("cancelled by {}", self.app()), str::to_owned)
    }

    /// Looks again and again how those stand that were only requested.
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
