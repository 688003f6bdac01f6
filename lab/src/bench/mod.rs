//! `garenne bench`: how fast Garenne is here and now, beside a bare client on the same broker.
//!
//! Every figure is measured in this run, on real processes in a [`Cluster`] of its own, and every run of
//! ours has a run of the bare client ([`bare`]) right before it: machines differ
//! and are never quite idle, so the ratio tells more than the figure. A figure may have a target; the
//! exit code does not depend on it.

mod bare;
mod chart;
mod extent;
mod figure;
mod load;
mod meter;
mod report;
mod scenarios;
mod stage;
mod usage;

use std::io;
use std::path::{Path, PathBuf};

use crate::bench::bare::Bare;
use clap::{Args, ValueEnum};
use garenne_cli::context::Context;
use garenne_cli::error::{CliError, Exit};
use serde::Serialize;

use crate::cluster::{Cluster, STOCK_WORKER};
use report::Report;
use stage::Bench;
use usage::Machine;

const EXAMPLES: &str = "\
Examples:
  make bench                               all of it, on a RabbitMQ of its own
  make bench ARGS=\"--report out\"           also report.json, .md and .svg there
  garenne bench --quick                    does it work? half a minute
  garenne bench --scenario latency,start -o json

Run it on an idle machine and with a release build. All of it takes about ten
minutes. With a RabbitMQ that `scripts/rabbitmq run` has started, the broker's
own processor time is measured too. The backlog of a million wants some GB of
memory and disk there.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct BenchArgs {
    /// About how long one timed run lasts, in seconds [default: 3]
    #[arg(long, value_name = "S", value_parser = seconds)]
    seconds: Option<f64>,
    /// So many tasks a run instead, whatever time that takes
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(100..))]
    tasks: Option<u64>,
    /// How often each is run, after a warm-up; the median counts [default: 3]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    repeats: Option<u32>,
    /// How many tasks wait in the scenario `backlog` [default: 100,000 and 1,000,000]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1_000..))]
    backlog: Option<u64>,
    /// Everything once, briefly and with small numbers
    #[arg(long)]
    quick: bool,
    /// Only these
    #[arg(long, value_enum, value_name = "LIST", value_delimiter = ',', default_values_t = Scenario::ALL, hide_default_value = true)]
    scenario: Vec<Scenario>,
    /// Maximum number of tasks that a worker runs at the same time
    #[arg(long, value_name = "N", default_value_t = 64)]
    concurrency: usize,
    /// Maximum number of unacknowledged messages per worker
    #[arg(long, value_name = "N", default_value_t = 1000)]
    prefetch: usize,
    /// Write report.json, report.md and report.svg into this directory
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
enum Scenario {
    /// No-op tasks, one call each, with shared messages and without, results stored
    Singles,
    /// No-op tasks, all in one call, results stored
    Bulk,
    /// The same with every output back at the producer, and no collector
    Replies,
    /// Confirmed submissions that nobody takes
    Submit,
    /// Tasks that wait for 1 ms
    Sleep,
    /// Tasks that use 1 ms of processor time
    Spin,
    /// Arguments and outputs of 100 bytes to 100 KiB
    Payload,
    /// With 100,000 and a million tasks waiting
    Backlog,
    /// One task at a time, from submit to its typed output
    Latency,
    /// A worker process, from its start to its first result
    Start,
    /// Of worker and collector
    Memory,
    /// 1 to 8 worker processes
    Workers,
    /// 1 to 16 producers
    Producers,
    /// Two queues with a worker each, beside one
    Queues,
}

impl Scenario {
    const ALL: [Self; 14] = [
        Self::Singles,
        Self::Bulk,
        Self::Replies,
        Self::Submit,
        Self::Sleep,
        Self::Spin,
        Self::Payload,
        Self::Backlog,
        Self::Latency,
        Self::Start,
        Self::Memory,
        Self::Workers,
        Self::Producers,
        Self::Queues,
    ];
}

pub(crate) async fn run(context: &Context, arguments: BenchArgs) -> Result<Exit, CliError> {
    let machine = Machine::describe();
    if machine.is_debug_build() {
        context.output.remark(report::DEBUG_WARNING);
    }
    if let Some(directory) = &arguments.report {
        // Not after the minutes that measuring takes.
        make_writable(directory).map_err(|error| unwritable(directory, &error))?;
    }
    let mut cluster = Cluster::start(context, "bench", STOCK_WORKER, &[]).await?;
    let measured = tokio::select! {
        measured = measure(context, &arguments, &mut cluster, machine) => measured.map(Some),
        _ = context.stop.requested() => Ok(None),
    };
    cluster.close(context).await;
    let Some((report, failed)) = measured? else { return Ok(context.stop.requested().await) };
    context.output.show(&report, |paint| report.as_text(paint))?;
    if let Some(directory) = &arguments.report {
        write(&report, directory)?;
    }
    match failed {
        Some(error) => Err(error),
        None => Ok(Exit::Success),
    }
}

/// What was measured, and what ended it early: minutes of figures are worth showing all the same.
async fn measure(
    context: &Context,
    arguments: &BenchArgs,
    cluster: &mut Cluster,
    machine: Machine,
) -> Result<(Report, Option<CliError>), CliError> {
    let raw = Bare::prepare(&cluster.config().broker).await?;
    let measured = async {
        let mut bench = Bench::start(context, arguments, cluster, &raw).await?;
        let failed = scenarios(&mut bench, &arguments.scenario).await.err();
        Ok((bench.finish(machine).await, failed))
    };
    let measured = measured.await;
    raw.remove().await?;
    measured
}

async fn scenarios(bench: &mut Bench<'_>, wanted: &[Scenario]) -> Result<(), CliError> {
    for scenario in wanted {
        match scenario {
            Scenario::Singles => bench.singles().await?,
            Scenario::Bulk => bench.bulk().await?,
            Scenario::Replies => bench.replies().await?,
            Scenario::Submit => bench.submit().await?,
            Scenario::Sleep => bench.sleep().await?,
            Scenario::Spin => bench.spin().await?,
            Scenario::Payload => bench.payload().await?,
            Scenario::Backlog => bench.backlog().await?,
            Scenario::Latency => bench.latency().await?,
            Scenario::Start => bench.start_up().await?,
            Scenario::Memory => bench.memory().await?,
            Scenario::Workers => bench.more_workers().await?,
            Scenario::Producers => bench.more_producers().await?,
            Scenario::Queues => bench.more_queues().await?,
        }
    }
    Ok(())
}

/// Makes sure that there is such a directory and that files can be made in it.
fn make_writable(directory: &Path) -> io::Result<()> {
    std::fs::create_dir_all(directory)?;
    tempfile::tempfile_in(directory).map(drop)
}

fn unwritable(directory: &Path, error: &io::Error) -> CliError {
    CliError::unusable(format!("cannot write the report into {}: {error}", directory.display()))
}

fn write(report: &Report, directory: &Path) -> Result<(), CliError> {
    let json = serde_json::to_string_pretty(report)
        .map_err(|error| CliError::unusable(format!("the report cannot be written: {error}")))?;
    for (name, text) in [
        ("report.json", json + "\n"),
        ("report.md", report.as_markdown()),
        ("report.svg", chart::page(report)),
    ] {
        let written = std::fs::write(directory.join(name), text);
        written.map_err(|error| unwritable(directory, &error))?;
    }
    Ok(())
}

/// A length of time that a run can have.
fn seconds(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds".to_owned())?;
    if (0.05..=600.0).contains(&seconds) {
        return Ok(seconds);
    }
    Err("must be between 0.05 and 600".to_owned())
}
