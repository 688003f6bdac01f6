//! Failed attempts of tasks that will be retried: for progress bars, not for decisions.
//!
//! Notes come in from workers through the reply queue and go to subscribers. They are never needed
//! for a result.

use garenne_common::wire::RetryNote;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;

use crate::Producer;

/// An item of [`RetryNotes`].
#[derive(Debug, Clone, PartialEq)]
pub enum Retried {
    /// An attempt failed and its task will be retried.
    Note(RetryNote),
    /// This many notes were dropped because they came faster than they were read. Counts stay
    /// exact.
    Missed(u64),
}

/// A subscription to the failed attempts that workers report to this producer.
pub struct RetryNotes(broadcast::Receiver<RetryNote>);

impl RetryNotes {
    /// The next note; `None` when the producer is closed. Cancel-safe.
    pub async fn next(&mut self) -> Option<Retried> {
        match self.0.recv().await {
            Ok(note) => Some(Retried::Note(note)),
            Err(RecvError::Lagged(missed)) => Some(Retried::Missed(missed)),
            Err(RecvError::Closed) => None,
        }
    }
}

impl Producer {
    /// Subscribes to failed attempts of tasks that are submitted with a handle, from now on.
    ///
    /// Best effort, like all replies: notes that are under way when a connection is lost are lost.
    pub fn retry_notes(&self) -> RetryNotes {
        RetryNotes(self.0.retries.subscribe())
    }
}
