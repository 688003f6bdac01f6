//! `garenne completions`: a script that teaches a shell this command's words.

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::Cli;
use super::error::{CliError, Exit};
use super::output;

const EXAMPLES: &str = "\
Examples:
  dir=~/.local/share/bash-completion/completions
  mkdir -p $dir && garenne completions bash > $dir/garenne
  garenne completions zsh > ~/.zfunc/_garenne     with ~/.zfunc in $fpath
  garenne completions fish > ~/.config/fish/completions/garenne.fish";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Arguments {
    /// Which shell
    #[arg(value_enum)]
    shell: Shell,
}

pub(crate) fn run(arguments: &Arguments) -> Result<Exit, CliError> {
    // Into memory first: clap_complete panics when its writer fails, as a closed pipe does.
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut Cli::command(), "garenne", &mut script);
    let script = String::from_utf8_lossy(&script);
    output::line(script.trim_end())?;
    Ok(Exit::Success)
}
