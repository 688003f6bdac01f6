//! The program `garenne-lab`: everything that starts, kills, measures or judges a whole system.
//!
//! `garenne demo`, `garenne bench` and `garenne verify` become this program. A command starts its own
//! [`cluster`] of the programs that lie beside it, in a namespace of its own, and leaves nothing behind.

mod bench;
mod cluster;
mod demo;
mod node;
mod verify;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use garenne_cli::context::{self, Context};
use garenne_cli::error::{CliError, Exit};
use garenne_cli::{Globals, finish, usage};

/// See docs/decisions/0021-mimalloc.md.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// It breaks connections all the time; that each comes back is no news there.
const VERIFY_FILTER: &str = "error,lapin=off";

/// Start a whole Garenne, look at it, measure it, break it.
#[derive(Debug, Parser)]
#[command(name = "garenne", bin_name = "garenne", version, arg_required_else_help = true)]
struct Cli {
    #[command(flatten)]
    globals: Globals,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show Garenne at work: nodes, a real job with nodes dying under it, the management UI
    Demo(demo::DemoArgs),
    /// Measure throughput, latency and memory here and now, beside a bare client
    Bench(bench::BenchArgs),
    /// Run tasks while killing workers, broker and all, and certify that nothing is lost
    Verify(verify::VerifyArgs),
    /// Submit for `garenne verify`, which kills this process
    #[command(hide = true)]
    VerifyProducer(verify::submitter::SubmitterArgs),
}

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().collect();
    match Cli::try_parse_from(&arguments) {
        Ok(cli) => finish(cli.globals.output, run(cli)),
        Err(error) => usage(&error, &arguments).into(),
    }
}

async fn run(Cli { globals, command }: Cli) -> Result<Exit, CliError> {
    let filter = match &command {
        Command::Verify(_) => VERIFY_FILTER,
        Command::Demo(_) | Command::Bench(_) | Command::VerifyProducer(_) => context::FILTER,
    };
    let context = Context::new(&globals, filter)?;
    match command {
        Command::Demo(arguments) => demo::run(&context, arguments).await,
        Command::Bench(arguments) => bench::run(&context, arguments).await,
        Command::Verify(arguments) => verify::run(&context, arguments).await,
        Command::VerifyProducer(arguments) => verify::submitter::run(&context, arguments).await,
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

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
