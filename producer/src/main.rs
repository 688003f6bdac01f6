//! The `garenne` command. Only the frame is here; what it does is in [`cli`].

mod cli;

use std::process::ExitCode;

use cli::error::{CliError, Exit};

/// See docs/decisions/0021-mimalloc.md.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().collect();
    let cli = match cli::parse(&arguments) {
        Ok(cli) => cli,
        Err(exit) => return exit.into(),
    };
    let format = cli.globals.output;
    let exit = start(cli).unwrap_or_else(|error| {
        error.print(format);
        error.exit
    });
    exit.into()
}

fn start(cli: cli::Cli) -> Result<Exit, CliError> {
    let runtime = tokio::runtime::Runtime::new()
        .map_err(|error| CliError::unusable(format!("cannot start: {error}")))?;
    let exit = runtime.block_on(cli::run(cli));
    // A thread that reads standard input cannot be interrupted; waiting for it could last for ever.
    runtime.shutdown_background();
    exit
}
