//! One queue that this worker serves: its name, its waiting tasks, its unacknowledged deliveries.

use std::sync::Arc;

use garenne_common::QueueName;
use garenne_common::broker::{DeliveryTag, Settler};

use super::local_queue::LocalQueue;
use super::unacked::UnackedDeliveries;

/// Position of a queue among the queues that a worker serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct QueueIndex(pub usize);

/// A delivery of one of the worker's queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeliveryRef {
    /// The queue.
    pub queue: QueueIndex,
    /// The delivery.
    pub tag: DeliveryTag,
}

/// A queue that this worker serves.
pub(crate) struct ServedQueue {
    pub(crate) index: QueueIndex,
    pub(crate) name: QueueName,
    /// Tasks that wait for a permit.
    pub(crate) waiting: LocalQueue,
    /// Shared with the settlement core, which decides when to acknowledge.
    pub(crate) unacked: Arc<UnackedDeliveries>,
    /// Acknowledges and requeues.
    pub(crate) settler: Settler,
}

impl ServedQueue {
    pub(crate) fn new(index: QueueIndex, name: QueueName, settler: Settler) -> Self {
        let unacked = Arc::<UnackedDeliveries>::default();
        let waiting = LocalQueue::new(index, name.clone(), Arc::clone(&unacked));
        Self { index, name, waiting, unacked, settler }
    }

    /// Records a delivery; to be called before anything else is done with it.
    pub(crate) fn delivered(&self, tag: DeliveryTag) {
        self.unacked.delivered(tag);
        self.waiting.enter_epoch(tag.epoch);
    }

    pub(crate) fn reference(&self, tag: DeliveryTag) -> DeliveryRef {
        DeliveryRef { queue: self.index, tag }
    }
}
