//! Done notices as they come.
//!
//! Whoever listens hears what happens from then on, as long as the connection holds; after a loss the
//! subscription is renewed, and what was published meanwhile is not heard. So `batch.wait` asks, too.

use garenne_common::broker::{BrokerError, Consumer, ConsumerSpec, QueueSource};
use garenne_common::wire::Notice;
use garenne_common::{BatchId, TaskId};

use crate::deadline::until;
use crate::{Producer, QueryError};

/// Notices on their way here. The rest waits in the broker, however slow the listener.
const PREFETCH: u16 = 256;

/// Which notices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoticeFilter {
    /// Every one.
    All,
    /// That of one batch.
    Batch(BatchId),
    /// That of one task outside of batches.
    Task(TaskId),
}

/// A subscription; it ends when this is dropped.
pub struct Notices {
    consumer: Consumer,
    filter: NoticeFilter,
}

impl Producer {
    /// Subscribes. When this returns, the broker has the binding, and no later notice is missed.
    pub async fn notices(&self, filter: NoticeFilter) -> Result<Notices, QueryError> {
        let (by, link) = (self.deadline(), self.consume_link());
        // The consumer would try for ever; a first failure should be told at once and by name.
        until(by, "connection", link.open()).await?;
        let (topology, owner) = (self.topology().clone(), format!("notices.{}", self.owner()));
        let spec = ConsumerSpec {
            declarations: vec![],
            tag: format!("{} notices", self.owner()),
            queue: QueueSource::Exclusive {
                bindings: vec![(topology.notices_exchange(), filter.routing_key())],
                name: Box::new(move || topology.reply_queue(&owner)),
            },
            prefetch: PREFETCH,
            // Acknowledged, because otherwise the broker would send all it has to a slow listener.
            no_ack: false,
        };
        let consumer = Consumer::start(link, spec);
        until::<_, BrokerError>(by, "subscription", consumer.ready()).await?;
        Ok(Notices { consumer, filter })
    }
}

impl Notices {
    /// The next notice; `None` when the producer is closed. The same notice may come twice.
    ///
    /// Cancel-safe.
    pub async fn next(&mut self) -> Option<Notice> {
        loop {
            let delivery = self.consumer.next().await?;
            // At once, because an idle listener would reach the broker's consumer timeout. If it
            // fails, the channel is gone, and with it the queue and all it held.
            if !self.consumer.settler().ack(delivery.tag, false) {
                tracing::debug!("the subscription is being renewed");
            }
            match Notice::decode(&delivery.message) {
                Ok(notice) if self.filter.matches(&notice) => return Some(notice),
                Ok(_) => {}
                Err(problem) => tracing::warn!(%problem, "a notice cannot be read"),
            }
        }
    }
}

impl NoticeFilter {
    fn routing_key(&self) -> String {
        match self {
            Self::All => "#".to_owned(),
            Self::Batch(id) => Notice::batch_key(id),
            Self::Task(id) => Notice::task_key(id),
        }
    }

    /// A foreign id may hold `*` and `#`, and then its key is a pattern that others match as well.
    fn matches(&self, notice: &Notice) -> bool {
        match (self, notice) {
            (Self::All, _) => true,
            (Self::Batch(id), Notice::Batch(summary)) => summary.batch == *id,
            (Self::Task(id), Notice::Task(summary)) => summary.task == *id,
            (Self::Batch(_), Notice::Task(_)) | (Self::Task(_), Notice::Batch(_)) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use garenne_common::wire::TaskSummary;
    use garenne_common::{Status, TaskName, Timestamp};

    #[test]
    fn a_filter_lets_pass_what_it_names_and_nothing_else() {
        let id = TaskId::new("a.#").unwrap();
        let notice = |id: &TaskId| {
            Notice::Task(TaskSummary {
                task: id.clone(),
                name: TaskName::new("a.b").unwrap(),
                status: Status::Succeeded,
                reason: None,
                attempt: 1,
                worker: "w".into(),
                finished_at: Timestamp::from_millis(0),
            })
        };
        let filter = NoticeFilter::Task(id.clone());
        assert!(filter.matches(&notice(&id)));
        assert!(!filter.matches(&notice(&TaskId::new("a.other").unwrap())));
        assert!(!NoticeFilter::Batch(BatchId::new("a.#").unwrap()).matches(&notice(&id)));
        assert!(NoticeFilter::All.matches(&notice(&id)));
    }

    #[test]
    fn the_routing_key_is_that_of_the_notice() {
        let id = BatchId::new("b-1").unwrap();
        assert_eq!(NoticeFilter::Batch(id).routing_key(), "batch.b-1");
        assert_eq!(NoticeFilter::All.routing_key(), "#");
    }
}
