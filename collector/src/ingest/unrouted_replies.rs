//! Replies to the senders of tasks without a queue. Best effort: a sender can query the collector instead.

use garenne_common::broker::{Outgoing, Publisher};
use garenne_common::wire::{DeadLetter, Message, Report, report, task};
use garenne_common::{DeadReason, QueueName, ReplyFormat, ReplyGate, ReplyTo, TaskId, TaskResult};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::APP_ID;
use crate::ingest::group::{Group, Letter};

/// Maximum number of replies that wait for the publisher; further ones are dropped.
const WAITING_REPLIES: usize = 1_000;

/// Sends the replies that no worker sends: the task had no queue, or a cancelled or purged task was parked.
#[derive(Clone)]
pub(crate) struct UnroutedReplies {
    outgoing: mpsc::Sender<Outgoing>,
    pub(crate) gate: ReplyGate,
}

impl UnroutedReplies {
    /// The sender, and the receiver of replies to publish.
    pub(crate) fn channel(gate: ReplyGate) -> (Self, mpsc::Receiver<Outgoing>) {
        let (outgoing, to_send) = mpsc::channel(WAITING_REPLIES);
        (Self { outgoing, gate }, to_send)
    }

    /// Replies to the sender of a task that has ended here, if it asked for that.
    pub(crate) fn reply(&self, Letter { letter, result }: &Letter) {
        let Some(result) = result else { return };
        let reply = reply_for(letter, result).filter(|reply| self.gate.admits(&reply.routing_key));
        if reply.is_some_and(|reply| self.outgoing.try_send(reply).is_err()) {
            tracing::debug!(task = %result.id, "reply dropped");
        }
    }

    /// Replies to the senders of the unrouted tasks that this group has ended.
    pub(crate) fn reply_unrouted(&self, group: &Group, given_up: &[TaskId]) {
        for letter in &group.letters {
            let Some(result) = &letter.result else { continue };
            if letter.letter.reason == DeadReason::Unrouted && given_up.contains(&result.id) {
                self.reply(letter);
            }
        }
    }
}

/// Publishes replies until all senders are dropped.
pub(crate) async fn send_replies(
    mut replies: mpsc::Receiver<Outgoing>,
    publisher: Publisher,
    stop: CancellationToken,
) {
    let send_all = async {
        while let Some(reply) = replies.recv().await {
            if let Err(error) = publisher.send_and_forget(reply).await {
                tracing::debug!(%error, "reply not sent");
            }
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = send_all => {}
    }
}

fn reply_for(letter: &DeadLetter, result: &TaskResult) -> Option<Outgoing> {
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

/// Where the reply goes. An invalid task gets a plain reply if it asks for one.
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
        group.take(crate::ingest::group::Source::Unrouted, "cpu", &message, "me");
        group
    }

    fn sent(group: &Group, given_up: &[&str]) -> Option<Message> {
        let given_up: Vec<_> = given_up.iter().map(|id| TaskId::new(id).unwrap()).collect();
        let rule = ReplyRule::new(&Namespace::new("g").unwrap(), &[]);
        let (replies, mut outgoing) = UnroutedReplies::channel(ReplyGate::new(rule));
        replies.reply_unrouted(group, &given_up);
        outgoing.try_recv().ok().map(|outgoing| {
            assert_eq!(
                (outgoing.exchange.as_str(), outgoing.routing_key.as_str()),
                ("", "amq.gen-q")
            );
            outgoing.message
        })
    }

    #[test]
    fn replies_have_the_requested_format() {
        let plain = sent(&unrouted(None), &["t-1"]).unwrap();
        assert_eq!(plain.properties.kind.as_deref(), Some(report::REPLY_KIND));
        assert_eq!(plain.properties.correlation_id.as_deref(), Some("c"));
        let bundle = sent(&unrouted(Some("bundle")), &["t-1"]).unwrap();
        assert_eq!(report::decode(&bundle).unwrap().len(), 1);
        // Not a valid task, but its sender waits.
        assert!(sent(&unrouted(Some("smoke signals")), &["t-1"]).is_some());
    }

    #[test]
    fn queues_that_may_not_receive_replies_get_none() {
        for queue in ["g.results", "other.dead", "orders", "amq.rabbitmq.reply-to"] {
            assert_eq!(sent(&unrouted_to(queue, None), &["t-1"]), None, "{queue}");
        }
    }

    #[test]
    fn tasks_that_have_ended_otherwise_get_no_second_reply() {
        assert_eq!(sent(&unrouted(None), &[]), None);
    }
}
