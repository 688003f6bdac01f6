//! `garenne demo`: Garenne at work before one's eyes, on real processes and a real broker.
//!
//! Everything happens in a [`Cluster`] of its own and is gone afterwards. The demo measures nothing
//! worth quoting (`garenne bench` does) and proves no promise (the tests do).

mod account;
mod fate;
mod files;
mod job;
mod look;
mod nodes;

use std::fmt::Display;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use garenne_cli::context::Context;
use garenne_cli::error::{CliError, Exit};
use garenne_cli::output::{self, Format, Paint};
use garenne_common::QueueName;
use garenne_producer::Producer;
use serde_json::{Map, Value, json};

use crate::cluster::{Cluster, STOCK_WORKER, WorkerSpec};

const EXAMPLES: &str = "\
Examples:
  make demo                           all of it, on a RabbitMQ of its own
  garenne demo                        the same on a running RabbitMQ
  garenne demo --broadcast            part 1 with every task on every node
  garenne demo --only job --dir /etc  part 2 over files of one's own choice

Exit code 1 if a task was lost, failed, or computed something else than
sha256sum and wc did.";

/// What nobody waits for longer: every part of the demo takes seconds.
const PATIENCE: Duration = Duration::from_mins(2);
/// How many worker processes there are.
const NODES: usize = 3;

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct DemoArgs {
    /// Part 1 with every task on every node: 15 runs instead of 5
    #[arg(long)]
    broadcast: bool,
    /// The tree of part 2 [default: the first large enough one among /usr/include, /usr/share, …]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// At most so many files in part 2
    #[arg(long, value_name = "N", default_value_t = 3_000, value_parser = clap::value_parser!(u32).range(1..))]
    files: u32,
    /// Only this part
    #[arg(long, value_enum, value_name = "PART")]
    only: Option<Part>,
    /// Do not wait for Enter at the end, even on a terminal
    #[arg(long)]
    no_wait: bool,
}

/// A part of the demo.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Five tasks on three nodes
    Tasks,
    /// A real job, with workers dying under it
    Job,
    /// Where to look in the management UI
    Look,
}

/// What every part gets.
struct DemoStage<'a> {
    context: &'a Context,
    arguments: &'a DemoArgs,
    cluster: &'a mut Cluster,
    producer: Producer,
    /// What `--output json` says at the end.
    report: Map<String, Value>,
}

pub(crate) async fn run(context: &Context, arguments: DemoArgs) -> Result<Exit, CliError> {
    let queues: Vec<_> = (1..=NODES).map(own_queue).collect::<Result<_, _>>()?;
    let queues = if arguments.broadcast { queues } else { vec![] };
    let mut cluster = Cluster::start(context, "demo", STOCK_WORKER, &queues).await?;
    let shown = tokio::select! {
        // In this order, so that a part which waits for Ctrl-C itself is asked first.
        biased;
        shown = show(context, &arguments, &mut cluster) => shown,
        exit = context.stop.requested() => Ok(exit),
    };
    cluster.close(context).await;
    shown
}

async fn show(
    context: &Context,
    arguments: &DemoArgs,
    cluster: &mut Cluster,
) -> Result<Exit, CliError> {
    let producer = Producer::connect_as(cluster.config(), "garenne demo").await?;
    cluster.start_collector(&producer).await?;
    let mut stage = DemoStage { context, arguments, cluster, producer, report: Map::new() };
    let mut exit = Exit::Success;
    if stage.shows(Part::Tasks) {
        nodes::show(&mut stage).await?;
    }
    if stage.shows(Part::Job) {
        exit = job::show(&mut stage).await?;
    }
    if stage.shows(Part::Look) {
        look::show(&mut stage).await?;
    }
    if context.output.format == Format::Json {
        stage.report.insert("namespace".to_owned(), json!(stage.cluster.namespace()));
        output::json_line(&stage.report)?;
    }
    stage.producer.close().await;
    Ok(exit)
}

impl DemoStage<'_> {
    fn shows(&self, part: Part) -> bool {
        self.arguments.only.is_none_or(|only| only == part)
    }

    /// A line for people.
    fn say(&self, text: impl Display) -> Result<(), CliError> {
        match self.context.output.format {
            Format::Text => output::line(text),
            Format::Json => Ok(()),
        }
    }

    fn heading(&self, text: &str) -> Result<(), CliError> {
        let paint = Paint::for_stdout();
        let rule = "─".repeat(72_usize.saturating_sub(text.chars().count() + 1));
        self.say(format_args!("\n{} {}", paint.cyan(text), paint.dim(&rule)))
    }
}

/// What node number `number` is called.
fn node_name(number: usize) -> String {
    format!("Node {number}")
}

/// The queue that node number `number` alone serves, for a broadcast.
fn own_queue(number: usize) -> Result<QueueName, CliError> {
    QueueName::new(&format!("node-{number}")).map_err(|error| CliError::unusable(error.to_string()))
}

/// All nodes, alike.
fn nodes(concurrency: usize, prefetch: usize) -> Vec<WorkerSpec> {
    let node = |number| WorkerSpec {
        name: node_name(number),
        queues: vec![QueueName::default()],
        concurrency,
        prefetch,
    };
    (1..=NODES).map(node).collect()
}
