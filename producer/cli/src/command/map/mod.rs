//! `garenne map`: one task per line of input, as one batch, with results in the order of the lines.
//!
//! Lines come in, one JSON object per result goes out. A window of tasks is under way at once, and
//! only that window is held in memory. [`args`] defines the arguments, [`input`] reads lines,
//! [`submit`](mod@submit) sends them to the broker, [`order`] restores their order, [`progress`]
//! informs the user, and [`pump`] is the loop that connects them.

mod args;
mod input;
mod order;
mod progress;
mod pump;
mod submit;

use std::time::Duration;

use garenne_common::BatchId;
use garenne_producer::{Batch, Producer};
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;

use crate::context::{Context, remark_still_running};
use crate::error::{CliError, Exit};
pub(crate) use args::MapArgs;
use input::{AHEAD, LineFormat, LineReceiver, NumberedLine, Source};
use pump::{Halt, Pump};

pub(crate) async fn run(context: &Context, arguments: MapArgs) -> Result<Exit, CliError> {
    let reader = TaskTracker::new();
    let Prepared { total, producer, mut lines } = tokio::select! {
        prepared = prepare(context, &arguments, &reader) => prepared?,
        exit = context.stop.requested() => return Ok(exit),
    };
    // The batch is opened after the first line was read, so that empty input leaves no batch.
    let opened = async {
        let Some(first) = lines.recv().await.transpose()? else { return Ok(None) };
        Ok(Some((first, open(context, &producer).await?)))
    };
    let opened = tokio::select! {
        opened = opened => opened,
        exit = context.stop.requested() => return Ok(exit),
    };
    let exit = match opened {
        Ok(Some((first, batch))) => {
            let pump = Pump::new(context, &arguments, &producer, total);
            run_batch(pump, batch, first, lines).await
        }
        Ok(None) => {
            context.output.remark("the input has no lines, so there are no tasks");
            Ok(Exit::Success)
        }
        Err(error) => Err(error),
    };
    context.close(producer, &exit).await;
    exit
}

/// A map before its first line.
struct Prepared {
    /// The number of tasks, if the input is a file that was checked.
    total: Option<u64>,
    producer: Producer,
    lines: LineReceiver,
}

/// Checks the input, connects, and starts reading.
async fn prepare(
    context: &Context,
    arguments: &MapArgs,
    reader: &TaskTracker,
) -> Result<Prepared, CliError> {
    let format = LineFormat { key: arguments.arg.clone(), null: arguments.null };
    let source = Source::new(arguments.file.clone());
    let total = source.check(&format).await?;
    // A long job survives a restart of the broker: what is unconfirmed then is sent again.
    let mut config = context.config.clone();
    config.broker.publish_timeout = arguments.patience;
    let producer = context.producer_with(&config, "map").await?;
    let (to, lines) = mpsc::channel(AHEAD);
    reader.spawn(source.open(format).await?.feed(to));
    Ok(Prepared { total, producer, lines })
}

/// Opens the batch, within `--deadline` instead of `--patience`: a broker that does not answer at
/// the first contact is reported soon.
async fn open(context: &Context, producer: &Producer) -> Result<Batch, CliError> {
    match tokio::time::timeout(context.deadline, producer.batch()).await {
        Ok(batch) => Ok(batch?),
        Err(_) => Err(CliError::unusable(format!(
            "RabbitMQ did not take the first message within {:?}",
            context.deadline
        ))
        .help(
            "check for a memory or disk alarm in its management UI or log; `garenne doctor` \
               checks it too",
        )),
    }
}

/// Submits all lines as members of the batch, seals it, and waits for the results.
async fn run_batch(
    mut pump: Pump<'_>,
    batch: Batch,
    first: NumberedLine,
    lines: LineReceiver,
) -> Result<Exit, CliError> {
    let (context, arguments) = (pump.context, pump.arguments);
    let id = batch.id().clone();
    let fed = pump.feed(&batch, first, lines).await;
    // Sealed as soon as its members are known, not when they have ended: if this process is killed
    // while it waits, the batch is complete all the same.
    let limit = if fed.is_ok() { arguments.patience } else { context.deadline };
    let sealed = seal(context, batch, limit).await;
    let ended = match (fed, sealed) {
        (Ok(()), Ok(())) if arguments.detach => Ok(()),
        (Ok(()), Ok(())) => pump.drain().await,
        (Err(halt), _) => Err(halt),
        (Ok(()), Err(error)) => Err(Halt::Error(error)),
    };
    match ended {
        Ok(()) if arguments.detach => {
            pump.clear();
            context.output.show(&serde_json::json!({ "batch": id }), |_| id.to_string())?;
        }
        Ok(()) => pump.finish(id.as_str()),
        Err(halt) => {
            pump.abandon(id.as_str(), &halt);
            return halted(context, &id, halt);
        }
    }
    Ok(pump.verdict())
}

/// The end of a map that was halted, with the command that shows its batch.
fn halted(context: &Context, id: &BatchId, halt: Halt) -> Result<Exit, CliError> {
    let look = format!("garenne batch show {id}");
    match halt {
        Halt::Stop(exit) => {
            remark_still_running(context.output, "batch", &look);
            Ok(exit)
        }
        Halt::Error(error) if error.help.is_none() => {
            Err(error.help(format!("the submitted tasks continue: {look}")))
        }
        Halt::Error(error) => Err(error),
    }
}

async fn seal(context: &Context, batch: Batch, limit: Duration) -> Result<(), CliError> {
    match tokio::time::timeout(limit, batch.seal()).await {
        Ok(sealed) => Ok(sealed.map(drop)?),
        Err(_) => Err(context.timed_out().into()),
    }
}
