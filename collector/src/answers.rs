//! Answers to questions, and the replies to tasks that found no queue: all of it best effort.
//!
//! Whoever asks, asks again if no answer comes; so nothing here waits for a confirm, and nothing here
//! can hold up the commits.

use std::sync::Arc;

use garenne_common::broker::{Consumer, Delivery, Outgoing, Publisher, Settler};
use garenne_common::wire::{
    Answer, CancelIntent, CodecError, Control, DeadLetter, Message, Question, Report, report, task,
};
use garenne_common::{
    DeadReason, QueueName, ReplyFormat, ReplyGate, ReplyTo, TaskId, TaskResult, Timestamp,
};
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;

use crate::group::{Group, Letter};
use crate::letters::Letters;
use crate::store::{DeadQuery, ReplayLinks, Store, StoreError};

/// What our messages say of who published them.
pub(crate) const APP_ID: &str = concat!("garenne-collector/", env!("CARGO_PKG_VERSION"));

/// Questions that wait here; more wait in the broker, and expire there.
pub(crate) const QUERIES_PREFETCH: u16 = 64;
/// A question names, and a list shows, at most so many.
const MAX_ITEMS: usize = 1_000;
/// Wishes to cancel in one answer; the worker asks for the next page.
const CANCELS_PAGE: usize = 2_000;
/// What is kept of the reason for a cancellation.
const MAX_REASON_CHARS: usize = 500;
/// An answer stays well below the broker's limit for a message; the asker asks again for the rest.
const MAX_ANSWER_BYTES: usize = 8 * 1024 * 1024;
/// Replies that wait for the publisher; more are dropped.
const WAITING_REPLIES: usize = 1_000;

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

#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    #[error(transparent)]
    Malformed(#[from] garenne_common::wire::Malformed),
    #[error("{0} ids are more than the {MAX_ITEMS} that one question may name")]
    TooMany(usize),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Encode(#[from] CodecError),
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
            Answer::Refused { error: refusal.to_string() }.encode(&correlation_id)
        });
        let outgoing = Outgoing { exchange: String::new(), routing_key: reply_to, message };
        if let Err(error) = self.publisher.send_and_forget(outgoing).await {
            tracing::debug!(%error, "an answer was not sent");
        }
    }

    async fn answer(&self, message: &Message, correlation_id: &str) -> Result<Message, Refusal> {
        let store = &self.store;
        let answer = match Question::decode(message)? {
            Question::Results { ids } => return self.results(ids, correlation_id).await,
            Question::Task { id } => self.task(id).await?,
            Question::Batch { id } => Answer::Batch { batch: store.batch(id).await? },
            Question::Dead { id } => {
                let attempts = store.attempts(id.clone()).await?;
                Answer::Dead { letter: store.dead(id).await?, attempts }
            }
            Question::DeadList { limit, filter, from, count, whole } => {
                let limit = usize::try_from(limit).unwrap_or(MAX_ITEMS);
                self.letters.list(DeadQuery { filter, from, limit, count, whole }).await?
            }
            Question::DeadBody { id, offset } => self.letters.body(id, offset).await?,
            Question::DeadReplay { letters, plan } => self.letters.replay(letters, plan).await?,
            Question::DeadPurge { ids } => self.letters.purge(ids).await?,
            Question::Cancel { ids, reason } => self.cancel(ids, reason, message).await?,
            Question::CancelBatch { id, reason } => {
                let done = self.store.cancel_batch(id, why(reason, message)).await?;
                self.broadcast(done.intent.into_iter().collect()).await;
                Answer::CancelBatch { state: done.state, batch: done.summary }
            }
            Question::AbandonBatch { id } => {
                if store.abandon_batch(id.clone()).await? {
                    tracing::warn!(batch = %id, by = message.properties.app_id, "abandoned as asked");
                    self.letters.outbox_filled.notify_one();
                }
                Answer::Batch { batch: store.batch(id).await? }
            }
            Question::Cancels { after } => {
                let (intents, newest) = store.cancels(after, CANCELS_PAGE).await?;
                let more = intents.len() == CANCELS_PAGE;
                Answer::Cancels { intents, more, newest }
            }
            Question::Standing { quiet_ms } => {
                let quiet_since = Timestamp::now().as_millis().saturating_sub(quiet_ms);
                let standing = store.standing(Timestamp::from_millis(quiet_since)).await?;
                Answer::Standing { standing }
            }
            Question::Totals => {
                let totals = store.totals().await?;
                Answer::Totals {
                    results: totals.results,
                    repeats: totals.repeats,
                    dead: totals.dead,
                    batches: totals.batches,
                }
            }
        };
        Ok(answer.encode(correlation_id))
    }

    async fn task(&self, id: TaskId) -> Result<Answer, Refusal> {
        let state = self.store.task(id.clone()).await?;
        let ReplayLinks { replayed_as, replay_of } = self.store.replay_links(id).await?;
        Ok(Answer::Task { state, replayed_as, replay_of })
    }

    async fn cancel(
        &self,
        ids: Vec<TaskId>,
        reason: Option<String>,
        asked: &Message,
    ) -> Result<Answer, Refusal> {
        if ids.len() > MAX_ITEMS {
            return Err(Refusal::TooMany(ids.len()));
        }
        let done = self.store.cancel(ids, why(reason, asked)).await?;
        self.broadcast(done.intents).await;
        Ok(Answer::Cancel { tasks: done.tasks })
    }

    /// Tells all workers. Best effort: whoever does not hear it asks for it (`Question::Cancels`).
    async fn broadcast(&self, intents: Vec<CancelIntent>) {
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

/// Tells those who wait for a task's reply that the task found no queue. Every other reply is the
/// worker's.
#[derive(Clone)]
pub(crate) struct Replies {
    outgoing: mpsc::Sender<Outgoing>,
    pub(crate) gate: ReplyGate,
}

impl Replies {
    /// The sending end, and what is to be published.
    pub(crate) fn channel(gate: ReplyGate) -> (Self, mpsc::Receiver<Outgoing>) {
        let (outgoing, to_send) = mpsc::channel(WAITING_REPLIES);
        (Self { outgoing, gate }, to_send)
    }

    /// Replies to whoever waits for a task that ended here, if anybody does.
    pub(crate) fn tell(&self, Letter { letter, result }: &Letter) {
        let Some(result) = result else { return };
        let reply = reply(letter, result).filter(|reply| self.gate.admits(&reply.routing_key));
        if reply.is_some_and(|reply| self.outgoing.try_send(reply).is_err()) {
            tracing::debug!(task = %result.id, "a reply was dropped");
        }
    }

    /// Replies to those unrouted tasks of a group that have ended by it.
    pub(crate) fn tell_unrouted(&self, group: &Group, given_up: &[TaskId]) {
        for letter in &group.letters {
            let Some(result) = &letter.result else { continue };
            if letter.letter.reason == DeadReason::Unrouted && given_up.contains(&result.id) {
                self.tell(letter);
            }
        }
    }
}

/// Publishes replies until no more can come.
pub(crate) async fn send_replies(
    mut replies: mpsc::Receiver<Outgoing>,
    publisher: Publisher,
    stop: CancellationToken,
) {
    let send_all = async {
        while let Some(reply) = replies.recv().await {
            if let Err(error) = publisher.send_and_forget(reply).await {
                tracing::debug!(%error, "a reply was not sent");
            }
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = send_all => {}
    }
}

fn reply(letter: &DeadLetter, result: &TaskResult) -> Option<Outgoing> {
    let ReplyTo { queue, correlation_id, format } = reply_to(&letter.message)?;
    let message = match format {
        ReplyFormat::Plain => report::encode_reply(result, correlation_id.as_deref(), APP_ID),
        ReplyFormat::Bundle => {
            let mut bundle = report::encode(&[Report::Finished(result.clone())], APP_ID).ok()?;
            bundle.properties.correlation_id = correlation_id;
            bundle
        }
    };
    Some(Outgoing { exchange: String::new(), routing_key: queue.to_string(), message })
}

/// As the task says; a message that is no sound task still gets the plain reply it asks for.
fn reply_to(message: &Message) -> Option<ReplyTo> {
    match task::decode(message, &QueueName::default()) {
        Ok(task) => task?.reply,
        Err(_) => message.properties.reply_to.clone().map(|queue| ReplyTo {
            queue: queue.into(),
            correlation_id: message.properties.correlation_id.clone(),
            format: ReplyFormat::Plain,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use garenne_common::wire::{HeaderValue, Properties};
    use garenne_common::{Namespace, ReplyRule, Timestamp};

    fn unrouted(format: Option<&str>) -> Group {
        unrouted_to("amq.gen-q", format)
    }

    fn unrouted_to(to: &str, format: Option<&str>) -> Group {
        let properties = Properties {
            kind: Some("a.b".to_owned()),
            message_id: Some("t-1".to_owned()),
            reply_to: Some(to.to_owned()),
            correlation_id: Some("c".to_owned()),
            ..Properties::default()
        };
        let mut message = Message { properties, headers: vec![], body: b"{}".to_vec().into() };
        if let Some(format) = format {
            message.set_header("x-garenne-reply-format", HeaderValue::Text(format.to_owned()));
        }
        let mut group = Group::new(Timestamp::from_millis(1));
        group.take(crate::group::Source::Unrouted, "cpu", &message, "me");
        group
    }

    fn told(group: &Group, given_up: &[&str]) -> Option<Message> {
        let given_up: Vec<_> = given_up.iter().map(|id| TaskId::new(id).unwrap()).collect();
        let rule = ReplyRule::new(&Namespace::new("g").unwrap(), &[]);
        let (replies, mut outgoing) = Replies::channel(ReplyGate::new(rule));
        replies.tell_unrouted(group, &given_up);
        outgoing.try_recv().ok().map(|outgoing| {
            assert_eq!(
                (outgoing.exchange.as_str(), outgoing.routing_key.as_str()),
                ("", "amq.gen-q")
            );
            outgoing.message
        })
    }

    #[test]
    fn an_unrouted_task_is_answered_in_the_form_it_asked_for() {
        let plain = told(&unrouted(None), &["t-1"]).unwrap();
        assert_eq!(plain.properties.kind.as_deref(), Some(report::REPLY_KIND));
        assert_eq!(plain.properties.correlation_id.as_deref(), Some("c"));
        let bundle = told(&unrouted(Some("bundle")), &["t-1"]).unwrap();
        assert_eq!(report::decode(&bundle).unwrap().len(), 1);
        // No sound task, but whoever sent it still waits.
        assert!(told(&unrouted(Some("smoke signals")), &["t-1"]).is_some());
    }

    #[test]
    fn a_queue_that_takes_no_replies_gets_none() {
        for queue in ["g.results", "other.dead", "orders", "amq.rabbitmq.reply-to"] {
            assert_eq!(told(&unrouted_to(queue, None), &["t-1"]), None, "{queue}");
        }
    }

    #[test]
    fn a_task_that_ended_otherwise_gets_no_second_reply() {
        assert_eq!(told(&unrouted(None), &[]), None);
    }
}
