//! Questions to the collector.
//!
//! Any number can be under way; each finds its answer by its correlation id. A question expires with
//! its asker's patience, so an absent collector finds no heap of old ones when it comes back.

use std::sync::Arc;
use std::time::Duration;

use garenne_common::TaskId;
use garenne_common::broker::{BrokerError, Outgoing, Publisher};
use garenne_common::wire::{Malformed, Message, Query};
use tokio::time::{Instant, sleep_until};

use crate::QueryError;
use crate::deadline::left;
use crate::replies::Replies;

/// How long an answer is waited for.
pub(crate) const ASK_DEADLINE: Duration = Duration::from_secs(5);
/// Without an answer for so long, the question is asked again: a collector that was killed has taken
/// its questions with it. Each expires after as long, so that they do not pile up meanwhile.
const ASK_AGAIN: Duration = Duration::from_secs(5);
/// The most ids in one [`Query::Results`].
pub(crate) const MOST_IDS: usize = 1_000;

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
        question: &Query,
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
        (question, expires): (&Query, Instant),
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

pub(crate) fn unexpected(expected: &str) -> QueryError {
    QueryError::Malformed(Malformed(format!("it is not about {expected}, as the question was")))
}
