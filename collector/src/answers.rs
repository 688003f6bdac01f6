//! Answers to questions, best effort.
//!
//! Whoever asks, asks again if no answer comes; so nothing here waits for a confirm, and nothing here
//! can hold up the commits.

use std::sync::Arc;

use garenne_common::broker::{Consumer, Delivery, Outgoing, Publisher, Settler};
use garenne_common::wire::{CancelRequest, Control, Message, Query, Report, Response, report};
use garenne_common::{ReplyGate, TaskId, Timestamp};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::APP_ID;
use crate::letters::Letters;
use crate::refusal::{MAX_ITEMS, Refusal};
use crate::store::{DeadQuery, ReplayLinks, Store};

/// Questions that wait here; more wait in the broker, and expire there.
pub(crate) const QUERIES_PREFETCH: u16 = 64;
/// Wishes to cancel in one answer; the worker asks for the next page.
const CANCELS_PAGE: usize = 2_000;
/// What is kept of the reason for a cancellation.
const MAX_REASON_CHARS: usize = 500;
/// An answer stays well below the broker's limit for a message; the asker asks again for the rest.
const MAX_ANSWER_BYTES: usize = 8 * 1024 * 1024;

/// Answers one question after the other.
pub(crate) struct Answers<S> {
    pub(crate) store: S,
    pub(crate) letters: Letters<S>,
    pub(crate) questions: Consumer,
    pub(crate) publisher: Publisher,
    /// Which queues take answers.
    pub(crate) gate: ReplyGate,
    /// The exchange by which workers hear of wishes to cancel.
    pub(crate) control: String,
    /// Wakes whoever ends cancelled tasks that no worker has.
    pub(crate) cancelled: Arc<Notify>,
    pub(crate) stop: CancellationToken,
}

impl<S: Store> Answers<S> {
    pub(crate) async fn run(mut self) {
        let (stop, settler) = (self.stop.clone(), self.questions.settler());
        loop {
            let question = tokio::select! {
                () = stop.cancelled() => return,
                question = self.questions.next() => question,
            };
            let Some(question) = question else { return };
            tokio::select! {
                // A blocked broker takes no answer; that must not keep us from stopping.
                () = stop.cancelled() => return,
                () = self.handle(question, &settler) => {}
            }
        }
    }

    async fn handle(&self, question: Delivery, settler: &Settler) {
        // Acknowledged first: a question that cannot be answered must not come again for ever.
        settler.ack(question.tag, false);
        let properties = &question.message.properties;
        let Some(reply_to) = properties.reply_to.clone() else {
            tracing::debug!(app_id = properties.app_id, "a question without reply_to");
            return;
        };
        if !self.gate.admits(&reply_to) {
            return;
        }
        let correlation_id = properties.correlation_id.clone().unwrap_or_default();
        let message = self.answer(&question.message, &correlation_id).await;
        let message = message.unwrap_or_else(|refusal| {
            tracing::debug!(%refusal, app_id = properties.app_id, "a question was refused");
            Response::Refused { error: refusal.to_string() }.encode(&correlation_id)
        });
        let outgoing = Outgoing { exchange: String::new(), routing_key: reply_to, message };
        if let Err(error) = self.publisher.send_and_forget(outgoing).await {
            tracing::debug!(%error, "an answer was not sent");
        }
    }

    async fn answer(&self, message: &Message, correlation_id: &str) -> Result<Message, Refusal> {
        let store = &self.store;
        let answer = match Query::decode(message)? {
            Query::Results { ids } => return self.results(ids, correlation_id).await,
            Query::Task { id } => self.task(id).await?,
            Query::Batch { id } => Response::Batch { batch: store.batch(id).await? },
            Query::Dead { id } => {
                let attempts = store.attempts(id.clone()).await?;
                Response::Dead { letter: store.dead(id).await?, attempts }
            }
            Query::DeadList { limit, filter, from, count, whole } => {
                let limit = usize::try_from(limit).unwrap_or(MAX_ITEMS);
                self.letters.list(DeadQuery { filter, from, limit, count, whole }).await?
            }
            Query::DeadBody { id, offset } => self.letters.body(id, offset).await?,
            Query::DeadReplay { letters, plan } => self.letters.replay(letters, plan).await?,
            Query::DeadPurge { ids } => self.letters.purge(ids).await?,
            Query::Cancel { ids, reason } => self.cancel(ids, reason, message).await?,
            Query::CancelBatch { id, reason } => {
                let done = self.store.cancel_batch(id, why(reason, message)).await?;
                self.broadcast(done.intent.into_iter().collect()).await;
                Response::CancelBatch { state: done.state, batch: done.summary }
            }
            Query::AbandonBatch { id } => {
                if store.abandon_batch(id.clone()).await? {
                    tracing::warn!(batch = %id, by = message.properties.app_id, "abandoned as asked");
                    self.letters.outbox_filled.notify_one();
                }
                Response::Batch { batch: store.batch(id).await? }
            }
            Query::Cancels { after } => {
                let (intents, newest) = store.cancels(after, CANCELS_PAGE).await?;
                let more = intents.len() == CANCELS_PAGE;
                Response::Cancels { requests: intents, more, newest }
            }
            Query::Stalled { quiet_ms } => {
                let quiet_since = Timestamp::now().as_millis().saturating_sub(quiet_ms);
                let standing = store.standing(Timestamp::from_millis(quiet_since)).await?;
                Response::Stalled { stalled: standing }
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
        Ok(answer.encode(correlation_id))
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
        asked: &Message,
    ) -> Result<Response, Refusal> {
        if ids.len() > MAX_ITEMS {
            return Err(Refusal::TooMany(ids.len()));
        }
        let done = self.store.cancel(ids, why(reason, asked)).await?;
        self.broadcast(done.intents).await;
        Ok(Response::Cancel { tasks: done.tasks })
    }

    /// Tells all workers. Best effort: whoever does not hear it asks for it (`Query::Cancels`).
    async fn broadcast(&self, intents: Vec<CancelRequest>) {
        if intents.is_empty() {
            return;
        }
        let control = Control::Cancel(intents);
        let (routing_key, message) = (control.key().to_owned(), control.encode(APP_ID));
        let outgoing = Outgoing { exchange: self.control.clone(), routing_key, message };
        if let Err(error) = self.publisher.send_and_forget(outgoing).await {
            tracing::debug!(%error, "a cancellation was not broadcast");
        }
        self.cancelled.notify_one();
    }

    async fn results(&self, ids: Vec<TaskId>, correlation: &str) -> Result<Message, Refusal> {
        if ids.len() > MAX_ITEMS {
            return Err(Refusal::TooMany(ids.len()));
        }
        let results = self.store.results(ids, MAX_ANSWER_BYTES).await?;
        let reports: Vec<_> = results.into_iter().map(Report::Finished).collect();
        let mut message = report::encode(&reports, APP_ID)?;
        message.properties.correlation_id = Some(correlation.to_owned());
        Ok(message)
    }
}

/// The reason that people will see, of a bounded length.
fn why(reason: Option<String>, asked: &Message) -> String {
    let reason = reason.filter(|reason| !reason.trim().is_empty());
    let reason = reason.unwrap_or_else(|| {
        let by = asked.properties.app_id.as_deref().unwrap_or("somebody");
        format!("cancelled by {by}")
    });
    reason.chars().take(MAX_REASON_CHARS).collect()
}
