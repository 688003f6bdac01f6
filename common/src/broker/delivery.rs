//! What to consume, the deliveries that result, and the state that a consumer shares with its task.

use lapin::Channel;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::queue_monitor::{DeliveryFlow, Health};
use super::{BrokerError, Link};
use crate::topology::Declaration;
use crate::wire::Message;

/// What to consume.
pub struct ConsumerSpec {
    /// Declared on every new channel, before consuming.
    pub declarations: Vec<Declaration>,
    /// The queue.
    pub queue: QueueSource,
    /// The most deliveries that may be unsettled at once. Quorum queues limit it to 2,000.
    pub prefetch: u16,
    /// The consumer tag, shown by the management UI.
    pub tag: String,
    /// Whether the broker forgets deliveries as it sends them; for events and replies.
    pub no_ack: bool,
}

/// Which queue a consumer reads.
pub enum QueueSource {
    /// A durable queue of this name.
    Named(String),
    /// An exclusive queue with a new name in every epoch, because the broker may still hold the old
    /// one for the dead connection.
    Exclusive {
        /// Generates the names.
        name: Box<dyn Fn() -> String + Send + Sync>,
        /// Its bindings, each an exchange and a routing key.
        bindings: Vec<(String, String)>,
    },
}

/// One delivery of a message.
#[derive(Debug)]
pub struct Delivery {
    /// Identifies the delivery when it is settled.
    pub tag: DeliveryTag,
    /// The routing key with which the message was published.
    pub routing_key: String,
    /// Whether the broker has delivered the message before, to any consumer.
    pub redelivered: bool,
    /// The message.
    pub message: Message,
}

/// A delivery's number within its epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeliveryTag {
    /// The number of the channel, from 1.
    pub epoch: u64,
    /// The number of the delivery on its channel, from 1.
    pub number: u64,
}

/// The state that a consumer, its settlers and its task share.
pub(super) struct ConsumerState {
    pub(super) link: Link,
    current: Mutex<Epoch>,
    /// The queue consumed at present; `None` while there is no consumer.
    pub(super) queue: watch::Sender<Option<String>>,
    /// Why there is no consumer at present.
    pub(super) error: watch::Sender<Option<BrokerError>>,
    pub(super) stop: CancellationToken,
    pub(super) paused: watch::Sender<bool>,
    pub(super) task: TaskTracker,
}

/// The lifetime of one channel.
pub(super) struct Epoch {
    pub(super) number: u64,
    /// `None` between two epochs.
    pub(super) channel: Option<Channel>,
    pub(super) flow: DeliveryFlow,
}

impl ConsumerState {
    pub(super) fn new(link: Link, prefetch: u16) -> Self {
        let epoch = Epoch { number: 0, channel: None, flow: DeliveryFlow::new(prefetch) };
        Self {
            link,
            current: Mutex::new(epoch),
            queue: watch::Sender::new(None),
            error: watch::Sender::new(None),
            stop: CancellationToken::new(),
            paused: watch::Sender::new(false),
            task: TaskTracker::new(),
        }
    }

    pub(super) fn epoch(&self) -> MutexGuard<'_, Epoch> {
        self.current.lock()
    }

    /// The channel of this epoch, if it is the current one.
    pub(super) fn channel_of(&self, number: u64) -> Option<Channel> {
        let epoch = self.epoch();
        epoch.channel.as_ref().filter(|_| epoch.number == number).cloned()
    }

    /// Notes that a delivery was settled, or with `multiple` also all earlier ones.
    pub(super) fn note_settled(&self, tag: DeliveryTag, multiple: bool) {
        let mut epoch = self.epoch();
        if epoch.number == tag.epoch {
            epoch.flow.settled(tag.number, multiple);
        }
    }

    pub(super) fn health(&self) -> Health {
        if self.queue.borrow().is_some() {
            return Health::Flowing(self.epoch().flow.proven_at().elapsed());
        }
        Health::Down(self.error.borrow().clone())
    }
}
