//! `garenne verify`: whether Garenne keeps its promises here and now, while its processes die.
//!
//! A run is a workload and a schedule of faults, both from one seed; real processes in a `Cluster` of
//! its own, behind a line that can be cut; a ledger outside the system; and a judgement of everything
//! that was seen. Nothing is measured for its speed (`garenne bench` does that).

mod bounds;
mod certificate;
mod check;
mod crew;
mod drive;
mod faults;
mod gather;
mod ledger;
mod listener;
mod liveness;
mod mix;
mod node;
mod plan;
mod producers;
mod progress;
mod proxy;
mod stage;
mod stall;
pub(crate) mod submitter;
mod verdict;
mod vitals;
mod workload;

use std::time::Duration;

use clap::Args;
use garenne_cli::context::Context;
use garenne_cli::error::{CliError, Exit};

use plan::Wanted;
use progress::Progress;

const HELP: &str = "\
What happens: workers, collectors and producers start as real processes, in a
namespace of their own, and reach the broker over a line that can be cut. They
run N tasks of many kinds: quick, slow, blocking, delayed, failing at first or
for good, panicking, overrunning, cancelled, killing their process, in batches
and in bursts of one kind. Half of the producers wait for results. Meanwhile
they are killed, cut off and frozen, and the broker too, where
scripts/rabbitmq has started it for this command. Handlers leave word in a
ledger outside the system.

What is checked at the end: no confirmed task lost, nothing that nobody
submitted, one outcome a task, one effect where the idempotency key is used,
a true notice for every batch, empty queues, the right dead letters, bounded
processes, no more executions than the faults explain. All the time: no task,
batch, producer, queue or process waits longer than --patience while nothing is
broken.

Examples:
  make verify                                 on a RabbitMQ of its own
  make verify ARGS=\"--tasks 100000 --seed 7\"
  garenne verify --tasks 2000                 on a running RabbitMQ
  garenne verify --faults worker,connection   only these
  garenne verify --tasks 500 -o json          a certificate for programs

A seed decides the workload and the faults; what the machine does in between
it does not, so a failure may take several runs to come again.

Exit codes: 0 everything holds, 1 something does not (ids, history and the
seed are named), 2 it could not be tried, 130 Ctrl-C.";

#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub(crate) struct VerifyArgs {
    /// How many tasks
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(100..=10_000_000))]
    tasks: u64,
    /// all, none, or some of worker, collector, producer, connection, broker, freeze
    #[arg(long, value_name = "LIST", default_value = "all")]
    faults: Wanted,
    /// What decides workload and faults [default: another one each time]
    #[arg(long, value_name = "NUMBER")]
    seed: Option<u64>,
    /// How many worker processes
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=50))]
    workers: u8,
    /// How many collector processes, all with one store
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=10))]
    collectors: u8,
    /// How long anything may wait, with nothing broken, until it counts as stuck
    #[arg(long, value_name = "TIME", default_value = "1m", value_parser = garenne_cli::options::duration)]
    patience: Duration,
    /// Leave the store and the logs of the processes, and say where
    #[arg(long)]
    keep: bool,
    /// Show nothing until the end
    #[arg(long)]
    no_progress: bool,
}

pub(crate) async fn run(context: &Context, mut arguments: VerifyArgs) -> Result<Exit, CliError> {
    // Short, because people copy it.
    let seed = *arguments.seed.get_or_insert_with(|| u64::from(fastrand::u32(..)));
    let setting = stage::Setting::of(context, &arguments, seed)?;
    let mut progress = Progress::new(context, arguments.tasks, !arguments.no_progress);
    let mut stage = setting.start(context).await?;
    let judged = tokio::select! {
        judged = verdict::reach(&mut stage, &mut progress) => judged.map(Some),
        _ = context.stop.requested() => Ok(None),
    };
    progress.clear();
    stage.close(context, arguments.keep).await;
    let Some(certificate) = judged? else { return Ok(context.stop.requested().await) };
    context.output.show(&certificate, |paint| certificate.as_text(paint))?;
    Ok(if certificate.holds { Exit::Success } else { Exit::Failed })
}
