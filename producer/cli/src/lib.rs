//! The command `garenne`: its arguments, and which function serves which command.
//!
//! One file per group of commands. A command gets a [`Context`] and answers with an [`Exit`]; nothing
//! here but [`finish`] ends the process, and nothing reads the environment. `demo`, `bench` and `verify`
//! are served by the program `garenne-lab`, which shares what is public here: arguments, configuration,
//! output and errors look the same in both.

mod arguments;
mod batch;
mod cancel;
mod completions;
pub mod context;
mod dead;
mod difference;
mod doctor;
pub mod error;
mod explain;
mod globals;
mod lab;
mod map;
mod notices;
pub mod options;
pub mod output;
pub mod screen;
mod submit;
mod task;
mod topology;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use context::Context;
use error::{CliError, Exit};
pub use explain::usage;
pub use globals::Globals;
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
struct Cli {
    #[command(flatten)]
    globals: Globals,
    #[command(subcommand)]
    command: Command,
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
    Demo(lab::Arguments),
    /// Measure throughput, latency and memory here and now, beside a bare client
    Bench(lab::Arguments),
    /// Run tasks while killing workers, broker and all, and certify that nothing is lost
    Verify(lab::Arguments),
    /// Print a completion script for a shell
    Completions(completions::Arguments),
}

/// Does what the arguments say, and says how to exit.
pub fn main(arguments: &[OsString]) -> ExitCode {
    if let Some(asked) = lab::asked_for_help(arguments) {
        return lab::become_lab(&asked, Format::Text).into();
    }
    match Cli::try_parse_from(arguments) {
        Ok(Cli { globals, command: Command::Demo(_) | Command::Bench(_) | Command::Verify(_) }) => {
            lab::become_lab(&arguments[1..], globals.output).into()
        }
        Ok(Cli { globals, command }) => finish(globals.output, run(&globals, command)),
        Err(error) => usage(&error, arguments).into(),
    }
}

/// Runs a command to its end, on a runtime of its own, and prints the error that it ends with.
pub fn finish(format: Format, command: impl Future<Output = Result<Exit, CliError>>) -> ExitCode {
    let ended = match tokio::runtime::Runtime::new() {
        Ok(runtime) => {
            let ended = runtime.block_on(command);
            // A thread that reads standard input cannot be interrupted; waiting for it could last for ever.
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
    // These need no broker, and a broken configuration must not keep them from working.
    match &command {
        Command::Completions(arguments) => return completions::run(arguments),
        Command::Doctor(arguments) => return doctor::run(globals, arguments).await,
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
        | Command::Verify(_) => {}
    }
    let context = Context::new(globals, context::FILTER)?;
    match command {
        Command::Submit(arguments) => submit::run(&context, arguments).await,
        Command::Map(arguments) => map::run(&context, arguments).await,
        Command::Cancel(arguments) => context.or_interrupt(cancel::run(&context, arguments)).await,
        Command::Task(command) => context.or_interrupt(task::run(&context, command)).await,
        Command::Batch(command) => context.or_interrupt(batch::run(&context, command)).await,
        Command::Notices(arguments) => notices::run(&context, arguments).await,
        Command::Dead(command) => dead::run(&context, command).await,
        Command::Topology(command) => context.or_interrupt(topology::run(&context, command)).await,
        // Served above, or by another program.
        Command::Completions(_)
        | Command::Doctor(_)
        | Command::Demo(_)
        | Command::Bench(_)
        | Command::Verify(_) => Ok(Exit::Success),
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
        let elsewhere = ["help", "demo", "bench", "verify"];
        for command in root.get_subcommands().filter(|c| !elsewhere.contains(&c.get_name())) {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("Example"), "{}", command.get_name());
            let widest = help.lines().map(|line| line.chars().count()).max();
            assert!(widest <= Some(80), "{} has a line of {widest:?}", command.get_name());
        }
    }
}
