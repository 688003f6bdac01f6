//! What to consume, what comes of it, and what a consumer shares with the task behind it.

use std::sync::{Mutex, PoisonError};

use lapin::Channel;
use tokio::sync::watch as watched;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::watch::{Flow, Health};
use super::{BrokerError, Link};
use crate::topology::Declaration;
use crate::wire::Message;

/// What to consume.
pub struct ConsumerSpec {
    /// Declared on every new channel, before consuming.
    pub declarations: Vec<Declaration>,
    /// From which queue.
    pub queue: QueueSource,
    /// How many deliveries may be unsettled at once. Quorum queues take at most 2,000 as such.
    pub prefetch: u16,
    /// The consumer tag that the management UI shows.
    pub tag: String,
    /// Whether the broker may forget deliveries at once; for events and replies.
    pub no_ack: bool,
}

/// Which queue a consumer reads.
pub enum QueueSource {
    /// A durable one.
    Named(String),
    /// An exclusive one, under a new name in every epoch, with bindings (exchange, routing key).
    ///
    /// A new name, because the broker may still hold the old one for the dead connection.
    Exclusive {
        /// Makes the names.
        name: Box<dyn Fn() -> String + Send + Sync>,
        /// What to bind it to.
        bindings: Vec<(String, String)>,
    },
}

/// One delivery of a message.
#[derive(Debug)]
pub struct Delivery {
    /// What to settle it by.
    pub tag: DeliveryTag,
    /// The routing key it was published with.
    pub routing_key: String,
    /// Whether the broker has delivered it before, to anybody.
    pub redelivered: bool,
    /// The message.
    pub message: Message,
}

/// A delivery's number within its epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeliveryTag {
    /// Which channel, counted from 1.
    pub epoch: u64,
    /// Which delivery of it, counted from 1.
    pub number: u64,
}

/// What a consumer shares with the task behind it.
pub(super) struct ConsumerState {
    pub(super) link: Link,
    current: Mutex<Epoch>,
    pub(super) queue: watched::Sender<Option<String>>,
    pub(super) trouble: watched::Sender<Option<BrokerError>>,
    pub(super) stop: CancellationToken,
    pub(super) paused: watched::Sender<bool>,
    pub(super) task: TaskTracker,
}

/// The life of one channel.
pub(super) struct Epoch {
    pub(super) number: u64,
    /// `None` between two epochs.
    pub(super) channel: Option<Channel>,
    pub(super) flow: Flow,
}

impl ConsumerState {
    pub(super) fn new(link: Link, prefetch: u16) -> Self {
        Self {
            link,
            current: Mutex::new(Epoch { number: 0, channel: None, flow: Flow::new(prefetch) }),
            queue: watched::Sender::new(None),
            trouble: watched::Sender::new(None),
            stop: CancellationToken::new(),
            paused: watched::Sender::new(false),
            task: TaskTracker::new(),
        }
    }

    pub(super) fn lock(&self) -> std::sync::MutexGuard<'_, Epoch> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn channel_of(&self, epoch: u64) -> Option<Channel> {
        let current = self.lock();
        current.channel.as_ref().filter(|_| current.number == epoch).cloned()
    }

    pub(super) fn settled(&self, tag: DeliveryTag, multiple: bool) {
        let mut current = self.lock();
        if current.number == tag.epoch {
            current.flow.settled(tag.number, multiple);
        }
    }

    pub(super) fn health(&self) -> Health {
        if self.queue.borrow().is_some() {
            return Health::Flowing(self.lock().flow.proven().elapsed());
        }
        Health::Down(self.trouble.borrow().clone())
    }
}
