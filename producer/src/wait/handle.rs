//! Waiting for one task.
//!
//! A result comes in from the reply queue, a typed output or an error goes out. Dropping a handle
//! changes nothing about its task.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use garenne_common::{Codec, Payload, Status, TaskId, TaskResult};
use serde::de::DeserializeOwned;

use super::outstanding::Ended;
use super::replies::Waiting;
use crate::OutputError;
use crate::session::Session;

/// Waits for the result of a submitted task. Dropping it stops waiting; the task runs all the same.
///
/// The wait has no limit of its own, because a task may stay in its queue for days. A lost reply
/// delays the result but does not lose it, as long as a collector runs: the library asks the
/// collector about tasks that have been waited for for long.
#[must_use = "use submit_detached for a task whose result is not waited for"]
pub struct Handle<O> {
    id: TaskId,
    waiting: Option<Waiting>,
    ended: Option<Ended>,
    /// Keeps the connections open while a reply is waited for.
    _session: Arc<Session>,
    output: PhantomData<fn() -> O>,
}

impl<O> Handle<O> {
    pub(crate) fn new(id: TaskId, waiting: Waiting, session: Arc<Session>) -> Self {
        Self { id, waiting: Some(waiting), ended: None, _session: session, output: PhantomData }
    }

    /// The task's id.
    pub fn id(&self) -> &TaskId {
        &self.id
    }

    /// Waits for the final record, whatever its status. Fails with [`OutputError::Closed`] if the
    /// producer is closed first.
    pub async fn result(mut self) -> Result<TaskResult, OutputError> {
        self.receive().await?;
        match self.ended.take() {
            Some(Ended::Result(result)) => Ok(result),
            Some(Ended::Conflict) => Err(OutputError::Conflict { id: self.id }),
            None => Err(self.closed()),
        }
    }

    /// Waits for the final record and keeps the handle.
    ///
    /// Cancel-safe: it can be used in `select!` or with a timeout, and called again.
    pub async fn ended(&mut self) -> Result<&TaskResult, OutputError> {
        self.receive().await?;
        self.record()
    }

    /// [`ended`](Self::ended) with a time limit, after which it fails with
    /// [`OutputError::NoAnswer`].
    pub async fn ended_within(&mut self, limit: Duration) -> Result<&TaskResult, OutputError> {
        match tokio::time::timeout(limit, self.receive()).await {
            Ok(received) => received?,
            Err(_) => return Err(OutputError::NoAnswer { id: self.id.clone(), waited: limit }),
        }
        self.record()
    }

    fn record(&self) -> Result<&TaskResult, OutputError> {
        match &self.ended {
            Some(Ended::Result(result)) => Ok(result),
            Some(Ended::Conflict) => Err(OutputError::Conflict { id: self.id.clone() }),
            None => Err(self.closed()),
        }
    }

    async fn receive(&mut self) -> Result<(), OutputError> {
        if let Some(waiting) = &mut self.waiting {
            self.ended = waiting.result().await;
            self.waiting = None;
        }
        if self.ended.is_some() { Ok(()) } else { Err(self.closed()) }
    }

    fn closed(&self) -> OutputError {
        OutputError::Closed { id: self.id.clone() }
    }
}

impl<O: DeserializeOwned> Handle<O> {
    /// Waits for the output, or returns why there is none.
    pub async fn output(self) -> Result<O, OutputError> {
        output_of(self.result().await?)
    }
}

impl<O> fmt::Debug for Handle<O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle")
            .field("id", &self.id)
            .field("ended", &self.ended)
            .finish_non_exhaustive()
    }
}

fn output_of<O: DeserializeOwned>(result: TaskResult) -> Result<O, OutputError> {
    let id = result.id;
    match result.status {
        Status::Succeeded => {
            // Workers in other languages may omit an output that is null.
            let nothing = || Payload { codec: Codec::Json, bytes: "null".into() };
            let output = result.output.unwrap_or_else(nothing);
            output.decode().map_err(|source| OutputError::Decode { id, source })
        }
        Status::Failed => Err(OutputError::Failed {
            id,
            reason: result.reason,
            error: result.error.unwrap_or_default(),
            attempt: result.attempt,
            worker: result.worker.to_string(),
        }),
        Status::Cancelled => {
            Err(OutputError::Cancelled { id, reason: result.error.unwrap_or_default() })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use garenne_common::{DeadReason, QueueName, TaskName, Timestamp};

    fn result(status: Status, output: Option<&'static str>) -> TaskResult {
        TaskResult {
            id: TaskId::new("t-1").unwrap(),
            name: TaskName::new("a.b").unwrap(),
            queue: QueueName::default(),
            batch: None,
            status,
            output: output.map(|json| Payload { codec: Codec::Json, bytes: json.into() }),
            error: Some("disk full".to_owned()),
            reason: Some(DeadReason::RetriesExhausted),
            attempt: 4,
            redelivered: false,
            worker: "host:1".into(),
            started_at: Timestamp::from_millis(0),
            finished_at: Timestamp::from_millis(0),
            fingerprint: None,
        }
    }

    #[test]
    fn each_status_has_its_own_output_or_error() {
        assert_eq!(output_of::<u64>(result(Status::Succeeded, Some("3"))), Ok(3));
        assert_eq!(output_of::<()>(result(Status::Succeeded, None)), Ok(()));
        let wrong = output_of::<u64>(result(Status::Succeeded, Some("\"three\"")));
        assert!(matches!(wrong, Err(OutputError::Decode { .. })), "{wrong:?}");
        let cancelled = output_of::<u64>(result(Status::Cancelled, None));
        assert!(matches!(cancelled, Err(OutputError::Cancelled { .. })), "{cancelled:?}");
        let failed = output_of::<u64>(result(Status::Failed, None)).unwrap_err();
        assert_eq!(
            failed.to_string(),
            "task t-1 failed on attempt 4 (retries_exhausted, by host:1): disk full"
        );
    }
}
