//! Batches: a set of tasks with one count, one done notice and somebody who waits for it.
//!
//! The collector counts. This side opens the batch, marks its members, says how many they are, and
//! listens. A batch that is never sealed ends as abandoned (`producer.batch_deadline`).

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use futures_util::{Stream, StreamExt};
use garenne_common::broker::BrokerError;
use garenne_common::wire::{BatchSummary, Notice, Report, report};
use garenne_common::{BatchId, TaskId, Timestamp};
use tokio::time::{Instant, MissedTickBehavior};

use crate::{Handle, NoticeFilter, Notices, Producer, QueryError, Submission, SubmitError};

/// How long a wait asks again after an answer, in case a notice was missed.
const ASK_EVERY: Duration = Duration::from_secs(3);
/// A question sent later than this is the last one, if no collector has ever answered.
const COLLECTOR_PATIENCE: Duration = Duration::from_secs(10);

/// An open batch.
///
/// A submission that ended in [`SubmitError::Unconfirmed`] must be repeated under the id it names
/// before the batch is sealed: otherwise it may have arrived without being counted.
#[must_use = "a batch that is not sealed ends as abandoned"]
pub struct Batch {
    producer: Producer,
    id: BatchId,
    /// What its members and its seal carry in the place of the id; never shown.
    key: BatchId,
    /// Confirmed members with ids of our making, which are all different.
    generated: AtomicU64,
    /// Confirmed members with ids of the caller's; the same id again is the same member.
    chosen: Mutex<HashSet<TaskId>>,
}

/// A batch whose members are all submitted.
#[derive(Clone)]
pub struct SealedBatch {
    producer: Producer,
    id: BatchId,
    count: u64,
}

impl Producer {
    /// Opens a batch; `Ok` means that the broker confirmed the opening.
    pub async fn batch(&self) -> Result<Batch, SubmitError> {
        let (key, at) = (BatchId::generate_key(), Timestamp::now());
        let id = key.public().into_owned();
        let deadline = at.plus(self.batch_deadline());
        self.report(&Report::BatchOpened { batch: key.clone(), at, deadline }).await?;
        let (generated, chosen) = (AtomicU64::new(0), Mutex::default());
        Ok(Batch { producer: self.clone(), id, key, generated, chosen })
    }

    /// Waits until any batch is done or abandoned, for instance one of another process.
    ///
    /// Subscribes to its notice first, then asks the collector, and asks again every few seconds, so a
    /// missed notice only costs time. Outages are waited through, once a collector has answered; if none
    /// ever does, this is [`QueryError::NoCollector`] after some 15 seconds. A batch that the collector has
    /// not heard of may still be on its way there: ask [`batch_status`](Self::batch_status) before if the
    /// id comes from a person.
    pub async fn wait_batch(&self, id: &BatchId) -> Result<BatchSummary, QueryError> {
        let filter = NoticeFilter::Batch(id.clone());
        let mut notices = self.notices(filter).await?;
        tokio::select! {
            summary = next_batch(&mut notices) => summary,
            summary = self.ask_until_done(id) => summary,
        }
    }

    /// [`wait_batch`](Self::wait_batch) with a limit, after which it is [`QueryError::NotDone`].
    pub async fn wait_batch_timeout(
        &self,
        id: &BatchId,
        limit: Duration,
    ) -> Result<BatchSummary, QueryError> {
        let waited = tokio::time::timeout(limit, self.wait_batch(id)).await;
        waited.unwrap_or_else(|_| Err(QueryError::NotDone { batch: id.clone(), waited: limit }))
    }

    async fn ask_until_done(&self, id: &BatchId) -> Result<BatchSummary, QueryError> {
        let begun = Instant::now();
        let mut answered = false;
        let mut turn = tokio::time::interval(ASK_EVERY);
        turn.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            turn.tick().await;
            let patient = answered || begun.elapsed() < COLLECTOR_PATIENCE;
            match self.batch_status(id).await {
                Ok(Some(status)) if status.summary.state.is_final() => return Ok(status.summary),
                Ok(_) => answered = true,
                Err(error) if patient && error.is_transient() => {
                    tracing::debug!(%error, batch = %id, "asked in vain");
                }
                Err(QueryError::NoCollector { .. }) => {
                    let waited = Duration::from_secs(begun.elapsed().as_secs());
                    return Err(QueryError::NoCollector { waited });
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Tells the collector something, confirmed by the broker.
    async fn report(&self, report: &Report) -> Result<(), SubmitError> {
        let message = report::encode(std::slice::from_ref(report), self.app())?;
        let results = self.topology().results();
        Ok(self.dispatch().publish(results.clone(), results, message, self.deadline()).await?)
    }
}

impl Batch {
    /// Its id.
    pub fn id(&self) -> &BatchId {
        &self.id
    }

    pub(crate) fn key(&self) -> &BatchId {
        &self.key
    }

    /// Confirmed members so far.
    pub fn count(&self) -> u64 {
        let chosen = self.chosen.lock().unwrap_or_else(PoisonError::into_inner).len();
        self.generated.load(Ordering::Relaxed) + u64::try_from(chosen).unwrap_or(u64::MAX)
    }

    /// Submits a member; see [`Producer::submit`].
    pub async fn submit<O>(
        &self,
        submission: impl Into<Submission<O>>,
    ) -> Result<Handle<O>, SubmitError> {
        let submission = submission.into();
        let chosen = submission.has_own_id();
        let handle = self.producer.submit_in(submission, Some(&self.key)).await?;
        self.count_in(handle.id(), chosen);
        Ok(handle)
    }

    /// Submits a member without asking for its result; see [`Producer::submit_detached`].
    pub async fn submit_detached<O>(
        &self,
        submission: impl Into<Submission<O>>,
    ) -> Result<TaskId, SubmitError> {
        let submission = submission.into();
        let chosen = submission.has_own_id();
        let id = self.producer.submit_detached_in(submission, Some(&self.key)).await?;
        self.count_in(&id, chosen);
        Ok(id)
    }

    /// Submits several members together; see [`Producer::submit_many`].
    pub async fn submit_many<O, I>(&self, submissions: I) -> Vec<Result<Handle<O>, SubmitError>>
    where
        I: IntoIterator,
        I::Item: Into<Submission<O>>,
    {
        let submissions = submissions.into_iter().map(Into::into).collect();
        let outcomes = self.producer.submit_group(submissions, Some(self), true).await;
        outcomes.into_iter().map(|outcome| self.producer.handle(outcome?)).collect()
    }

    /// [`submit_many`](Self::submit_many) without asking for results.
    pub async fn submit_many_detached<O, I>(
        &self,
        submissions: I,
    ) -> Vec<Result<TaskId, SubmitError>>
    where
        I: IntoIterator,
        I::Item: Into<Submission<O>>,
    {
        let submissions = submissions.into_iter().map(Into::into).collect();
        let outcomes = self.producer.submit_group::<O>(submissions, Some(self), false).await;
        outcomes.into_iter().map(|outcome| Ok(outcome?.id)).collect()
    }

    /// Submits members in order and in bundles; see [`Producer::submit_all`].
    pub fn submit_all<O, S>(
        &self,
        submissions: S,
    ) -> impl Stream<Item = Result<Handle<O>, SubmitError>>
    where
        S: Stream,
        S::Item: Into<Submission<O>>,
    {
        let outcomes = self.producer.submit_groups(submissions, Some(self), true);
        outcomes.map(|outcome| self.producer.handle(outcome?))
    }

    /// [`submit_all`](Self::submit_all) without asking for results.
    pub fn submit_all_detached<O, S>(
        &self,
        submissions: S,
    ) -> impl Stream<Item = Result<TaskId, SubmitError>>
    where
        S: Stream,
        S::Item: Into<Submission<O>>,
    {
        let outcomes = self.producer.submit_groups::<O, S>(submissions, Some(self), false);
        outcomes.map(|outcome| Ok(outcome?.id))
    }

    /// Says that there will be no more members; `Ok` means that the broker confirmed it.
    ///
    /// After an error the batch cannot be sealed any more and ends as abandoned, unless the report had
    /// arrived nevertheless; its members run in any case.
    pub async fn seal(self) -> Result<SealedBatch, SubmitError> {
        let count = self.count();
        let Self { producer, id, key, .. } = self;
        let at = Timestamp::now();
        producer.report(&Report::BatchSealed { batch: key, count, at }).await?;
        Ok(SealedBatch { producer, id, count })
    }

    /// Counts a confirmed member.
    pub(crate) fn count_in(&self, id: &TaskId, chosen: bool) {
        if chosen {
            self.chosen.lock().unwrap_or_else(PoisonError::into_inner).insert(id.clone());
        } else {
            self.generated.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl SealedBatch {
    /// Its id.
    pub fn id(&self) -> &BatchId {
        &self.id
    }

    /// How many members it has.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Waits until every member ended; see [`Producer::wait_batch`].
    pub async fn wait(&self) -> Result<BatchSummary, QueryError> {
        self.producer.wait_batch(&self.id).await
    }

    /// [`wait`](Self::wait) with a limit, after which it is [`QueryError::NotDone`].
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
