//! One queue of the worker, as far as settling goes.

use std::sync::{Mutex, MutexGuard, PoisonError};

use garenne_common::QueueName;
use garenne_common::broker::DeliveryTag;

use crate::acks::{Ack, Acks};

/// A queue, and which of its deliveries are unsettled.
#[derive(Debug)]
pub struct Lane {
    /// Its short name.
    pub queue: QueueName,
    acks: Mutex<Acks>,
}

impl Lane {
    /// A queue that has delivered nothing yet.
    pub fn new(queue: QueueName) -> Self {
        Self { queue, acks: Mutex::default() }
    }

    /// A delivery arrived; must be called before anything can settle it.
    pub fn delivered(&self, tag: DeliveryTag) {
        self.acks().delivered(tag);
    }

    /// A delivery turned out to be a bundle of so many tasks; must be called before any of them can be
    /// settled.
    pub fn divided(&self, tag: DeliveryTag, tasks: usize) {
        self.acks().divided(tag, tasks);
    }

    /// So many tasks of a delivery have confirmed successors.
    pub(super) fn done(&self, tag: DeliveryTag, tasks: usize) {
        self.acks().done(tag, tasks);
    }

    /// A delivery goes back; `false` if it is no longer here to go.
    pub(super) fn handed_back(&self, tag: DeliveryTag) -> bool {
        self.acks().handed_back(tag)
    }

    /// The acknowledgements of what is done, as few as are right.
    pub(super) fn take(&self) -> Vec<Ack> {
        self.acks().take()
    }

    fn acks(&self) -> MutexGuard<'_, Acks> {
        self.acks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
