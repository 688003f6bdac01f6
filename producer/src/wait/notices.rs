//! Done notices: a subscription to tasks and batches as they end.
//!
//! Notices come in from the notices exchange and go to the caller, from the subscription on and
//! while the connection holds. After a lost connection the subscription is renewed; notices that
//! are published in between are missed. Waiting for a batch therefore also queries the collector.

use garenne_common::broker::{BrokerError, Consumer, ConsumerSpec, QueueSource};
use garenne_common::wire::Notice;
use garenne_common::{BatchId, TaskId};

use crate::deadline::until;
use crate::{Producer, QueryError};

/// Notices buffered here; the broker keeps the others, however slow the reader is.
const PREFETCH: u16 = 256;

/// Which notices to receive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoticeFilter {
    /// All notices.
    All,
    /// The notice of one batch.
    Batch(BatchId),
    /// The notice of one task that belongs to no batch.
    Task(TaskId),
}

/// A subscription to done notices; dropping it ends it.
pub struct Notices {
    consumer: Consumer,
    filter: NoticeFilter,
}

impl Producer {
    /// Subscribes to done notices. Later ones are not missed, since the broker has the binding when
    /// this returns.
    ///
    /// Fails within `broker.publish_timeout` if the broker cannot be reached.
    pub async fn notices(&self, filter: NoticeFilter) -> Result<Notices, QueryError> {
        let (by, link) = (self.deadline(), self.0.consume_link.clone());
        // The consumer would retry forever; the first failure should be returned at once.
        until(by, "the connection", link.open()).await?;
        let (topology, owner) = (self.topology().clone(), format!("notices.{}", self.0.owner));
        let spec = ConsumerSpec {
            declarations: vec![],
            tag: format!("{} notices", self.0.owner),
            queue: QueueSource::Exclusive {
                bindings: vec![(topology.notices_exchange(), filter.routing_key())],
                name: Box::new(move || topology.reply_queue(&owner)),
            },
            prefetch: PREFETCH,
            // Acknowledged, because without acknowledgements the broker sends all it has to a slow
            // reader.
            no_ack: false,
        };
        let consumer = Consumer::start(link, spec);
        until::<_, BrokerError>(by, "the subscription", consumer.ready()).await?;
        Ok(Notices { consumer, filter })
    }
}

impl Notices {
    /// The next notice; `None` when the producer is closed. A notice may arrive twice.
    pub async fn next(&mut self) -> Option<Notice> {
        loop {
            let delivery = self.consumer.next().await?;
            // Acknowledged at once, because an idle reader would reach the broker's consumer
            // timeout. A failure means that the channel is gone, and with it the queue and
            // everything in it.
            if !self.consumer.settler().ack(delivery.tag, false) {
                tracing::debug!("the subscription is being renewed");
            }
            match Notice::decode(&delivery.message) {
                Ok(notice) if self.filter.matches(&notice) => return Some(notice),
                Ok(_) => {}
                Err(problem) => tracing::warn!(%problem, "ignoring a malformed notice"),
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

    /// Routing is not enough: an id of a foreign client may contain `*` and `#`, so that its key is
    /// a pattern that matches other notices too.
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
    fn a_filter_matches_only_the_notice_it_names() {
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
    fn a_filter_binds_the_routing_key_of_its_notice() {
        let id = BatchId::new("b-1").unwrap();
        assert_eq!(NoticeFilter::Batch(id).routing_key(), "batch.b-1");
        assert_eq!(NoticeFilter::All.routing_key(), "#");
    }
}
