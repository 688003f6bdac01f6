//! Many submissions at once, in as few messages as are right for the tasks and the workers.
//!
//! Tasks of one queue, priority and due time travel in bundles (docs/decisions/0017). How many in one
//! is decided by how long such tasks have taken so far ([`garenne_common::bundling`]), so that a bundle
//! is a small slice of work. The order of a submission is that of a single one ([`crate::producer`]);
//! each task has an outcome of its own.

use futures_util::stream::FuturesUnordered;
use futures_util::{Stream, StreamExt};
use garenne_common::broker::BrokerError;
use garenne_common::{QueueName, TaskId};
use tokio::time::Instant;

use crate::dispatch::Parcel;
use crate::error::submit_error;
use crate::replies::Waiting;
use crate::submission::Prepared;
use crate::{Batch, Handle, Producer, Submission, SubmitError};

/// Groups of submissions that are on their way at once in a stream.
const GROUPS_UNDER_WAY: usize = 8;
/// Of tasks whose time nobody knows yet so many go together: most tasks are quick, and a worker that
/// finds them slow hands them on.
const UNKNOWN: u32 = 200;

/// A task that is with the broker.
pub(crate) struct Submitted {
    pub(crate) id: TaskId,
    /// Where its result will arrive, if it was asked for.
    waiting: Option<Waiting>,
}

/// A task on its way, and what is to be known of it here.
type Item = Parcel<Tag>;

struct Tag {
    /// Its place among those it was submitted with.
    place: usize,
    /// Whether the caller chose the id, so that it may come twice.
    chosen: bool,
}

type Outcome = Result<Submitted, SubmitError>;

impl Producer {
    /// Submits several tasks together; the outcomes are in the order of the submissions.
    ///
    /// Tasks of one queue, priority and due time share messages, which makes this many times cheaper
    /// than as many calls of [`submit`](Self::submit). Each task keeps its own options, result and end.
    pub async fn submit_many<O, I>(&self, submissions: I) -> Vec<Result<Handle<O>, SubmitError>>
    where
        I: IntoIterator,
        I::Item: Into<Submission<O>>,
    {
        let submissions = submissions.into_iter().map(Into::into).collect();
        let outcomes = self.submit_group(submissions, None, true).await;
        outcomes.into_iter().map(|outcome| self.handle(outcome?)).collect()
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
        let outcomes = self.submit_group::<O>(submissions, None, false).await;
        outcomes.into_iter().map(|outcome| Ok(outcome?.id)).collect()
    }

    /// Submits everything that `submissions` yields; handles and errors come in the same order.
    ///
    /// What the stream has ready goes together, as in [`submit_many`](Self::submit_many), and nothing
    /// waits for company: a stream that yields one task now and then has each sent at once. A bounded
    /// number is under way. Nothing happens while the returned stream is not polled, and an error does
    /// not end it.
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

    /// [`submit_all`](Self::submit_all) without asking for results.
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
        // There is one, because it was asked for.
        let waiting = waiting.ok_or(BrokerError::Closed)?;
        Ok(Handle::new(id, waiting, self.clone()))
    }

    /// Submits what the stream has ready, group by group.
    pub(crate) fn submit_groups<O, S>(
        &self,
        submissions: S,
        batch: Option<&Batch>,
        waits: bool,
    ) -> impl Stream<Item = Outcome>
    where
        S: Stream,
        S::Item: Into<Submission<O>>,
    {
        submissions
            .map(Into::into)
            .ready_chunks(self.dispatch().limits.tasks)
            .map(move |group| self.submit_group::<O>(group, batch, waits))
            .buffered(GROUPS_UNDER_WAY)
            .flat_map(futures_util::stream::iter)
    }

    /// Submits tasks together, within one `publish_timeout`.
    pub(crate) async fn submit_group<O>(
        &self,
        submissions: Vec<Submission<O>>,
        batch: Option<&Batch>,
        waits: bool,
    ) -> Vec<Outcome> {
        let by = self.deadline();
        let mut outcomes = Outcomes::with_room_for(submissions.len());
        let mut items = Vec::with_capacity(submissions.len());
        for submission in submissions {
            let chosen = submission.has_own_id();
            match submission.prepare(self.codec(), batch.map(Batch::key)) {
                Ok(Prepared { task, delay }) => {
                    let place = outcomes.promise(task.id.clone());
                    items.push(Item { task, delay, tag: Tag { place, chosen } });
                }
                Err(error) => outcomes.refuse(error),
            }
        }
        if let Err(error) = self.address(&mut items, &mut outcomes, waits, by).await {
            outcomes.fail(&items, |_| error.clone());
            return outcomes.0;
        }
        let mut under_way = FuturesUnordered::new();
        for items in self.dispatch().divide(items, UNKNOWN) {
            under_way.push(async {
                let failed = self.dispatch().send(&items, by).await.err();
                // At the confirm: whoever drops the rest may still seal the batch.
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
        drop(under_way);
        outcomes.0
    }

    /// Looks for the queues, and gives each task its place in the replies; items without a queue fail.
    async fn address(
        &self,
        items: &mut Vec<Item>,
        outcomes: &mut Outcomes,
        waits: bool,
        by: Instant,
    ) -> Result<(), SubmitError> {
        let mut known: Vec<(QueueName, Option<SubmitError>)> = vec![];
        for item in items.iter() {
            if known.iter().any(|(queue, _)| *queue == item.task.queue) {
                continue;
            }
            let missing = self.require_queue(&item.task, by).await.err();
            known.push((item.task.queue.clone(), missing));
        }
        for (queue, missing) in known {
            if let Some(error) = missing {
                let lost = items.extract_if(.., |item| item.task.queue == queue);
                let lost: Vec<Item> = lost.collect();
                outcomes.fail(&lost, |_| error.clone());
            }
        }
        if !waits || items.is_empty() {
            return Ok(());
        }
        let replies = self.replies(by).await?;
        let queue = replies.queue(by).await?;
        let waiting = replies.expect_all(items.iter().map(|item| &item.task), &queue);
        let reply = queue.reply_to();
        for (item, waiting) in items.iter_mut().zip(waiting) {
            item.task.reply = Some(reply.clone());
            if let Some(Ok(submitted)) = outcomes.0.get_mut(item.tag.place) {
                submitted.waiting = Some(waiting);
            }
        }
        Ok(())
    }
}

/// Outcomes in the order of the submissions: promised, until something comes in between.
struct Outcomes(Vec<Outcome>);

impl Outcomes {
    fn with_room_for(count: usize) -> Self {
        Self(Vec::with_capacity(count))
    }

    /// The next submission is well so far; its place.
    fn promise(&mut self, id: TaskId) -> usize {
        self.0.push(Ok(Submitted { id, waiting: None }));
        self.0.len() - 1
    }

    fn refuse(&mut self, error: SubmitError) {
        self.0.push(Err(error));
    }

    fn fail(&mut self, items: &[Item], error: impl Fn(&TaskId) -> SubmitError) {
        for item in items {
            if let Some(outcome) = self.0.get_mut(item.tag.place) {
                *outcome = Err(error(&item.task.id));
            }
        }
    }
}
