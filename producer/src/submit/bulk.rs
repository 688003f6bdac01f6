//! Many submissions in one call, in as few messages as suit the tasks and the workers.
//!
//! Tasks of one queue, priority and delay travel in bundles (docs/decisions/0017). The size of a
//! bundle depends on how long such tasks have taken so far ([`garenne_common::bundling`]), so that
//! a bundle is a small amount of work. The steps are those of a single submission
//! ([`crate::producer`]); each task has an outcome of its own.

use std::sync::Arc;

use futures_util::stream::FuturesUnordered;
use futures_util::{Stream, StreamExt};
use garenne_common::broker::BrokerError;
use garenne_common::{QueueName, TaskId};
use tokio::time::Instant;

use super::dispatch::TaggedTask;
use super::members::Members;
use super::submission::Prepared;
use crate::error::submit_error;
use crate::wait::replies::Waiting;
use crate::{Handle, Producer, Submission, SubmitError};

/// How many groups of submissions of a stream are under way at once.
const GROUPS_UNDER_WAY: usize = 8;
/// Bundle size for task names whose duration has not been measured yet: most tasks are quick, and a
/// worker that finds them slow passes them on to others.
const UNMEASURED_BUNDLE: u32 = 200;

/// A task that the broker has confirmed.
pub(crate) struct Submitted {
    pub(crate) id: TaskId,
    /// Receives its result, if the submission asked for it.
    waiting: Option<Waiting>,
}

type Item = TaggedTask<Tag>;

struct Tag {
    /// Index of the submission among those it was submitted with.
    index: usize,
    /// Whether the caller has chosen the id, so that it may come twice.
    chosen: bool,
}

type Outcome = Result<Submitted, SubmitError>;

impl Producer {
    /// Submits several tasks together; the outcomes are in the order of the submissions.
    ///
    /// Tasks of one queue, priority and delay share messages, which is many times cheaper than as
    /// many calls of [`submit`](Self::submit). Each task keeps its own options, result and outcome.
    pub async fn submit_many<O, I>(&self, submissions: I) -> Vec<Result<Handle<O>, SubmitError>>
    where
        I: IntoIterator,
        I::Item: Into<Submission<O>>,
    {
        let submissions = submissions.into_iter().map(Into::into).collect();
        let outcomes = self.submit_group(submissions, None, true).await;
        outcomes.into_iter().map(|outcome| self.handle(outcome?)).collect()
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
        let outcomes = self.submit_group::<O>(submissions, None, false).await;
        outcomes.into_iter().map(|outcome| Ok(outcome?.id)).collect()
    }

    /// Submits everything that `submissions` yields; handles and errors come in the same order.
    ///
    /// What the stream has ready is submitted together, as in [`submit_many`](Self::submit_many),
    /// and nothing waits for more: from a stream that yields one task now and then each task is
    /// sent at once. The number of submissions under way is bounded. Nothing happens while the
    /// returned stream is not polled, and an error does not end it.
    pub fn submit_all<O, S>(
        &self,
        submissions: S,
    ) -> impl Stream<Item = Result<Handle<O>, SubmitError>>
    where
        S: Stream,
        S::Item: Into<Submission<O>>,
    {
        let outcomes = self.submit_groups(submissions, None, true);
        outcomes.map(|outcome| self.handle(outcome?))
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
        self.submit_groups::<O, S>(submissions, None, false).map(|outcome| Ok(outcome?.id))
    }

    /// The handle of a task that was submitted for its result.
    pub(crate) fn handle<O>(&self, submitted: Submitted) -> Result<Handle<O>, SubmitError> {
        let Submitted { id, waiting, .. } = submitted;
        // Always present, since the result was asked for.
        let waiting = waiting.ok_or(BrokerError::Closed)?;
        Ok(Handle::new(id, waiting, Arc::clone(&self.0)))
    }

    /// Submits what the stream has ready, group by group.
    pub(crate) fn submit_groups<O, S>(
        &self,
        submissions: S,
        batch: Option<&Members>,
        waits: bool,
    ) -> impl Stream<Item = Outcome>
    where
        S: Stream,
        S::Item: Into<Submission<O>>,
    {
        submissions
            .map(Into::into)
            .ready_chunks(self.0.dispatch.limits.tasks)
            .map(move |group| self.submit_group::<O>(group, batch, waits))
            .buffered(GROUPS_UNDER_WAY)
            .flat_map(futures_util::stream::iter)
    }

    /// Submits tasks together, within one `publish_timeout`; `waits` asks for their results.
    pub(crate) async fn submit_group<O>(
        &self,
        submissions: Vec<Submission<O>>,
        batch: Option<&Members>,
        waits: bool,
    ) -> Vec<Outcome> {
        let by = self.deadline();
        let mut outcomes = Outcomes::with_capacity(submissions.len());
        let mut items = Vec::with_capacity(submissions.len());
        for submission in submissions {
            let chosen = submission.has_own_id();
            match submission.prepare(self.0.codec, batch.map(Members::key)) {
                Ok(Prepared { task, delay }) => {
                    let index = outcomes.push_accepted(task.id.clone());
                    items.push(Item { task, delay, tag: Tag { index, chosen } });
                }
                Err(error) => outcomes.push_error(error),
            }
        }
        self.remove_unroutable(&mut items, &mut outcomes, by).await;
        if waits && let Err(error) = self.expect_results(&mut items, &mut outcomes, by).await {
            outcomes.fail(&items, |_| error.clone());
            return outcomes.0;
        }
        self.send_items(items, &mut outcomes, batch, by).await;
        outcomes.0
    }

    /// Fails and removes the items whose queue does not exist.
    async fn remove_unroutable(&self, items: &mut Vec<Item>, outcomes: &mut Outcomes, by: Instant) {
        let mut known: Vec<(QueueName, Option<SubmitError>)> = vec![];
        for item in items.iter() {
            if known.iter().any(|(queue, _)| *queue == item.task.queue) {
                continue;
            }
            let missing = self.0.require_queue(&item.task.queue, by).await.err();
            known.push((item.task.queue.clone(), missing));
        }
        for (queue, missing) in known {
            if let Some(error) = missing {
                let unroutable = items.extract_if(.., |item| item.task.queue == queue);
                let unroutable: Vec<Item> = unroutable.collect();
                outcomes.fail(&unroutable, |_| error.clone());
            }
        }
    }

    /// Registers the waits for the results of all items, and addresses their replies.
    async fn expect_results(
        &self,
        items: &mut [Item],
        outcomes: &mut Outcomes,
        by: Instant,
    ) -> Result<(), SubmitError> {
        if items.is_empty() {
            return Ok(());
        }
        let replies = self.0.replies(by).await?;
        let queue = replies.queue(by).await?;
        let waiting = replies.expect_all(items.iter().map(|item| &item.task), &queue);
        let reply = queue.reply_to();
        for (item, waiting) in items.iter_mut().zip(waiting) {
            item.task.reply = Some(reply.clone());
            if let Some(Ok(submitted)) = outcomes.0.get_mut(item.tag.index) {
                submitted.waiting = Some(waiting);
            }
        }
        Ok(())
    }

    /// Publishes items in bundles and waits for all confirms.
    async fn send_items(
        &self,
        items: Vec<Item>,
        outcomes: &mut Outcomes,
        batch: Option<&Members>,
        by: Instant,
    ) {
        let dispatch = &self.0.dispatch;
        let mut under_way = FuturesUnordered::new();
        for items in dispatch.divide(items, UNMEASURED_BUNDLE) {
            under_way.push(async {
                let failed = dispatch.send(&items, by).await.err();
                // Counted at the confirm: the caller may drop this future and still seal the batch.
                if let Some(batch) = batch.filter(|_| failed.is_none()) {
                    for item in &items {
                        batch.count_in(&item.task.id, item.tag.chosen);
                    }
                }
                (items, failed)
            });
        }
        while let Some((items, failed)) = under_way.next().await {
            if let Some(error) = failed {
                outcomes.fail(&items, |id| submit_error(id, error.clone()));
            }
        }
    }
}

/// Outcomes in the order of the submissions; accepted ones are `Ok` until a later step fails.
struct Outcomes(Vec<Outcome>);

impl Outcomes {
    fn with_capacity(count: usize) -> Self {
        Self(Vec::with_capacity(count))
    }

    /// Adds a submission that was accepted, and returns its index.
    fn push_accepted(&mut self, id: TaskId) -> usize {
        self.0.push(Ok(Submitted { id, waiting: None }));
        self.0.len() - 1
    }

    /// Adds a submission that is not valid.
    fn push_error(&mut self, error: SubmitError) {
        self.0.push(Err(error));
    }

    fn fail(&mut self, items: &[Item], error: impl Fn(&TaskId) -> SubmitError) {
        for item in items {
            if let Some(outcome) = self.0.get_mut(item.tag.index) {
                *outcome = Err(error(&item.task.id));
            }
        }
    }
}
