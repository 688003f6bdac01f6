//! `garenne verify-producer`: the process that submits, for `garenne verify` to kill.
//!
//! It reads what to submit from standard input, `task INDEX` or `batch FIRST COUNT`, many at once, and
//! reports on standard output what the broker has confirmed: `confirmed INDEX`, `opened FIRST ID`,
//! `sealed FIRST`. A report is written before anything that follows from it. Tasks are submitted
//! by calls of their own, many at the same time, members of a batch in groups; `bundled COUNT` says how
//! many of a group shared a message, for the record only.

use std::ops::Range;

use clap::Args;
use futures_util::StreamExt;
use futures_util::future::try_join_all;
use futures_util::stream::FuturesUnordered;
use garenne_producer::{Batch, Producer, SubmitError};
use tokio::io::{AsyncBufReadExt, BufReader};

use super::mix::{Mix, Unit};
use crate::cli::context::Context;
use crate::cli::error::{CliError, Exit};
use crate::cli::output;

const EXAMPLES: &str = "\
Example:
  echo 'task 0' | garenne verify-producer --seed 1 --tasks 100";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Arguments {
    /// The seed of the run
    #[arg(long)]
    seed: u64,
    /// How many tasks the run has
    #[arg(long)]
    tasks: u64,
    /// End when the process of this id, which has started this one, is gone
    #[arg(long, value_name = "PID")]
    die_with: Option<u32>,
}

pub(crate) async fn run(context: &Context, arguments: Arguments) -> Result<Exit, CliError> {
    if let Some(parent) = arguments.die_with {
        garenne_common::lifeline::die_with(parent)
            .map_err(|error| CliError::unusable(error.to_string()))?;
    }
    let mix = Mix { seed: arguments.seed, tasks: arguments.tasks };
    let producer = connect(context).await?;
    let mut orders = BufReader::new(tokio::io::stdin()).lines();
    let mut under_way = FuturesUnordered::new();
    let mut reading = true;
    while reading || !under_way.is_empty() {
        tokio::select! {
            order = orders.next_line(), if reading => {
                match order.ok().flatten() {
                    Some(line) => under_way.push(serve(&producer, mix, unit(&line)?)),
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
                tokio::time::sleep(std::time::Duration::from_millis(200)).await;
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

async fn serve(producer: &Producer, mix: Mix, unit: Unit) -> Result<(), CliError> {
    let Unit::Batch { first, .. } = unit else {
        let Unit::One(index) = unit else { return Ok(()) };
        return submit(producer, None, mix, index).await;
    };
    let batch = persist(async || producer.batch().await).await?;
    output::line(format_args!("opened {first} {}", batch.id()))?;
    let groups = mix.groups(unit.indices()).into_iter();
    try_join_all(groups.map(|group| submit_together(producer, &batch, mix, group))).await?;
    // Its error leaves open whether the seal arrived, so nothing is reported then.
    match batch.seal().await {
        Ok(_) => output::line(format_args!("sealed {first}")),
        Err(error) if error.is_transient() => output::line(format_args!("unsealed {first}")),
        Err(error) => Err(error.into()),
    }
}

/// Submits members of a batch in as few messages as may be. What fails for the moment goes again alone.
async fn submit_together(
    producer: &Producer,
    batch: &Batch,
    mix: Mix,
    group: Range<u64>,
) -> Result<(), CliError> {
    let submissions = group.clone().map(|n| Ok(mix.job(n).submission(mix.id(n)?)?));
    let submissions = submissions.collect::<Result<Vec<_>, CliError>>()?;
    let outcomes = batch.submit_many_detached(submissions).await;
    let (mut bundled, mut again) = (0, vec![]);
    for (index, outcome) in group.clone().zip(outcomes) {
        match outcome {
            Ok(_) => {
                output::line(format_args!("confirmed {index}"))?;
                bundled += u64::from(mix.shares(index, &group));
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
    try_join_all(again.map(|index| submit(producer, Some(batch), mix, index))).await?;
    Ok(())
}

async fn submit(
    producer: &Producer,
    batch: Option<&Batch>,
    mix: Mix,
    index: u64,
) -> Result<(), CliError> {
    let (job, id) = (mix.job(index), mix.id(index)?);
    persist(async || {
        let submission = job.submission(id.clone())?;
        match batch {
            Some(batch) => batch.submit_detached(submission).await,
            None => producer.submit_detached(submission).await,
        }
    })
    .await?;
    output::line(format_args!("confirmed {index}"))
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
