//! `garenne completions`: a completion script for a shell.

use clap::Args;
use clap_complete::Shell;

use crate::error::{CliError, Exit};
use crate::output;

const EXAMPLES: &str = "\
Examples:
  dir=~/.local/share/bash-completion/completions
  mkdir -p $dir && garenne completions bash > $dir/garenne
  garenne completions zsh > ~/.zfunc/_garenne     with ~/.zfunc in $fpath
  garenne completions fish > ~/.config/fish/completions/garenne.fish";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

/// Prints the completion script for the whole `command`.
pub(crate) fn run(
    arguments: &CompletionsArgs,
    command: &mut clap::Command,
) -> Result<Exit, CliError> {
    // Into memory first: clap_complete panics when its writer fails, for instance at a closed pipe.
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, command, "garenne", &mut script);
    let script = String::from_utf8_lossy(&script);
    output::line(script.trim_end())?;
    Ok(Exit::Success)
}
