//! `garenne dead`: the tasks that were given up. Look at them, send them again, export or delete them.
//!
//! Which letters is the same for all subcommands ([`which`]). What changes something goes letter by
//! letter through [`walk`], so that Ctrl-C leaves each letter either as it was or wholly dealt with.

mod export;
mod list;
mod purge;
mod replay;
mod show;
mod walk;
mod which;

use clap::Subcommand;
use garenne_common::TaskId;

use super::context::Context;
use super::error::{CliError, Exit};

const EXAMPLES: &str = "\
Examples:
  garenne dead list --reason timed_out --since 2h      what died lately
  garenne dead show 0192f0c1-…                         all that is known of one
  garenne dead replay --task 'mail.*' --dry-run        what would be sent again
  garenne dead replay --task 'mail.*' --rate 50        and send it, 50 a second
  garenne dead export --until 7days > old.jsonl        keep the old ones,
  garenne dead purge --until 7days                     and delete them

All filters must hold at once; ids may stand in their place. Exit codes: 0 done,
1 some letters were refused, 2 could not be done, 3 an id is not known.";

#[derive(Debug, Subcommand)]
#[command(after_help = EXAMPLES)]
pub(crate) enum Command {
    /// List dead letters, the newest first
    List(list::Arguments),
    /// Show one dead letter whole: its message, its attempts, what to do
    #[command(after_help = show::EXAMPLES)]
    Show {
        /// The task's id
        id: TaskId,
    },
    /// Send dead letters to the workers again, as new tasks
    Replay(replay::Arguments),
    /// Delete dead letters for good
    Purge(purge::Arguments),
    /// Write whole dead letters as JSON, one a line
    Export(export::Arguments),
}

pub(crate) async fn run(context: &Context, command: Command) -> Result<Exit, CliError> {
    match command {
        Command::List(arguments) => context.or_interrupt(list::run(context, &arguments)).await,
        Command::Show { id } => context.or_interrupt(show::run(context, &id)).await,
        Command::Replay(arguments) => replay::run(context, arguments).await,
        Command::Purge(arguments) => purge::run(context, arguments).await,
        Command::Export(arguments) => context.or_interrupt(export::run(context, &arguments)).await,
    }
}
