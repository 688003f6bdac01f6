//! Dead letters: find them, send them again, forget them.
//!
//! All of it is asked of the collector. A replay is durable when its answer is here: the letter is
//! marked and its successor waits in the collector's outbox, in one transaction.

use std::collections::VecDeque;
use std::time::Duration;

use futures_util::{Stream, stream};
use garenne_common::TaskId;
use garenne_common::wire::{
    DeadCursor, DeadFilter, DeadPage, DeadSummary, Purged, Query, ReplayItem, ReplayOutcome,
    ReplayPlan, Replayed, Response,
};

use crate::ask::{ASK_DEADLINE, MOST_IDS, unexpected};
use crate::{Producer, QueryError};

/// Letters on one page of a stream.
const PAGE: u32 = 500;
/// Letters in one transaction of a replay: few, so that results wait only a moment for it.
const REPLAY_SLICE: usize = 200;

impl Producer {
    /// The dead letters that a filter lets pass, newest first.
    ///
    /// Fetched page by page while the stream is polled, so any number of them may be read. What dies
    /// after the stream's first page is no part of it. An error ends it.
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
        let start = Some(Walk { fetched: VecDeque::new(), from: None, ended: false });
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

    /// One page of them, at most `limit` and at most 1,000 letters; the first page also counts.
    ///
    /// A page may be empty and not the last: then nothing was found within the time that one question
    /// may take. Go on from [`DeadPage::next`] until there is none.
    pub async fn dead_page(
        &self,
        filter: &DeadFilter,
        from: Option<DeadCursor>,
        limit: u32,
    ) -> Result<DeadPage, QueryError> {
        let (filter, count) = (filter.clone(), from.is_none());
        let question = Query::DeadList { limit, filter, from, count, whole: false };
        page_in(self.ask(question).await?, from.is_none())
    }

    /// Sends dead letters to the workers again, and says of each what became of it.
    ///
    /// A replay is a new task with an id of its own, without batch, deadline and reply; its first
    /// attempt is number 1. A task of an unknown name has not ended, so it keeps all of these.
    ///
    /// After an error call it again: what was replayed already is answered with
    /// [`ReplayOutcome::Already`], and nothing is replayed twice.
    pub async fn replay(
        &self,
        ids: &[TaskId],
        plan: &ReplayPlan,
    ) -> Result<Vec<Replayed>, QueryError> {
        self.replay_within(ids, plan, ASK_DEADLINE).await
    }

    /// [`replay`](Self::replay) with another patience for each of its questions.
    pub async fn replay_within(
        &self,
        ids: &[TaskId],
        plan: &ReplayPlan,
        patience: Duration,
    ) -> Result<Vec<Replayed>, QueryError> {
        if let Some(queue) = &plan.queue {
            self.require_queue_of_replay(queue).await?;
        }
        let mut done = Vec::with_capacity(ids.len());
        while let Some(rest) = ids.get(done.len()..).filter(|rest| !rest.is_empty()) {
            // Named here, so that a question asked twice replays once.
            let items = rest
                .iter()
                .take(REPLAY_SLICE)
                .map(|id| ReplayItem { id: id.clone(), new_id: Some(TaskId::generate()) });
            let items: Vec<_> = items.collect();
            let question = Query::DeadReplay { letters: items.clone(), plan: plan.clone() };
            let answer = self.ask_within(question, patience).await?;
            let Response::DeadReplay { letters } = answer else {
                return Err(unexpected("replays"));
            };
            if letters.is_empty() {
                return Err(unexpected("as many replays"));
            }
            done.extend(letters.into_iter().zip(items).map(|(letter, item)| ours(letter, &item)));
        }
        Ok(done)
    }

    /// Deletes dead letters. Their tasks stay ended; a task of an unknown name ends by this.
    pub async fn purge(&self, ids: &[TaskId]) -> Result<Purged, QueryError> {
        self.purge_within(ids, ASK_DEADLINE).await
    }

    /// [`purge`](Self::purge) with another patience for each of its questions.
    pub async fn purge_within(
        &self,
        ids: &[TaskId],
        patience: Duration,
    ) -> Result<Purged, QueryError> {
        let mut all = Purged::default();
        for slice in ids.chunks(MOST_IDS) {
            let question = Query::DeadPurge { ids: slice.to_vec() };
            let answer = self.ask_within(question, patience).await?;
            let Response::DeadPurge { purged } = answer else { return Err(unexpected("a purge")) };
            all.purged += purged.purged;
            all.ended += purged.ended;
        }
        Ok(all)
    }
}

struct Walk {
    fetched: VecDeque<DeadSummary>,
    from: Option<DeadCursor>,
    ended: bool,
}

/// The answer to the question before may have been lost after it took effect.
fn ours(letter: Replayed, item: &ReplayItem) -> Replayed {
    if let ReplayOutcome::Already { new_id } = &letter.outcome
        && Some(new_id) == item.new_id.as_ref()
    {
        let (new_id, queue) = (new_id.clone(), String::new());
        return Replayed { id: letter.id, outcome: ReplayOutcome::Replayed { new_id, queue } };
    }
    letter
}

/// A page of letters; an older collector knows no filters and no pages, and says no total.
fn page_in(answer: Response, counted: bool) -> Result<DeadPage, QueryError> {
    let Response::DeadList { letters, total, more_than_total, next } = answer else {
        return Err(unexpected("dead letters"));
    };
    if counted && total.is_none() {
        let old = "this collector is too old to filter dead letters; run the garenne-collector of \
                   this version";
        return Err(QueryError::Refused(old.to_owned()));
    }
    Ok(DeadPage { letters, total, more_than_total, next })
}
