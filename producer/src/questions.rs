//! What a program asks the collector.

use std::collections::BTreeMap;
use std::time::Duration;

use garenne_common::wire::report::{self, BUNDLE_KIND};
use garenne_common::wire::{
    BatchStatus, DeadFilter, DeadSummary, Message, Query, Report, Response, TaskState,
};
use garenne_common::{BatchId, TaskId, TaskResult};
use tokio::time::Instant;

use crate::ask::{ASK_DEADLINE, Asker, MOST_IDS, unexpected};
use crate::{Producer, QueryError};

/// How much the collector has seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Totals {
    /// Final results in the store.
    pub results: u64,
    /// Results that came again and were dropped.
    pub repeats: u64,
    /// Dead letters in the store.
    pub dead: u64,
    /// Batches in the store.
    pub batches: u64,
}

impl Producer {
    /// Asks the collector, and waits 5 seconds for its answer.
    ///
    /// [`Query::Results`] is not answered by an [`Response`]; use [`results`](Self::results).
    pub async fn ask(&self, question: Query) -> Result<Response, QueryError> {
        self.ask_within(question, ASK_DEADLINE).await
    }

    /// [`ask`](Self::ask) with another patience.
    pub async fn ask_within(
        &self,
        question: Query,
        patience: Duration,
    ) -> Result<Response, QueryError> {
        let message = self.asker(patience).await?.ask(&question, patience).await?;
        let answer = Response::decode(&message)?;
        if let Response::Refused { error } = answer {
            return Err(QueryError::Refused(error));
        }
        Ok(answer)
    }

    /// How a task stands.
    pub async fn task_state(&self, id: &TaskId) -> Result<TaskState, QueryError> {
        let answer = self.ask(Query::Task { id: id.clone() }).await?;
        let Response::Task { state, .. } = answer else { return Err(unexpected("a task")) };
        Ok(state)
    }

    /// How a batch stands; `None` if the collector has not heard of it.
    pub async fn batch_status(&self, id: &BatchId) -> Result<Option<BatchStatus>, QueryError> {
        let answer = self.ask(Query::Batch { id: id.clone() }).await?;
        let Response::Batch { batch } = answer else { return Err(unexpected("a batch")) };
        Ok(batch)
    }

    /// The final results of these tasks, as far as they have ended.
    pub async fn results(&self, ids: &[TaskId]) -> Result<Vec<TaskResult>, QueryError> {
        let asker = self.asker(ASK_DEADLINE).await?;
        let mut results = vec![];
        for slice in ids.chunks(MOST_IDS) {
            let question = Query::Results { ids: slice.to_vec(), fingerprints: BTreeMap::new() };
            let message = asker.ask(&question, ASK_DEADLINE).await?;
            results.extend(results_in(&message)?);
        }
        Ok(results)
    }

    /// Totals since the collector's store was made.
    pub async fn totals(&self) -> Result<Totals, QueryError> {
        let answer = self.ask(Query::Totals).await?;
        let Response::Totals { results, repeats, dead, batches } = answer else {
            return Err(unexpected("totals"));
        };
        Ok(Totals { results, repeats, dead, batches })
    }

    /// The newest dead letters, at most `limit` and at most 1,000.
    pub async fn dead_list(&self, limit: u32) -> Result<Vec<DeadSummary>, QueryError> {
        Ok(self.dead_page(&DeadFilter::default(), None, limit).await?.letters)
    }

    /// One dead letter with its message, if there is one of this id.
    pub async fn dead(&self, id: &TaskId) -> Result<Option<DeadSummary>, QueryError> {
        let answer = self.ask(Query::Dead { id: id.clone() }).await?;
        let Response::Dead { letter, .. } = answer else { return Err(unexpected("a dead letter")) };
        Ok(letter)
    }

    async fn asker(&self, patience: Duration) -> Result<Asker, QueryError> {
        let replies = self.replies(Instant::now() + patience).await?;
        Ok(self.asker_for(replies))
    }
}

fn results_in(message: &Message) -> Result<Vec<TaskResult>, QueryError> {
    if message.properties.kind.as_deref() != Some(BUNDLE_KIND) {
        let Response::Refused { error } = Response::decode(message)? else {
            return Err(unexpected("results"));
        };
        return Err(QueryError::Refused(error));
    }
    let results = report::decode(message)?.into_iter().filter_map(|report| match report {
        Report::Finished(result) => Some(result),
        Report::Retrying(_)
        | Report::BatchOpened { .. }
        | Report::BatchSealed { .. }
        | Report::Conflict { .. }
        | Report::Lease(_)
        | Report::FinishedUnderLease { .. } => None,
    });
    Ok(results.collect())
}
