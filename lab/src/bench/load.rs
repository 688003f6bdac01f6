//! The tasks that are submitted, and the ways to submit them.

use std::time::{Duration, Instant};

use futures_util::{Stream, StreamExt, stream};
use garenne_cli::error::CliError;
use garenne_common::{Codec, Task, TaskId};
use garenne_producer::{Batch, Handle, Producer, SealedBatch, Submission, SubmitError};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::mpsc;

/// A run that takes longer has gone wrong.
const PATIENCE: Duration = Duration::from_mins(3);

/// The built-in `garenne.echo`, as a program would declare it.
#[derive(Serialize, Deserialize)]
struct Echo(u64);

impl Task for Echo {
    const NAME: &'static str = "garenne.echo";
    type Output = u64;
}

/// What each task does.
#[derive(Debug, Clone)]
pub(super) enum Work {
    /// Nothing: echoes its number.
    Nothing,
    /// Echoes so many bytes of text.
    Text(String),
    /// Waits, and leaves its thread to others meanwhile.
    Sleep { millis: u64 },
    /// Keeps a processor busy.
    Spin { millis: u64 },
}

impl Work {
    /// An echo whose argument has this many bytes.
    pub(super) fn text(bytes: usize) -> Self {
        // Less the quotation marks.
        Self::Text("x".repeat(bytes.saturating_sub(2)))
    }

    fn submission(&self, number: u64) -> Result<Submission<Value>, SubmitError> {
        match self {
            Self::Nothing => Submission::dynamic("garenne.echo", number),
            Self::Text(text) => Submission::dynamic("garenne.echo", text),
            Self::Sleep { millis } => {
                Submission::dynamic("garenne.sleep", json!({ "millis": millis }))
            }
            Self::Spin { millis } => {
                Submission::dynamic("garenne.spin", json!({ "millis": millis }))
            }
        }
    }
}

/// How tasks are handed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// One call and one message for each, with a window of calls under way.
    Apart,
    /// One call for each, likewise; those under way together share messages.
    Singles,
    /// One call for all of them.
    Bulk,
}

impl Way {
    pub(super) const ALL: [Self; 3] = [Self::Apart, Self::Singles, Self::Bulk];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Apart => "apart",
            Self::Singles => "singles",
            Self::Bulk => "bulk",
        }
    }

    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Apart => "singles apart",
            Self::Singles | Self::Bulk => self.name(),
        }
    }
}

/// Many alike tasks for one queue.
#[derive(Debug, Clone)]
pub(super) struct Load {
    pub(super) work: Work,
    pub(super) way: Way,
    pub(super) queue: &'static str,
    /// Calls under way at once, for singles.
    pub(super) window: usize,
}

impl Load {
    /// Submits as one batch and waits for its done notice; every result is in the store then.
    pub(super) async fn run_batch(
        &self,
        producer: &Producer,
        count: u64,
    ) -> Result<Duration, CliError> {
        let begin = Instant::now();
        let batch = self.open_batch(producer, count).await?;
        done(&batch).await?;
        Ok(begin.elapsed())
    }

    /// Submits as one batch and seals it.
    pub(super) async fn open_batch(
        &self,
        producer: &Producer,
        count: u64,
    ) -> Result<SealedBatch, CliError> {
        let batch = producer.batch().await?;
        match self.way {
            Way::Apart | Way::Singles => confirmed(self.singly_in(&batch, count)?).await?,
            Way::Bulk => confirmed(batch.submit_all_detached(self.all(count)?)).await?,
        }
        Ok(batch.seal().await?)
    }

    /// Submits without a batch and waits until the broker has confirmed all.
    pub(super) async fn submit(&self, producer: &Producer, count: u64) -> Result<(), CliError> {
        match self.way {
            Way::Apart | Way::Singles => {
                let calls = self.all(count)?.map(|task| producer.submit_detached(task));
                confirmed(calls.buffer_unordered(self.window)).await?;
            }
            Way::Bulk => confirmed(producer.submit_all_detached(self.all(count)?)).await?,
        }
        Ok(())
    }

    /// Submits in bulk and waits for every output here, which needs no collector.
    pub(super) async fn run_to_producer(
        &self,
        producer: &Producer,
        count: u64,
    ) -> Result<Duration, CliError> {
        let begin = Instant::now();
        let (handed, mut handles) = mpsc::unbounded_channel::<Handle<Value>>();
        let submitting = async {
            let mut submitted = std::pin::pin!(producer.submit_all(self.all(count)?));
            while let Some(handle) = submitted.next().await {
                // Cannot fail: the other side listens until this one has gone.
                drop(handed.send(handle?));
            }
            drop(handed);
            Ok::<_, CliError>(())
        };
        let waiting = async {
            while let Some(handle) = handles.recv().await {
                handle.output().await?;
            }
            Ok(())
        };
        tokio::try_join!(submitting, waiting)?;
        Ok(begin.elapsed())
    }

    fn singly_in<'b>(
        &self,
        batch: &'b Batch,
        count: u64,
    ) -> Result<impl Stream<Item = Result<TaskId, SubmitError>> + use<'b>, CliError> {
        let calls = self.all(count)?.map(|task| batch.submit_detached(task));
        Ok(calls.buffer_unordered(self.window))
    }

    /// Made one by one while they are submitted: a million of them need no memory.
    fn all(&self, count: u64) -> Result<impl Stream<Item = Submission<Value>> + use<>, CliError> {
        let (work, queue) = (self.work.clone(), self.queue);
        let nth = move |number| work.submission(number)?.queue(queue);
        // What is wrong with one of them is wrong with the first: told here, where it can be told.
        nth(0)?;
        Ok(stream::iter((0..count).filter_map(move |number| nth(number).ok())))
    }
}

/// Waits until a batch is done, and looks at how it ended.
pub(super) async fn done(batch: &SealedBatch) -> Result<(), CliError> {
    let summary = batch.wait_timeout(PATIENCE).await?;
    if summary.succeeded == batch.count() {
        return Ok(());
    }
    let message = format!("only {} of {} tasks succeeded", summary.succeeded, batch.count());
    Err(CliError::unusable(message))
}

/// One task from its submission to its typed output.
pub(super) async fn round_trip(producer: &Producer, number: u64) -> Result<Duration, CliError> {
    let begin = Instant::now();
    let output = producer.submit(echo(number)).await?.output().await?;
    let took = begin.elapsed();
    if output == number {
        return Ok(took);
    }
    Err(CliError::unusable(format!("echo of {number} answered {output}")))
}

/// As JSON, which is what `garenne.echo` reads.
pub(super) fn echo(number: u64) -> Submission<u64> {
    Submission::new(Echo(number)).codec(Codec::Json)
}

async fn confirmed(
    submitted: impl Stream<Item = Result<TaskId, SubmitError>>,
) -> Result<(), SubmitError> {
    let mut submitted = std::pin::pin!(submitted);
    while let Some(id) = submitted.next().await {
        id?;
    }
    Ok(())
}
