//! Failed attempts of tasks that go on: for progress bars, not for decisions.

use garenne_common::wire::RetryNote;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;

use crate::Producer;

/// What became known of retries.
#[derive(Debug, Clone, PartialEq)]
pub enum Retried {
    /// An attempt failed and its task goes on.
    Note(RetryNote),
    /// So many notes came faster than they were read and are gone; counting stays exact.
    Missed(u64),
}

/// The notes of failed attempts that workers send to this producer's reply queue.
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
    /// Failed attempts of tasks submitted with a handle, from now on.
    ///
    /// Best effort as all replies are: notes under way while a connection is lost are lost with it.
    pub fn retry_notes(&self) -> RetryNotes {
        RetryNotes(self.subscribe_retries())
    }
}
