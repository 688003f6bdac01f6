//! The command `garenne`: its arguments, and which function runs which command.
//!
//! `command` has a file or folder for each command. Nothing here but [`finish`] and a second
//! signal ends the process, and nothing reads the environment. `demo`, `bench` and `verify` are run
//! by the program `garenne-lab`, which shares what is public here, so that arguments,
//! configuration, output and errors look the same in both.

mod command;
pub mod context;
mod difference;
pub mod error;
mod globals;
mod json_input;
pub mod options;
pub mod output;
pub mod screen;
mod times;
mod usage;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use command::{
    batch, cancel, completions, dead, doctor, lab, map, notices, submit, task, topology,
};
use context::Context;
use error::{CliError, Exit};
pub use globals::Globals;
use output::Format;
pub use usage::usage;

const EXAMPLES: &str = "\
Examples:
  garenne doctor                                       check the whole setup
  garenne submit text.count_words '{\"text\":\"a b\"}' --wait
  garenne map text.count_words --arg text < lines.txt  one task per line
  garenne batch wait 0192f0c1-…                        until all tasks have ended
  garenne cancel order-17                              queued, delayed or running
  garenne topology plan                                what exists on the broker

Exit codes:
  0  success
  1  completed, but a task failed or a check found a problem
  2  not possible: usage, input, broker or collector
  3  not ended within the given time, or the collector does not know the id (yet)
  129 SIGHUP, 130 Ctrl-C, 143 SIGTERM, 141 standard output was closed

Every option can also be set in a file (--config) or in the environment
(AMQP_URL, GARENNE__BROKER__NAMESPACE, …); flags have precedence.";

/// Submit tasks to Garenne workers over RabbitMQ, wait for results, inspect what happened.
#[derive(Debug, Parser)]
#[command(name = "garenne", version, arg_required_else_help = true, after_help = EXAMPLES)]
struct Cli {
    #[command(flatten)]
    globals: Globals,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Submit one task
    Submit(submit::SubmitArgs),
    /// Submit one task per line of a file or of standard input, and print the results
    Map(map::MapArgs),
    /// Cancel tasks or a batch
    Cancel(cancel::CancelArgs),
    /// Show the state of tasks
    #[command(subcommand)]
    Task(task::TaskCommand),
    /// Show batches, or wait for one
    #[command(subcommand)]
    Batch(batch::BatchCommand),
    /// Print done notices as they arrive, one JSON object per line
    Notices(notices::NoticesArgs),
    /// List, show, replay, export or delete dead letters: tasks that failed for good
    #[command(subcommand)]
    Dead(dead::DeadCommand),
    /// Show or declare Garenne's exchanges and queues
    #[command(subcommand)]
    Topology(topology::TopologyCommand),
    /// Check the way from here to a finished task, step by step
    Doctor(doctor::DoctorArgs),
    #[command(flatten)]
    Lab(lab::LabCommand),
    /// Print a completion script for a shell
    Completions(completions::CompletionsArgs),
}

/// Runs the command in `arguments` (the first is the program's name) and returns its exit code.
pub fn main(arguments: &[OsString]) -> ExitCode {
    if let Some(help) = lab::help_request(arguments) {
        return lab::replace_process(&help, Format::Text).into();
    }
    match Cli::try_parse_from(arguments) {
        Ok(Cli { globals, command: Command::Lab(_) }) => {
            lab::replace_process(&arguments[1..], globals.output).into()
        }
        Ok(Cli { globals, command }) => finish(globals.output, run(&globals, command)),
        Err(error) => usage(&error, arguments).into(),
    }
}

/// Runs a command on a runtime of its own, prints the error that it ends with, and returns its exit
/// code.
pub fn finish(format: Format, command: impl Future<Output = Result<Exit, CliError>>) -> ExitCode {
    let ended = match tokio::runtime::Runtime::new() {
        Ok(runtime) => {
            let ended = runtime.block_on(command);
            // A thread that reads standard input cannot be interrupted, so it is not waited for.
            runtime.shutdown_background();
            ended
        }
        Err(error) => Err(CliError::unusable(format!("cannot start: {error}"))),
    };
    let exit = ended.unwrap_or_else(|error| {
        output::print_error(&error, format);
        error.exit
    });
    exit.into()
}

async fn run(globals: &Globals, command: Command) -> Result<Exit, CliError> {
    let context = || Context::new(globals, context::FILTER);
    match command {
        Command::Submit(arguments) => submit::run(&context()?, arguments).await,
        Command::Map(arguments) => map::run(&context()?, arguments).await,
        Command::Cancel(arguments) => cancel::run(&context()?, arguments).await,
        Command::Task(command) => task::run(&context()?, command).await,
        Command::Batch(command) => batch::run(&context()?, command).await,
        Command::Notices(arguments) => notices::run(&context()?, arguments).await,
        Command::Dead(command) => dead::run(&context()?, command).await,
        Command::Topology(command) => topology::run(&context()?, command).await,
        // These must work even if the configuration is not valid.
        Command::Doctor(arguments) => doctor::run(globals, &arguments).await,
        Command::Completions(arguments) => {
            completions::run(&arguments, &mut lab::with_options(Cli::command()))
        }
        // `main` has replaced the process before.
        Command::Lab(_) => Ok(Exit::Success),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_of_the_arguments_is_valid() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_examples_in_its_help() {
        let mut root = Cli::command();
        root.build();
        let without = ["help", "demo", "bench", "verify"];
        for command in root.get_subcommands().filter(|c| !without.contains(&c.get_name())) {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("Example"), "{}", command.get_name());
            let widest = help.lines().map(|line| line.chars().count()).max();
            assert!(widest <= Some(80), "{} has a line of {widest:?}", command.get_name());
        }
    }
}
