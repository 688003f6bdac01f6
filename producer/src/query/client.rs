//! Sending queries to the collector and receiving its responses.
//!
//! Queries come in, response messages go out. Any number of queries can be under way; each finds
//! its response by its correlation id. A query expires when its caller stops waiting, so that a
//! collector that comes back later finds no backlog of old ones.

use std::sync::Arc;
use std::time::Duration;

use garenne_common::TaskId;
use garenne_common::broker::{BrokerError, Outgoing, Publisher};
use garenne_common::wire::{Malformed, Message, Query};
use tokio::time::{Instant, sleep_until};

use crate::QueryError;
use crate::deadline::left;
use crate::wait::replies::Replies;

/// How long a response is waited for, unless the caller says otherwise.
pub(crate) const QUERY_TIMEOUT: Duration = Duration::from_secs(5);
/// After this time without a response the query is sent again, because a collector that was killed
/// has taken its queries with it. Each expires after the same time, so that they do not pile up.
const RESEND_INTERVAL: Duration = Duration::from_secs(5);
/// The most ids in one query.
pub(crate) const MAX_IDS: usize = 1_000;

/// Sends queries to the collector.
pub(crate) struct QueryClient {
    publisher: Publisher,
    replies: Arc<Replies>,
    /// The collector's queue.
    queue: String,
}

impl QueryClient {
    pub(crate) fn new(publisher: Publisher, replies: Arc<Replies>, queue: String) -> Self {
        Self { publisher, replies, queue }
    }

    pub(crate) fn replies(&self) -> &Replies {
        &self.replies
    }

    /// Sends a query and waits at most `timeout` for its response. Sends it again if the reply
    /// queue changes or the response takes long.
    ///
    /// Sending it again is harmless: most queries change nothing, a replay contains the new ids and
    /// a purge the old ones, so each takes effect once.
    pub(crate) async fn send(
        &self,
        query: &Query,
        timeout: Duration,
    ) -> Result<Message, QueryError> {
        let by = Instant::now() + timeout;
        let correlation = TaskId::generate().to_string();
        let mut pending = self.replies.expect_response(correlation.clone());
        let mut queue = self.replies.watch_queue();
        loop {
            queue.mark_unchanged();
            let reply_to = self.replies.queue(by).await?.name;
            let again = Instant::now() + RESEND_INTERVAL;
            let expiration = u64::try_from(left(again.min(by)).as_millis()).unwrap_or(u64::MAX);
            self.publish(query.encode(&reply_to, &correlation, expiration), by).await?;
            tokio::select! {
                response = &mut pending.response => {
                    return response.map_err(|_| BrokerError::Closed.into());
                }
                changed = queue.changed() => changed.map_err(|_| BrokerError::Closed)?,
                () = sleep_until(by) => return Err(QueryError::NoCollector { waited: timeout }),
                () = sleep_until(again), if again < by => {}
            }
        }
    }

    async fn publish(&self, message: Message, by: Instant) -> Result<(), QueryError> {
        // The default exchange: its routing key is the queue's name.
        let outgoing =
            Outgoing { exchange: String::new(), routing_key: self.queue.clone(), message };
        Ok(self.publisher.publish_within(outgoing, left(by)).await?)
    }
}

/// The error for a response of another type than the query asks for.
pub(crate) fn unexpected(expected: &str) -> QueryError {
    QueryError::Malformed(Malformed(format!("unexpected response type: expected `{expected}`")))
}
