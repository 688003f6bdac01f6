//! Typed queries: the state of tasks and batches, results, totals, dead letters.
//!
//! Each method sends one query and checks that the response has the matching type.

use std::collections::BTreeMap;
use std::time::Duration;

use garenne_common::wire::report::{self, BUNDLE_KIND};
use garenne_common::wire::{
    BatchStatus, DeadFilter, DeadSummary, Message, Query, Report, Response, TaskState,
};
use garenne_common::{BatchId, TaskId, TaskResult};
use tokio::time::Instant;

use super::client::{MAX_IDS, QUERY_TIMEOUT, QueryClient, unexpected};
use crate::{Producer, QueryError};

/// Numbers of records in the collector's store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Totals {
    /// Final results in the store.
    pub results: u64,
    /// Results that arrived again and were dropped.
    pub repeats: u64,
    /// Dead letters in the store.
    pub dead: u64,
    /// Batches in the store.
    pub batches: u64,
}

impl Producer {
    /// Sends a query to the collector and waits at most 5 seconds for its response.
    ///
    /// Fails with [`QueryError::NoCollector`] without a response, and with [`QueryError::Refused`]
    /// if the collector refuses the query. [`Query::Results`] has no [`Response`]; use
    /// [`results`](Self::results).
    pub async fn query(&self, query: Query) -> Result<Response, QueryError> {
        self.query_within(query, QUERY_TIMEOUT).await
    }

    /// [`query`](Self::query) with another time limit.
    pub async fn query_within(
        &self,
        query: Query,
        timeout: Duration,
    ) -> Result<Response, QueryError> {
        let message = self.query_client(timeout).await?.send(&query, timeout).await?;
        let response = Response::decode(&message)?;
        if let Response::Refused { error } = response {
            return Err(QueryError::Refused(error));
        }
        Ok(response)
    }

    /// The state of a task.
    pub async fn task_state(&self, id: &TaskId) -> Result<TaskState, QueryError> {
        let response = self.query(Query::Task { id: id.clone() }).await?;
        let Response::Task { state, .. } = response else { return Err(unexpected("task")) };
        Ok(state)
    }

    /// The state of a batch; `None` if the collector does not know it.
    pub async fn batch_status(&self, id: &BatchId) -> Result<Option<BatchStatus>, QueryError> {
        let response = self.query(Query::Batch { id: id.clone() }).await?;
        let Response::Batch { batch } = response else { return Err(unexpected("batch")) };
        Ok(batch)
    }

    /// The final results of those of these tasks that have ended.
    pub async fn results(&self, ids: &[TaskId]) -> Result<Vec<TaskResult>, QueryError> {
        let client = self.query_client(QUERY_TIMEOUT).await?;
        let mut results = vec![];
        for slice in ids.chunks(MAX_IDS) {
            let query = Query::Results { ids: slice.to_vec(), fingerprints: BTreeMap::new() };
            let message = client.send(&query, QUERY_TIMEOUT).await?;
            results.extend(results_in(&message)?);
        }
        Ok(results)
    }

    /// Numbers of records since the collector's store was created.
    pub async fn totals(&self) -> Result<Totals, QueryError> {
        let response = self.query(Query::Totals).await?;
        let Response::Totals { results, repeats, dead, batches } = response else {
            return Err(unexpected("totals"));
        };
        Ok(Totals { results, repeats, dead, batches })
    }

    /// The newest dead letters, at most `limit` and at most 1,000.
    pub async fn dead_list(&self, limit: u32) -> Result<Vec<DeadSummary>, QueryError> {
        Ok(self.dead_page(&DeadFilter::default(), None, limit).await?.letters)
    }

    /// The dead letter with this id and its message; `None` if there is none.
    pub async fn dead(&self, id: &TaskId) -> Result<Option<DeadSummary>, QueryError> {
        let response = self.query(Query::Dead { id: id.clone() }).await?;
        let Response::Dead { letter, .. } = response else { return Err(unexpected("dead")) };
        Ok(letter)
    }

    async fn query_client(&self, timeout: Duration) -> Result<QueryClient, QueryError> {
        let replies = self.0.replies(Instant::now() + timeout).await?;
        Ok(self.0.query_client(replies))
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
