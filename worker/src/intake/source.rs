//! How a task arrived: in a message of its own, or in a bundle with others.
//!
//! A task that leaves its bundle (to be retried, for instance) continues in the message that it would
//! have arrived in alone. Few tasks need that message, so it is built on demand.

use std::borrow::Cow;
use std::sync::Arc;

use garenne_common::TaskMessage;
use garenne_common::wire::{self, Message, lease};

use super::queue::DeliveryRef;

/// A task that has been delivered and not validated yet.
#[derive(Debug)]
pub struct Arrival {
    /// The delivery that it is settled by.
    pub delivery: DeliveryRef,
    /// Whether the broker has delivered the message before, to any consumer.
    pub redelivered: bool,
    /// What the delivery contains.
    pub source: TaskSource,
}

/// Where a task comes from.
#[derive(Debug, Clone)]
pub enum TaskSource {
    /// A message of its own, as it arrived: retries and dead letters keep what its sender wrote.
    Message(Box<Message>),
    /// A bundle.
    Bundle {
        /// The task, decoded.
        task: Arc<TaskMessage>,
        /// `app_id` of the bundle's sender.
        app_id: Arc<str>,
    },
}

impl TaskSource {
    /// The message of the task: its own, or the one that it would have had alone.
    pub fn message(&self) -> Cow<'_, Message> {
        match self {
            Self::Message(message) => Cow::Borrowed(message),
            Self::Bundle { task, app_id } => Cow::Owned(wire::task::encode(task, app_id)),
        }
    }

    /// The id of the task as its sender wrote it, for logs.
    pub(crate) fn id(&self) -> Option<&str> {
        match self {
            Self::Message(message) => message.properties.message_id.as_deref(),
            Self::Bundle { task, .. } => Some(task.id.as_str()),
        }
    }

    /// The number of the next execution under a lease.
    pub(crate) fn next_fence(&self) -> u64 {
        match self {
            // An unreadable fence counts as none: a lower fence costs a repetition and loses nothing.
            Self::Message(message) => lease::next_fence(message).unwrap_or(1),
            Self::Bundle { .. } => 1,
        }
    }
}
