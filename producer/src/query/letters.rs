//! Dead letters: listing, replaying and purging them.
//!
//! Filters and ids come in, letters and outcomes go out. All of it is done by the collector. A
//! replay is durable when its response arrives: the collector marks the letter and stores the new
//! task in its outbox in one transaction.

use std::collections::VecDeque;
use std::time::Duration;

use futures_util::{Stream, stream};
use garenne_common::wire::{
    DeadCursor, DeadFilter, DeadPage, DeadSummary, Malformed, Purged, Query, ReplayItem,
    ReplayOutcome, ReplayPlan, Replayed, Response,
};
use garenne_common::{QueueName, TaskId};

use super::client::{MAX_IDS, QUERY_TIMEOUT, unexpected};
use crate::{Producer, QueryError, SubmitError};

/// Letters per page of a stream.
const PAGE: u32 = 500;
/// Letters per transaction of a replay: few, so that it delays results only briefly.
const REPLAY_SLICE: usize = 200;

impl Producer {
    /// The dead letters that match a filter, newest first.
    ///
    /// Pages are fetched while the stream is polled, so their number does not matter. Letters that
    /// are stored after the first page was fetched are not part of the stream. An error ends it.
    ///
    /// ```no_run
    /// # use garenne_producer::{Producer, QueryError};
    /// use futures_util::{TryStreamExt, pin_mut};
    /// use garenne_common::DeadReason;
    /// use garenne_common::wire::{DeadFilter, ReplayPlan};
    ///
    /// # async fn example(producer: &Producer) -> Result<(), QueryError> {
    /// let timed_out =
    ///     DeadFilter { reasons: vec![DeadReason::TimedOut], ..DeadFilter::default() };
    /// let letters: Vec<_> = producer.dead_letters(timed_out).try_collect().await?;
    /// let ids: Vec<_> = letters.into_iter().map(|letter| letter.id).collect();
    /// for replayed in producer.replay(&ids, &ReplayPlan::default()).await? {
    ///     println!("{}: {:?}", replayed.id, replayed.outcome);
    /// }
    /// # Ok(()) }
    /// ```
    pub fn dead_letters(
        &self,
        filter: DeadFilter,
    ) -> impl Stream<Item = Result<DeadSummary, QueryError>> {
        let start = Some(ListPosition { fetched: VecDeque::new(), from: None, ended: false });
        stream::try_unfold((self.clone(), filter, start), async |(producer, filter, walk)| {
            let Some(mut walk) = walk else { return Ok(None) };
            loop {
                if let Some(letter) = walk.fetched.pop_front() {
                    return Ok(Some((letter, (producer, filter, Some(walk)))));
                }
                if walk.ended {
                    return Ok(None);
                }
                let page = producer.dead_page(&filter, walk.from, PAGE).await?;
                walk.ended = page.next.is_none();
                walk.from = page.next;
                walk.fetched.extend(page.letters);
            }
        })
    }

    /// One page of dead letters: at most `limit` and at most 1,000. The first page also counts all
    /// matches.
    ///
    /// A page may be empty without being the last: then nothing was found within the time limit of
    /// a query. Continue from [`DeadPage::next`] until it is `None`.
    pub async fn dead_page(
        &self,
        filter: &DeadFilter,
        from: Option<DeadCursor>,
        limit: u32,
    ) -> Result<DeadPage, QueryError> {
        let (filter, count) = (filter.clone(), from.is_none());
        let query = Query::DeadList { limit, filter, from, count, whole: false };
        page_in(self.query(query).await?, from.is_none())
    }

    /// Submits dead letters again, and returns the outcome of each, in the order of `ids`.
    ///
    /// A replay is a new task with a new id, without batch, deadline and reply; its first attempt
    /// is number 1. A task with an unknown name has not ended, so it keeps all of these.
    ///
    /// Can be called again after an error: letters that were replayed before have the outcome
    /// [`ReplayOutcome::Already`], and nothing is replayed twice.
    pub async fn replay(
        &self,
        ids: &[TaskId],
        plan: &ReplayPlan,
    ) -> Result<Vec<Replayed>, QueryError> {
        self.replay_within(ids, plan, QUERY_TIMEOUT).await
    }

    /// [`replay`](Self::replay) with another time limit for each of its queries.
    pub async fn replay_within(
        &self,
        ids: &[TaskId],
        plan: &ReplayPlan,
        timeout: Duration,
    ) -> Result<Vec<Replayed>, QueryError> {
        if let Some(queue) = &plan.queue {
            self.require_replay_queue(queue).await?;
        }
        let mut done = Vec::with_capacity(ids.len());
        while let Some(rest) = ids.get(done.len()..).filter(|rest| !rest.is_empty()) {
            // The new ids are generated here, so that a query that is sent twice replays once.
            let items = rest
                .iter()
                .take(REPLAY_SLICE)
                .map(|id| ReplayItem { id: id.clone(), new_id: Some(TaskId::generate()) });
            let items: Vec<_> = items.collect();
            let query = Query::DeadReplay { letters: items.clone(), plan: plan.clone() };
            let Response::DeadReplay { letters } = self.query_within(query, timeout).await? else {
                return Err(unexpected("dead_replay"));
            };
            if letters.is_empty() {
                let problem = "a `dead_replay` response without letters".to_owned();
                return Err(QueryError::Malformed(Malformed(problem)));
            }
            done.extend(
                letters
                    .into_iter()
                    .zip(items)
                    .map(|(letter, item)| adopt_own_replay(letter, &item)),
            );
        }
        Ok(done)
    }

    /// Deletes dead letters. The final records of their tasks stay; a task with an unknown name
    /// ends as failed.
    pub async fn purge(&self, ids: &[TaskId]) -> Result<Purged, QueryError> {
        self.purge_within(ids, QUERY_TIMEOUT).await
    }

    /// [`purge`](Self::purge) with another time limit for each of its queries.
    pub async fn purge_within(
        &self,
        ids: &[TaskId],
        timeout: Duration,
    ) -> Result<Purged, QueryError> {
        let mut all = Purged::default();
        for slice in ids.chunks(MAX_IDS) {
            let query = Query::DeadPurge { ids: slice.to_vec() };
            let Response::DeadPurge { purged } = self.query_within(query, timeout).await? else {
                return Err(unexpected("dead_purge"));
            };
            all.purged += purged.purged;
            all.ended += purged.ended;
        }
        Ok(all)
    }

    async fn require_replay_queue(&self, queue: &QueueName) -> Result<(), QueryError> {
        match self.0.require_existing(queue, self.deadline()).await {
            Ok(()) => Ok(()),
            Err(SubmitError::Broker(error)) => Err(error.into()),
            Err(
                SubmitError::UnknownQueue { .. }
                | SubmitError::Invalid(_)
                | SubmitError::TooLarge { .. }
                | SubmitError::Unconfirmed { .. },
            ) => Err(QueryError::UnknownQueue { queue: queue.clone() }),
        }
    }
}

/// Position of a stream of dead letters.
struct ListPosition {
    fetched: VecDeque<DeadSummary>,
    from: Option<DeadCursor>,
    ended: bool,
}

/// An earlier send of the same query may have taken effect while its response was lost; then the
/// letter was replayed under our id.
fn adopt_own_replay(letter: Replayed, item: &ReplayItem) -> Replayed {
    if let ReplayOutcome::Already { new_id } = &letter.outcome
        && Some(new_id) == item.new_id.as_ref()
    {
        let (new_id, queue) = (new_id.clone(), String::new());
        return Replayed { id: letter.id, outcome: ReplayOutcome::Replayed { new_id, queue } };
    }
    letter
}

/// The page in a response. Collectors that are too old to filter do not count either.
fn page_in(response: Response, counted: bool) -> Result<DeadPage, QueryError> {
    let Response::DeadList { letters, total, more_than_total, next } = response else {
        return Err(unexpected("dead_list"));
    };
    if counted && total.is_none() {
        let old = "this collector is too old to filter dead letters; run garenne-collector of this \
                   version";
        return Err(QueryError::Refused(old.to_owned()));
    }
    Ok(DeadPage { letters, total, more_than_total, next })
}
