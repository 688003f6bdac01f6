//! `garenne verify-producer`: the process that submits, for `garenne verify` to kill.
//!
//! It reads what to submit from standard input, `task INDEX` or `batch FIRST COUNT`, many at once, and
//! reports on standard output what the broker has confirmed: `confirmed INDEX`, `opened FIRST ID`,
//! `sealed FIRST`. One that waits for results (`--wait`) reports `answered INDEX` for each that it has.
//! Tasks that are to be cancelled it cancels once they are confirmed. A report is written before anything that follows from it. Tasks are submitted
//! by calls of their own, many at the same time, members of a batch in groups; `bundled COUNT` says how
//! many of a group shared a message, for the record only.

use std::ops::Range;
use std::time::Duration;

use clap::Args;
use futures_util::StreamExt;
use futures_util::future::try_join_all;
use futures_util::stream::FuturesUnordered;
use garenne_cli::context::Context;
use garenne_cli::error::{CliError, Exit};
use garenne_cli::output;
use garenne_producer::{Batch, Handle, Producer, SubmitError};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};

use super::mix::{Mix, Unit};

/// Between two tries of what failed for the moment.
const PAUSE: Duration = Duration::from_millis(200);

const EXAMPLES: &str = "\
Example:
  echo 'task 0' | garenne verify-producer --seed 1 --tasks 100";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct SubmitterArgs {
    /// The seed of the run
    #[arg(long)]
    seed: u64,
    /// How many tasks the run has
    #[arg(long)]
    tasks: u64,
    /// Wait for the result of every task
    #[arg(long)]
    wait: bool,
    /// End when the process of this id, which has started this one, is gone
    #[arg(long, value_name = "PID")]
    die_with: Option<u32>,
}

pub(crate) async fn run(context: &Context, arguments: SubmitterArgs) -> Result<Exit, CliError> {
    if let Some(parent) = arguments.die_with {
        garenne_common::service::lifeline::die_with(parent)
            .map_err(|error| CliError::unusable(error.to_string()))?;
    }
    let mix = Mix { seed: arguments.seed, tasks: arguments.tasks };
    let producer = connect(context).await?;
    let submitter = Submitter { producer: &producer, mix, waits: arguments.wait };
    let mut orders = BufReader::new(tokio::io::stdin()).lines();
    let mut under_way = FuturesUnordered::new();
    let mut reading = true;
    while reading || !under_way.is_empty() {
        tokio::select! {
            order = orders.next_line(), if reading => {
                match order.ok().flatten() {
                    Some(line) => under_way.push(submitter.serve(unit(&line)?)),
                    None => reading = false,
                }
            }
            Some(done) = under_way.next() => done?,
            exit = context.stop.requested() => return Ok(exit),
        }
    }
    drop(under_way);
    producer.close().await;
    Ok(Exit::Success)
}

/// A producer that starts during an outage waits for its end, as a service would.
async fn connect(context: &Context) -> Result<Producer, CliError> {
    loop {
        match Producer::connect_as(&context.config, "garenne verify-producer").await {
            Err(error) if error.is_transient() => {
                tokio::time::sleep(PAUSE).await;
            }
            connected => return Ok(connected?),
        }
    }
}

fn unit(line: &str) -> Result<Unit, CliError> {
    let words: Vec<&str> = line.split(' ').collect();
    let unit = match words[..] {
        ["task", index] => index.parse().ok().map(Unit::One),
        ["batch", first, count] => first
            .parse()
            .ok()
            .zip(count.parse().ok())
            .map(|(first, count)| Unit::Batch { first, count }),
        _ => None,
    };
    unit.ok_or_else(|| CliError::unusable(format!("{line:?} is no order")))
}

/// What serving an order needs.
#[derive(Clone, Copy)]
struct Submitter<'p> {
    producer: &'p Producer,
    mix: Mix,
    waits: bool,
}

/// A submission, and the way to its result if that is waited for.
type Submitted = Option<Handle<Value>>;

impl Submitter<'_> {
    async fn serve(self, unit: Unit) -> Result<(), CliError> {
        let Unit::Batch { first, .. } = unit else {
            let Unit::One(index) = unit else { return Ok(()) };
            let handle = self.submit(None, index).await?;
            self.cancel(index).await?;
            return wait_for(index, handle).await;
        };
        let batch = persist(async || self.producer.batch().await).await?;
        output::line(format_args!("opened {first} {}", batch.id()))?;
        let groups = self.mix.groups(unit.indices()).into_iter();
        let submitting = groups.map(|group| self.submit_together(&batch, group));
        let handles = try_join_all(submitting).await?;
        // Its error leaves open whether the seal arrived, so nothing is reported then.
        match batch.seal().await {
            Ok(_) => output::line(format_args!("sealed {first}"))?,
            Err(error) if error.is_transient() => output::line(format_args!("unsealed {first}"))?,
            Err(error) => return Err(error.into()),
        }
        let handles = handles.into_iter().flatten();
        try_join_all(handles.map(|(index, handle)| wait_for(index, handle))).await.map(drop)
    }

    /// Submits members of a batch in as few messages as may be. What fails for the moment goes again
    /// alone.
    async fn submit_together(
        self,
        batch: &Batch,
        group: Range<u64>,
    ) -> Result<Vec<(u64, Submitted)>, CliError> {
        let mix = self.mix;
        let submissions = group.clone().map(|n| Ok(mix.job(n).submission(mix.id(n)?)?));
        let submissions = submissions.collect::<Result<Vec<_>, CliError>>()?;
        let outcomes: Vec<Result<Submitted, SubmitError>> = if self.waits {
            let outcomes = batch.submit_many(submissions).await.into_iter();
            outcomes.map(|outcome| outcome.map(Some)).collect()
        } else {
            let outcomes = batch.submit_many_detached(submissions).await.into_iter();
            outcomes.map(|outcome| outcome.map(|_| None)).collect()
        };
        let (mut bundled, mut again, mut handles) = (0, vec![], vec![]);
        for (index, outcome) in group.clone().zip(outcomes) {
            match outcome {
                Ok(handle) => {
                    output::line(format_args!("confirmed {index}"))?;
                    bundled += u64::from(mix.shares(index, &group));
                    handles.push((index, handle));
                }
                Err(error) if error.is_transient() => {
                    tracing::info!(%error, "submitting again");
                    again.push(index);
                }
                Err(error) => return Err(error.into()),
            }
        }
        if bundled > 0 {
            output::line(format_args!("bundled {bundled}"))?;
        }
        let again = again.into_iter();
        let again = again
            .map(async |index| Ok::<_, CliError>((index, self.submit(Some(batch), index).await?)));
        handles.extend(try_join_all(again).await?);
        Ok(handles)
    }

    async fn submit(self, batch: Option<&Batch>, index: u64) -> Result<Submitted, CliError> {
        let (job, id) = (self.mix.job(index), self.mix.id(index)?);
        let handle = persist(async || {
            let submission = job.submission(id.clone())?;
            match (batch, self.waits) {
                (Some(batch), true) => batch.submit(submission).await.map(Some),
                (Some(batch), false) => batch.submit_detached(submission).await.map(|_| None),
                (None, true) => self.producer.submit(submission).await.map(Some),
                (None, false) => self.producer.submit_detached(submission).await.map(|_| None),
            }
        })
        .await?;
        output::line(format_args!("confirmed {index}"))?;
        Ok(handle)
    }

    /// Cancels what is to be cancelled, however often it takes until the collector has heard of it.
    async fn cancel(self, index: u64) -> Result<(), CliError> {
        if !self.mix.job(index).is_cancelled() {
            return Ok(());
        }
        let ids = [self.mix.id(index)?];
        loop {
            match self.producer.cancel_tasks(&ids, None, Duration::ZERO).await {
                Err(error) if error.is_transient() => {
                    tracing::info!(%error, "cancelling again");
                    tokio::time::sleep(PAUSE).await;
                }
                done => return Ok(done.map(drop)?),
            }
        }
    }
}

/// Waits for a result, if this producer does, and says that it is here.
async fn wait_for(index: u64, handle: Submitted) -> Result<(), CliError> {
    let Some(handle) = handle else { return Ok(()) };
    match handle.result().await {
        Ok(_) => output::line(format_args!("answered {index}")),
        // Without an answer the one that judges sees that it is missing.
        Err(error) => {
            tracing::error!(index, %error, "no result");
            Ok(())
        }
    }
}

/// Tries again, as a caller does whose submission ended in a passing error. The ids stay the same.
async fn persist<T>(work: impl AsyncFn() -> Result<T, SubmitError>) -> Result<T, CliError> {
    loop {
        match work().await {
            Err(error) if error.is_transient() => {
                tracing::info!(%error, "submitting again");
            }
            done => return Ok(done?),
        }
    }
}
