//! The command line: its arguments and which function serves which command.
//!
//! One file per group of commands. A command gets a [`Context`] and answers with an [`Exit`]; nothing
//! below this module ends the process or reads the environment.

mod arguments;
mod batch;
mod bench;
mod cancel;
mod cluster;
mod completions;
mod context;
mod dead;
mod demo;
mod doctor;
pub(crate) mod error;
mod explain;
mod map;
mod notices;
mod options;
mod output;
mod screen;
mod submit;
mod task;
mod topology;
mod verify;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use garenne_common::config::LogFormat;

use context::Context;
use error::{CliError, Exit};
use output::Format;

const EXAMPLES: &str = "\
Examples:
  garenne doctor                                       is everything there?
  garenne submit text.count_words '{\"text\":\"a b\"}' --wait
  garenne map text.count_words --arg text < lines.txt  one task per line
  garenne batch wait 0192f0c1-…                        until all have ended
  garenne cancel order-17                              end it, wherever it is
  garenne topology plan                                what is on the broker

Exit codes:
  0  done
  1  done, and a task failed or a check found a problem
  2  could not be done: usage, input, broker or collector
  3  not ended in the time given, or an id that the collector does not know (yet)
  129 SIGHUP, 130 Ctrl-C, 143 SIGTERM, 141 the reader of standard output went away

Every option can also stand in a file (--config) or in the environment
(AMQP_URL, GARENNE__BROKER__NAMESPACE, …); flags win.";

/// Submit tasks to Garenne workers over RabbitMQ, wait for results, look at what happened.
#[derive(Debug, Parser)]
#[command(name = "garenne", version, arg_required_else_help = true, after_help = EXAMPLES)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) globals: Globals,
    #[command(subcommand)]
    command: Command,
}

/// Options that every command takes.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Globals {
    /// A configuration file (TOML)
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The broker
    #[arg(
        help = "The broker: amqp://user:password@host:5672/vhost [default: AMQP_URL, or this machine]"
    )]
    #[arg(long, global = true, value_name = "URL")]
    url: Option<String>,
    /// What all broker objects start with [default: garenne]
    #[arg(long, global = true, value_name = "NS")]
    namespace: Option<String>,
    /// How results and errors look: text or json
    #[arg(long, short, global = true, value_enum, default_value_t, value_name = "FORMAT")]
    #[arg(hide_possible_values = true)]
    pub(crate) output: Format,
    /// How long one step may take that needs the broker or the collector
    #[arg(long, global = true, value_name = "TIME", default_value = "5s", value_parser = options::duration)]
    deadline: Duration,
    /// More log lines on standard error: -v info, -vv debug, -vvv trace
    #[arg(long, short, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    /// What log lines look like: human or json
    #[arg(long, global = true, value_name = "FORMAT", value_parser = options::log_format)]
    log_format: Option<LogFormat>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Submit one task
    Submit(submit::Arguments),
    /// Submit one task per line of a file or of standard input, and print the results
    Map(map::Arguments),
    /// Cancel tasks, or a batch of them
    Cancel(cancel::Arguments),
    /// Look at tasks
    #[command(subcommand)]
    Task(task::Command),
    /// Look at batches, or wait for one
    #[command(subcommand)]
    Batch(batch::Command),
    /// Print done notices as they come, one JSON object a line
    Notices(notices::Arguments),
    /// Look at tasks that were given up, send them again, export or delete them
    #[command(subcommand)]
    Dead(dead::Command),
    /// Show or declare Garenne's exchanges and queues
    #[command(subcommand)]
    Topology(topology::Command),
    /// Check the way from here to a finished task, step by step
    Doctor(doctor::Arguments),
    /// Show Garenne at work: nodes, a real job with nodes dying under it, the management UI
    Demo(demo::Arguments),
    /// Measure throughput, latency and memory here and now, beside a bare client
    Bench(bench::Arguments),
    /// Run tasks while killing workers, broker and all, and certify that nothing is lost
    Verify(verify::Arguments),
    /// Submit for `garenne verify`, which kills this process
    #[command(hide = true)]
    VerifyProducer(verify::submitter::Arguments),
    /// Print a completion script for a shell
    Completions(completions::Arguments),
}

/// Reads the arguments. An error has been explained on standard error when this returns.
pub(crate) fn parse(arguments: &[OsString]) -> Result<Cli, Exit> {
    Cli::try_parse_from(arguments).map_err(|error| explain::usage(&error, arguments))
}

/// Does what the arguments say.
pub(crate) async fn run(cli: Cli) -> Result<Exit, CliError> {
    // These need no broker, and a broken configuration must not keep them from working.
    match &cli.command {
        Command::Completions(arguments) => return completions::run(arguments),
        Command::Doctor(arguments) => return doctor::run(&cli.globals, arguments).await,
        Command::Submit(_)
        | Command::Map(_)
        | Command::Cancel(_)
        | Command::Task(_)
        | Command::Batch(_)
        | Command::Notices(_)
        | Command::Dead(_)
        | Command::Topology(_)
        | Command::Demo(_)
        | Command::Bench(_)
        | Command::Verify(_)
        | Command::VerifyProducer(_) => {}
    }
    let filter = match &cli.command {
        // It breaks connections all the time; that each comes back is no news there.
        Command::Verify(_) => "error,lapin=off",
        Command::Completions(_)
        | Command::Doctor(_)
        | Command::Submit(_)
        | Command::Map(_)
        | Command::Cancel(_)
        | Command::Task(_)
        | Command::Batch(_)
        | Command::Notices(_)
        | Command::Dead(_)
        | Command::Topology(_)
        | Command::Demo(_)
        | Command::Bench(_)
        | Command::VerifyProducer(_) => context::FILTER,
    };
    let context = Context::new(&cli.globals, filter)?;
    match cli.command {
        Command::Submit(arguments) => submit::run(&context, arguments).await,
        Command::Map(arguments) => map::run(&context, arguments).await,
        Command::Cancel(arguments) => context.or_interrupt(cancel::run(&context, arguments)).await,
        Command::Task(command) => context.or_interrupt(task::run(&context, command)).await,
        Command::Batch(command) => context.or_interrupt(batch::run(&context, command)).await,
        Command::Notices(arguments) => notices::run(&context, arguments).await,
        Command::Dead(command) => dead::run(&context, command).await,
        Command::Topology(command) => context.or_interrupt(topology::run(&context, command)).await,
        Command::Demo(arguments) => demo::run(&context, arguments).await,
        Command::Bench(arguments) => bench::run(&context, arguments).await,
        Command::Verify(arguments) => verify::run(&context, arguments).await,
        Command::VerifyProducer(arguments) => verify::submitter::run(&context, arguments).await,
        // Served above.
        Command::Completions(_) | Command::Doctor(_) => Ok(Exit::Success),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_arguments_are_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_teaches_with_examples() {
        let mut root = Cli::command();
        root.build();
        for command in root.get_subcommands().filter(|command| command.get_name() != "help") {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("Example"), "{}", command.get_name());
            let widest = help.lines().map(|line| line.chars().count()).max();
            assert!(widest <= Some(80), "{} has a line of {widest:?}", command.get_name());
        }
    }
}
