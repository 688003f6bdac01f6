//! Replies to tasks that found no queue, best effort: whoever waits may ask the collector instead.

use garenne_common::broker::{Outgoing, Publisher};
use garenne_common::wire::{DeadLetter, Message, Report, report, task};
use garenne_common::{DeadReason, QueueName, ReplyFormat, ReplyGate, ReplyTo, TaskId, TaskResult};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::APP_ID;
use crate::group::{Group, Letter};

/// Replies that wait for the publisher; more are dropped.
const WAITING_REPLIES: usize = 1_000;

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
