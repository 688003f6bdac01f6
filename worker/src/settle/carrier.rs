//! What a task came in: a message of its own, or a bundle together with others.
//!
//! A task that leaves its bundle (for a retry, say) does so in the message that it would have come in
//! alone. Most never need it, so it is made when it is asked for.

use std::borrow::Cow;
use std::sync::Arc;

use garenne_common::TaskMessage;
use garenne_common::wire::{self, Message, lease};

use crate::inflight::Key;

/// What a task came in.
#[derive(Debug, Clone)]
pub enum Carrier {
    /// Its own message, as it arrived: a retry and a dead letter keep what its sender wrote.
    Alone(Box<Message>),
    /// A bundle.
    Bundle {
        /// Who sent it.
        app_id: Arc<str>,
    },
}

impl Carrier {
    /// The message of this task, its own or the one it would have had.
    pub fn message(&self, task: &TaskMessage) -> Cow<'_, Message> {
        match self {
            Self::Alone(message) => Cow::Borrowed(message),
            Self::Bundle { app_id } => Cow::Owned(wire::task::encode(task, app_id)),
        }
    }

    /// Which attempt it asks for.
    pub fn key(&self, task: &TaskMessage) -> Key {
        match self {
            Self::Alone(message) => Key::of(task, message),
            Self::Bundle { .. } => Key::of_member(task),
        }
    }

    /// The number of the next execution of it under a lease.
    pub(crate) fn next_fence(&self) -> u64 {
        match self {
            // What cannot be read counts as none: a lower fence costs a repeat and loses nothing.
            Self::Alone(message) => lease::next_fence(message).unwrap_or(1),
            Self::Bundle { .. } => 1,
        }
    }
}
