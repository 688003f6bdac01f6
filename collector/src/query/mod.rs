//! Responds to queries. Best effort: a client repeats a query without a response.
//!
//! Queries come in, and responses go to the reply queues of the clients. Nothing waits for confirms, and
//! nothing can delay commits.

use std::collections::BTreeMap;
use std::sync::Arc;

use garenne_common::broker::{Consumer, Delivery, Outgoing, Publisher, Settler};
use garenne_common::wire::{CancelRequest, Control, Message, Query, Report, Response, report};
use garenne_common::{Fingerprint, ReplyGate, TaskId, TaskResult, Timestamp};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

pub(crate) mod dead_letters;
pub(crate) mod refusal;

use crate::APP_ID;
use crate::query::dead_letters::DeadLetterQueries;
use crate::query::refusal::{MAX_ITEMS, Refusal};
use crate::store::{DeadQuery, ReplayLinks, Store};

/// Prefetch of queries; further ones wait in the broker and expire there.
pub(crate) const QUERIES_PREFETCH: u16 = 64;
/// Maximum number of cancel requests in one response; workers query the next page.
const CANCELS_PAGE: usize = 2_000;
/// Reasons of cancel requests are truncated to this number of characters.
const MAX_REASON_CHARS: usize = 500;
/// Maximum size of a response, well below the broker's limit for a message; clients query the rest.
const MAX_RESPONSE_BYTES: usize = 8 * 1024 * 1024;

/// Responds to one query after another.
pub(crate) struct QueryServer<S> {
    pub(crate) store: S,
    pub(crate) dead_letters: DeadLetterQueries<S>,
    pub(crate) queries: Consumer,
    pub(crate) publisher: Publisher,
    /// Which queues may receive responses.
    pub(crate) gate: ReplyGate,
    /// The exchange for broadcasts of cancel requests to workers.
    pub(crate) control: String,
    /// Wakes the task that ends cancelled parked tasks.
    pub(crate) cancelled: Arc<Notify>,
    pub(crate) stop: CancellationToken,
}

impl<S: Store> QueryServer<S> {
    pub(crate) async fn run(mut self) {
        let (stop, settler) = (self.stop.clone(), self.queries.settler());
        loop {
            let query = tokio::select! {
                () = stop.cancelled() => return,
                query = self.queries.next() => query,
            };
            let Some(query) = query else { return };
            tokio::select! {
                // A broker that blocks publishers must not prevent the stop.
                () = stop.cancelled() => return,
                () = self.handle(query, &settler) => {}
            }
        }
    }

    async fn handle(&self, query: Delivery, settler: &Settler) {
        // Acknowledged first, so that a query which cannot be processed is not redelivered for ever.
        settler.ack(query.tag, false);
        let properties = &query.message.properties;
        let Some(reply_to) = properties.reply_to.clone() else {
            tracing::debug!(app_id = properties.app_id, "query without reply_to");
            return;
        };
        if !self.gate.admits(&reply_to) {
            return;
        }
        let correlation_id = properties.correlation_id.clone().unwrap_or_default();
        let message = self.respond(&query.message, &correlation_id).await;
        let message = message.unwrap_or_else(|refusal| {
            tracing::debug!(%refusal, app_id = properties.app_id, "query refused");
            Response::Refused { error: refusal.to_string() }.encode(&correlation_id)
        });
        let outgoing = Outgoing { exchange: String::new(), routing_key: reply_to, message };
        if let Err(error) = self.publisher.send_and_forget(outgoing).await {
            tracing::debug!(%error, "response not sent");
        }
    }

    async fn respond(&self, message: &Message, correlation_id: &str) -> Result<Message, Refusal> {
        let store = &self.store;
        let response = match Query::decode(message)? {
            Query::Results { ids, fingerprints } => {
                return self.results(ids, &fingerprints, correlation_id).await;
            }
            Query::Task { id } => self.task(id).await?,
            Query::Batch { id } => Response::Batch { batch: store.batch(id).await? },
            Query::Dead { id } => {
                let attempts = store.attempts(id.clone()).await?;
                Response::Dead { letter: store.dead(id).await?, attempts }
            }
            Query::DeadList { limit, filter, from, count, whole } => {
                let limit = usize::try_from(limit).unwrap_or(MAX_ITEMS);
                self.dead_letters.list(DeadQuery { filter, from, limit, count, whole }).await?
            }
            Query::DeadBody { id, offset } => self.dead_letters.body(id, offset).await?,
            Query::DeadReplay { letters, plan } => self.dead_letters.replay(letters, plan).await?,
            Query::DeadPurge { ids } => self.dead_letters.purge(ids).await?,
            Query::Cancel { ids, reason } => self.cancel(ids, reason, message).await?,
            Query::CancelBatch { id, reason } => {
                let done = self.store.cancel_batch(id, reason_or_default(reason, message)).await?;
                self.broadcast(done.request.into_iter().collect()).await;
                Response::CancelBatch { state: done.state, batch: done.summary }
            }
            Query::AbandonBatch { id } => {
                if store.abandon_batch(id.clone()).await? {
                    tracing::warn!(batch = %id, by = message.properties.app_id, "batch abandoned on request");
                    self.dead_letters.outbox_filled.notify_one();
                }
                Response::Batch { batch: store.batch(id).await? }
            }
            Query::Cancels { after } => {
                let (requests, newest) = store.cancels(after, CANCELS_PAGE).await?;
                let more = requests.len() == CANCELS_PAGE;
                Response::Cancels { requests, more, newest }
            }
            Query::Stalled { quiet_ms } => {
                let quiet_since = Timestamp::now().as_millis().saturating_sub(quiet_ms);
                let stalled = store.stalled(Timestamp::from_millis(quiet_since)).await?;
                Response::Stalled { stalled }
            }
            Query::Totals => {
                let totals = store.totals().await?;
                Response::Totals {
                    results: totals.results,
                    repeats: totals.repeats,
                    dead: totals.dead,
                    batches: totals.batches,
                }
            }
        };
        Ok(response.encode(correlation_id))
    }

    async fn task(&self, id: TaskId) -> Result<Response, Refusal> {
        let state = self.store.task(id.clone()).await?;
        let ReplayLinks { replayed_as, replay_of } = self.store.replay_links(id).await?;
        Ok(Response::Task { state, replayed_as, replay_of })
    }

    async fn cancel(
        &self,
        ids: Vec<TaskId>,
        reason: Option<String>,
        query: &Message,
    ) -> Result<Response, Refusal> {
        if ids.len() > MAX_ITEMS {
            return Err(Refusal::TooMany(ids.len()));
        }
        let done = self.store.cancel(ids, reason_or_default(reason, query)).await?;
        self.broadcast(done.requests).await;
        Ok(Response::Cancel { tasks: done.tasks })
    }

    /// Broadcasts to all workers. Best effort: workers also query the list (`Query::Cancels`).
    async fn broadcast(&self, requests: Vec<CancelRequest>) {
        if requests.is_empty() {
            return;
        }
        let control = Control::Cancel(requests);
        let (routing_key, message) = (control.key().to_owned(), control.encode(APP_ID));
        let outgoing = Outgoing { exchange: self.control.clone(), routing_key, message };
        if let Err(error) = self.publisher.send_and_forget(outgoing).await {
            tracing::debug!(%error, "cancel requests not broadcast");
        }
        self.cancelled.notify_one();
    }

    async fn results(
        &self,
        ids: Vec<TaskId>,
        fingerprints: &BTreeMap<TaskId, Fingerprint>,
        correlation: &str,
    ) -> Result<Message, Refusal> {
        if ids.len() > MAX_ITEMS {
            return Err(Refusal::TooMany(ids.len()));
        }
        let results = self.store.results(ids, MAX_RESPONSE_BYTES).await?;
        let report = |result: TaskResult| match fingerprints.get(&result.id) {
            // Without a fingerprint the task is of a foreign client, and cannot be told apart.
            Some(queried) if result.fingerprint.is_some_and(|of| of != *queried) => {
                Report::Conflict { id: result.id, queried: *queried }
            }
            Some(_) | None => Report::Finished(result),
        };
        let reports: Vec<_> = results.into_iter().map(report).collect();
        let mut message = report::encode(&reports, APP_ID)?;
        message.properties.correlation_id = Some(correlation.to_owned());
        Ok(message)
    }
}

/// The reason of a cancel request, truncated.
fn reason_or_default(reason: Option<String>, query: &Message) -> String {
    let reason = reason.filter(|reason| !reason.trim().is_empty());
    let reason = reason.unwrap_or_else(|| {
        let by = query.properties.app_id.as_deref().unwrap_or("a client");
        format!("cancelled by {by}")
    });
    reason.chars().take(MAX_REASON_CHARS).collect()
}
