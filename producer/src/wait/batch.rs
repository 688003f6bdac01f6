//! Batches: tasks that are counted together, with one done notice and callers that wait for it.
//!
//! The collector counts. This side opens the batch, marks its members, reports how many there are,
//! and waits for the end. A batch that is never sealed ends as abandoned
//! (`producer.batch_deadline`).

use std::time::Duration;

use futures_util::{Stream, StreamExt};
use garenne_common::broker::BrokerError;
use garenne_common::wire::{BatchSummary, Notice, Report, report};
use garenne_common::{BatchId, TaskId, Timestamp};
use tokio::time::{Instant, MissedTickBehavior};

use super::{Handle, NoticeFilter, Notices};
use crate::submit::members::Members;
use crate::{Producer, QueryError, Submission, SubmitError};

/// Interval of queries while a batch is waited for, in case its notice was missed.
const POLL_INTERVAL: Duration = Duration::from_secs(3);
/// If no collector has ever responded, a query that is sent later than this is the last one.
const COLLECTOR_TIMEOUT: Duration = Duration::from_secs(10);

/// An open batch: tasks can be submitted to it until it is sealed.
///
/// A submission that ended in [`SubmitError::Unconfirmed`] must be repeated under the id in the
/// error before the batch is sealed. Otherwise the task may be in the batch without being counted.
#[must_use = "a batch that is not sealed ends as abandoned"]
pub struct Batch {
    producer: Producer,
    id: BatchId,
    members: Members,
}

/// A batch whose members are all submitted.
#[derive(Clone)]
pub struct SealedBatch {
    producer: Producer,
    id: BatchId,
    count: u64,
}

impl Producer {
    /// Opens a batch; `Ok` means that the broker has confirmed the opening.
    pub async fn batch(&self) -> Result<Batch, SubmitError> {
        let (key, at) = (BatchId::generate_key(), Timestamp::now());
        let id = key.public().into_owned();
        let deadline = at.plus(self.0.batch_deadline);
        self.report(&Report::BatchOpened { batch: key.clone(), at, deadline }).await?;
        Ok(Batch { producer: self.clone(), id, members: Members::new(key) })
    }

    /// Waits until a batch is done or abandoned; it may be the batch of another process.
    ///
    /// Subscribes to the notice of the batch, then queries the collector every few seconds, so a
    /// missed notice only costs time. Once a collector has responded, outages are waited through;
    /// if none ever responds, this fails with [`QueryError::NoCollector`] after some 15 seconds. A
    /// batch that the collector does not know is waited for, since its opening may still be under
    /// way; if the id was typed by a person, check it with [`batch_status`](Self::batch_status)
    /// first.
    pub async fn wait_batch(&self, id: &BatchId) -> Result<BatchSummary, QueryError> {
        let filter = NoticeFilter::Batch(id.clone());
        let mut notices = self.notices(filter).await?;
        tokio::select! {
            summary = next_batch(&mut notices) => summary,
            summary = self.poll_until_done(id) => summary,
        }
    }

    /// [`wait_batch`](Self::wait_batch) with a time limit, after which it fails with
    /// [`QueryError::NotDone`].
    pub async fn wait_batch_timeout(
        &self,
        id: &BatchId,
        limit: Duration,
    ) -> Result<BatchSummary, QueryError> {
        let waited = tokio::time::timeout(limit, self.wait_batch(id)).await;
        waited.unwrap_or_else(|_| Err(QueryError::NotDone { batch: id.clone(), waited: limit }))
    }

    async fn poll_until_done(&self, id: &BatchId) -> Result<BatchSummary, QueryError> {
        let begun = Instant::now();
        let mut responded = false;
        let mut turn = tokio::time::interval(POLL_INTERVAL);
        turn.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            turn.tick().await;
            let retry = responded || begun.elapsed() < COLLECTOR_TIMEOUT;
            match self.batch_status(id).await {
                Ok(Some(status)) if status.summary.state.is_final() => return Ok(status.summary),
                Ok(_) => responded = true,
                Err(error) if retry && error.is_transient() => {
                    tracing::debug!(%error, batch = %id, "batch query failed, trying again");
                }
                Err(QueryError::NoCollector { .. }) => {
                    let waited = Duration::from_secs(begun.elapsed().as_secs());
                    return Err(QueryError::NoCollector { waited });
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Sends a report to the collector and waits for the broker's confirm.
    async fn report(&self, report: &Report) -> Result<(), SubmitError> {
        let message = report::encode(std::slice::from_ref(report), self.app())?;
        let results = self.topology().results();
        let dispatch = &self.0.dispatch;
        Ok(dispatch.publish(results.clone(), results, message, self.deadline()).await?)
    }
}

impl Batch {
    /// The batch's id.
    pub fn id(&self) -> &BatchId {
        &self.id
    }

    /// The number of members that the broker has confirmed so far.
    pub fn count(&self) -> u64 {
        self.members.count()
    }

    /// Submits a member; see [`Producer::submit`].
    pub async fn submit<O>(
        &self,
        submission: impl Into<Submission<O>>,
    ) -> Result<Handle<O>, SubmitError> {
        let submission = submission.into();
        let chosen = submission.has_own_id();
        let handle = self.producer.submit_in(submission, Some(self.members.key())).await?;
        self.members.count_in(handle.id(), chosen);
        Ok(handle)
    }

    /// Submits a member without waiting for its result; see [`Producer::submit_detached`].
    pub async fn submit_detached<O>(
        &self,
        submission: impl Into<Submission<O>>,
    ) -> Result<TaskId, SubmitError> {
        let submission = submission.into();
        let chosen = submission.has_own_id();
        let id = self.producer.submit_detached_in(submission, Some(self.members.key())).await?;
        self.members.count_in(&id, chosen);
        Ok(id)
    }

    /// Submits several members together; see [`Producer::submit_many`].
    pub async fn submit_many<O, I>(&self, submissions: I) -> Vec<Result<Handle<O>, SubmitError>>
    where
        I: IntoIterator,
        I::Item: Into<Submission<O>>,
    {
        let submissions = submissions.into_iter().map(Into::into).collect();
        let outcomes = self.producer.submit_group(submissions, Some(&self.members), true).await;
        outcomes.into_iter().map(|outcome| self.producer.handle(outcome?)).collect()
    }

    /// [`submit_many`](Self::submit_many) without waiting for results.
    pub async fn submit_many_detached<O, I>(
        &self,
        submissions: I,
    ) -> Vec<Result<TaskId, SubmitError>>
    where
        I: IntoIterator,
        I::Item: Into<Submission<O>>,
    {
        let submissions = submissions.into_iter().map(Into::into).collect();
        let outcomes =
            self.producer.submit_group::<O>(submissions, Some(&self.members), false).await;
        outcomes.into_iter().map(|outcome| Ok(outcome?.id)).collect()
    }

    /// Submits a stream of members in order; see [`Producer::submit_all`].
    pub fn submit_all<O, S>(
        &self,
        submissions: S,
    ) -> impl Stream<Item = Result<Handle<O>, SubmitError>>
    where
        S: Stream,
        S::Item: Into<Submission<O>>,
    {
        let outcomes = self.producer.submit_groups(submissions, Some(&self.members), true);
        outcomes.map(|outcome| self.producer.handle(outcome?))
    }

    /// [`submit_all`](Self::submit_all) without waiting for results.
    pub fn submit_all_detached<O, S>(
        &self,
        submissions: S,
    ) -> impl Stream<Item = Result<TaskId, SubmitError>>
    where
        S: Stream,
        S::Item: Into<Submission<O>>,
    {
        let outcomes = self.producer.submit_groups::<O, S>(submissions, Some(&self.members), false);
        outcomes.map(|outcome| Ok(outcome?.id))
    }

    /// Seals the batch: it has no further members. `Ok` means that the broker has confirmed it.
    ///
    /// After an error the batch can no longer be sealed and ends as abandoned, unless the report
    /// has arrived all the same; its members run in any case.
    pub async fn seal(self) -> Result<SealedBatch, SubmitError> {
        let count = self.count();
        let Self { producer, id, members } = self;
        let (batch, at) = (members.into_key(), Timestamp::now());
        producer.report(&Report::BatchSealed { batch, count, at }).await?;
        Ok(SealedBatch { producer, id, count })
    }
}

impl SealedBatch {
    /// The batch's id.
    pub fn id(&self) -> &BatchId {
        &self.id
    }

    /// The number of members.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Waits until all members have ended; see [`Producer::wait_batch`].
    pub async fn wait(&self) -> Result<BatchSummary, QueryError> {
        self.producer.wait_batch(&self.id).await
    }

    /// [`wait`](Self::wait) with a time limit, after which it fails with [`QueryError::NotDone`].
    pub async fn wait_timeout(&self, limit: Duration) -> Result<BatchSummary, QueryError> {
        self.producer.wait_batch_timeout(&self.id, limit).await
    }
}

async fn next_batch(notices: &mut Notices) -> Result<BatchSummary, QueryError> {
    loop {
        match notices.next().await {
            Some(Notice::Batch(summary)) => return Ok(summary),
            Some(Notice::Task(_)) => {}
            None => return Err(BrokerError::Closed.into()),
        }
    }
}
