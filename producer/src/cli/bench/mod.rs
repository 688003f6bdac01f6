//! `garenne bench`: how fast Garenne is here and now, beside a bare client on the same broker.
//!
//! Every figure is measured in this run, on real processes in a [`Cluster`] of its own, and every run of
//! ours has a run of the bare client ([`garenne_common::broker::raw`]) right before it: machines differ
//! and are never quite idle, so the ratio tells more than the figure. Nothing is judged here.

mod report;
mod scenarios;
mod usage;

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use garenne_common::broker::raw::Raw;
use serde::Serialize;

use super::cluster::Cluster;
use super::context::Context;
use super::error::{CliError, Exit};
use report::Report;
use scenarios::Bench;
use usage::Machine;

const EXAMPLES: &str = "\
Examples:
  make bench                               all of it, on a RabbitMQ of its own
  garenne bench --tasks 10000 --repeats 1  a quick look, on a running RabbitMQ
  garenne bench --scenario latency,start -o json
  garenne bench --report results           also report.json and report.md there

Run it on an idle machine and with a release build. With a RabbitMQ that
`scripts/rabbitmq run` has started, the broker's own processor time is
measured too.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Arguments {
    /// How many tasks one run of the scenarios `tasks` and `submit` has
    #[arg(long, value_name = "N", default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(100..))]
    tasks: u64,
    /// How often each scenario is run, after a warm-up; the median counts
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    repeats: u32,
    /// Only these
    #[arg(long, value_enum, value_name = "LIST", value_delimiter = ',', default_values_t = Scenario::ALL, hide_default_value = true)]
    scenario: Vec<Scenario>,
    /// How many tasks a worker runs at once
    #[arg(long, value_name = "N", default_value_t = 64)]
    slots: usize,
    /// How many more tasks a worker fetches ahead
    #[arg(long, value_name = "N", default_value_t = 936)]
    lookahead: usize,
    /// Write report.json and report.md into this directory
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
enum Scenario {
    /// No-op tasks from the first submit to the batch's done notice, results stored; and memory
    Tasks,
    /// Confirmed submissions, pipelined
    Submit,
    /// One task at a time, from submit to its typed output
    Latency,
    /// A worker process, from its start to its first result
    Start,
}

impl Scenario {
    const ALL: [Self; 4] = [Self::Tasks, Self::Submit, Self::Latency, Self::Start];
}

pub(crate) async fn run(context: &Context, arguments: Arguments) -> Result<Exit, CliError> {
    let machine = Machine::describe();
    if machine.is_debug_build() {
        context.output.remark(report::DEBUG_WARNING);
    }
    let mut cluster = Cluster::start(context, "bench", &[]).await?;
    let measured = tokio::select! {
        measured = measure(context, &arguments, &mut cluster, machine) => measured.map(Some),
        _ = context.stop.requested() => Ok(None),
    };
    cluster.close(context).await;
    let Some(report) = measured? else { return Ok(context.stop.requested().await) };
    context.output.show(&report, |paint| report.as_text(paint))?;
    if let Some(directory) = &arguments.report {
        write(&report, directory)?;
    }
    Ok(Exit::Success)
}

async fn measure(
    context: &Context,
    arguments: &Arguments,
    cluster: &mut Cluster,
    machine: Machine,
) -> Result<Report, CliError> {
    let raw = Raw::prepare(&cluster.config().broker).await?;
    let measured = async {
        let mut bench = Bench::start(context, arguments, cluster, &raw).await?;
        for scenario in &arguments.scenario {
            match scenario {
                Scenario::Tasks => bench.tasks().await?,
                Scenario::Submit => bench.submit().await?,
                Scenario::Latency => bench.latency().await?,
                Scenario::Start => bench.start_up().await?,
            }
        }
        Ok(bench.finish(machine).await)
    };
    let measured = measured.await;
    raw.remove().await?;
    measured
}

fn write(report: &Report, directory: &Path) -> Result<(), CliError> {
    let failed = |error: std::io::Error| {
        CliError::unusable(format!("cannot write the report into {}: {error}", directory.display()))
    };
    let json = serde_json::to_string_pretty(report)
        .map_err(|error| CliError::unusable(format!("the report cannot be written: {error}")))?;
    std::fs::create_dir_all(directory).map_err(failed)?;
    std::fs::write(directory.join("report.json"), json + "\n").map_err(failed)?;
    std::fs::write(directory.join("report.md"), report.as_markdown()).map_err(failed)
}
