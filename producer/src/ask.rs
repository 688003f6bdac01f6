//! Questions to the collector.
//!
//! Any number can be under way; each finds its answer by its correlation id. A question expires with
//! its asker's patience, so an absent collector finds no heap of old ones when it comes back.

use std::sync::Arc;
use std::time::Duration;

use garenne_common::broker::{BrokerError, Outgoing, Publisher};
use garenne_common::wire::report::{self, BUNDLE_KIND};
use garenne_common::wire::{
    Answer, BatchStatus, DeadFilter, DeadSummary, Malformed, Message, Question, Report, TaskState,
};
use garenne_common::{BatchId, TaskId, TaskResult};
use tokio::time::{Instant, sleep_until};

use crate::producer::left;
use crate::replies::Replies;
use crate::{Producer, QueryError};

/// How long an answer is waited for.
pub(crate) const ASK_DEADLINE: Duration = Duration::from_secs(5);
/// Without an answer for so long, the question is asked again: a collector that was killed has taken
/// its questions with it. Each expires after as long, so that they do not pile up meanwhile.
const ASK_AGAIN: Duration = Duration::from_secs(5);
/// The most ids in one [`Question::Results`].
pub(crate) const MOST_IDS: usize = 1_000;

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
    /// [`Question::Results`] is not answered by an [`Answer`]; use [`results`](Self::results).
    pub async fn ask(&self, question: Question) -> Result<Answer, QueryError> {
        self.ask_within(question, ASK_DEADLINE).await
    }

    /// [`ask`](Self::ask) with another patience.
    pub async fn ask_within(
        &self,
        question: Question,
        patience: Duration,
    ) -> Result<Answer, QueryError> {
        let message = self.asker(patience).await?.ask(&question, patience).await?;
        let answer = Answer::decode(&message)?;
        if let Answer::Refused { error } = answer {
            return Err(QueryError::Refused(error));
        }
        Ok(answer)
    }

    /// How a task stands.
    pub async fn task_state(&self, id: &TaskId) -> Result<TaskState, QueryError> {
        let answer = self.ask(Question::Task { id: id.clone() }).await?;
        let Answer::Task { state, .. } = answer else { return Err(unexpected("a task")) };
        Ok(state)
    }

    /// How a batch stands; `None` if the collector has not heard of it.
    pub async fn batch_status(&self, id: &BatchId) -> Result<Option<BatchStatus>, QueryError> {
        let answer = self.ask(Question::Batch { id: id.clone() }).await?;
        let Answer::Batch { batch } = answer else { return Err(unexpected("a batch")) };
        Ok(batch)
    }

    /// The final results of these tasks, as far as they have ended.
    pub async fn results(&self, ids: &[TaskId]) -> Result<Vec<TaskResult>, QueryError> {
        let asker = self.asker(ASK_DEADLINE).await?;
        let mut results = vec![];
        for slice in ids.chunks(MOST_IDS) {
            let question = Question::Results { ids: slice.to_vec() };
            let message = asker.ask(&question, ASK_DEADLINE).await?;
            results.extend(results_in(&message)?);
        }
        Ok(results)
    }

    /// Totals since the collector's store was made.
    pub async fn totals(&self) -> Result<Totals, QueryError> {
        let answer = self.ask(Question::Totals).await?;
        let Answer::Totals { results, repeats, dead, batches } = answer else {
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
        let answer = self.ask(Question::Dead { id: id.clone() }).await?;
        let Answer::Dead { letter, .. } = answer else { return Err(unexpected("a dead letter")) };
        Ok(letter)
    }

    async fn asker(&self, patience: Duration) -> Result<Asker, QueryError> {
        let replies = self.replies(Instant::now() + patience).await?;
        Ok(self.asker_for(replies))
    }
}

/// What it takes to ask.
pub(crate) struct Asker {
    publisher: Publisher,
    replies: Arc<Replies>,
    /// The queue of questions.
    queries: String,
}

impl Asker {
    pub(crate) fn new(publisher: Publisher, replies: Arc<Replies>, queries: String) -> Self {
        Self { publisher, replies, queries }
    }

    pub(crate) fn replies(&self) -> &Replies {
        &self.replies
    }

    /// Asks, and asks again if the reply queue changes or the answer is long in coming. Most questions
    /// change nothing; a replay names the new ids and a purge the old ones, so that they happen once.
    pub(crate) async fn ask(
        &self,
        question: &Question,
        patience: Duration,
    ) -> Result<Message, QueryError> {
        let by = Instant::now() + patience;
        let correlation = TaskId::generate().to_string();
        let mut asking = self.replies.expect_answer(correlation.clone());
        let mut queue = self.replies.watch_queue();
        loop {
            queue.mark_unchanged();
            let reply_to = self.replies.queue(by).await?.name;
            let again = Instant::now() + ASK_AGAIN;
            self.send((question, again.min(by)), &reply_to, &correlation, by).await?;
            tokio::select! {
                answer = &mut asking.answer => {
                    return answer.map_err(|_| BrokerError::Closed.into());
                }
                changed = queue.changed() => changed.map_err(|_| BrokerError::Closed)?,
                () = sleep_until(by) => return Err(QueryError::NoCollector { waited: patience }),
                () = sleep_until(again), if again < by => {}
            }
        }
    }

    async fn send(
        &self,
        (question, expires): (&Question, Instant),
        reply_to: &str,
        correlation: &str,
        by: Instant,
    ) -> Result<(), QueryError> {
        let millis = u64::try_from(left(expires).as_millis()).unwrap_or(u64::MAX);
        let message = question.encode(reply_to, correlation, millis);
        // The default exchange: its routing key is the queue's name.
        let outgoing =
            Outgoing { exchange: String::new(), routing_key: self.queries.clone(), message };
        Ok(self.publisher.publish_within(outgoing, left(by)).await?)
    }
}

fn results_in(message: &Message) -> Result<Vec<TaskResult>, QueryError> {
    if message.properties.kind.as_deref() != Some(BUNDLE_KIND) {
        let Answer::Refused { error } = Answer::decode(message)? else {
            return Err(unexpected("results"));
        };
        return Err(QueryError::Refused(error));
    }
    let results = report::decode(message)?.into_iter().filter_map(|report| match report {
        Report::Finished(result) => Some(result),
        Report::Retrying(_)
        | Report::BatchOpened { .. }
        | Report::BatchSealed { .. }
        | Report::Lease(_)
        | Report::FinishedUnderLease { .. } => None,
    });
    Ok(results.collect())
}

pub(crate) fn unexpected(expected: &str) -> QueryError {
    QueryError::Malformed(Malformed(format!("it is not about {expected}, as the question was")))
}
