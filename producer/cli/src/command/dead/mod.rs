//! `garenne dead`: lists, shows, replays, exports and deletes dead letters, the tasks that failed
//! for good.
//!
//! All subcommands select letters in the same way ([`selection`]). Those that change letters
//! process them slice by slice through [`walk`], so that Ctrl-C leaves each letter either unchanged
//! or completely processed.

mod export;
mod list;
mod purge;
mod replay;
mod selection;
mod show;
mod walk;

use clap::Subcommand;
use garenne_common::TaskId;

use crate::context::Context;
use crate::error::{CliError, Exit};

const EXAMPLES: &str = "\
Examples:
  garenne dead list --reason timed_out --since 2h      recent time-outs
  garenne dead show 0192f0c1-…                         one letter in full
  garenne dead replay --task 'mail.*' --dry-run        what would be replayed
  garenne dead replay --task 'mail.*' --rate 50        replay it, 50 per second
  garenne dead export --until 7days > old.jsonl        keep a copy of old ones
  garenne dead purge --until 7days                     and delete them

A letter must match all given filters; ids can be given instead. Exit codes:
0 done, 1 some letters were refused, 2 not possible, 3 an id is unknown.";

#[derive(Debug, Subcommand)]
#[command(after_help = EXAMPLES)]
pub(crate) enum DeadCommand {
    /// List dead letters, the newest first
    List(list::DeadListArgs),
    /// Show one dead letter: its message, its attempts, what to do
    #[command(after_help = show::EXAMPLES)]
    Show {
        /// The task's id
        id: TaskId,
    },
    /// Submit dead letters again, as new tasks
    Replay(replay::DeadReplayArgs),
    /// Delete dead letters permanently
    Purge(purge::DeadPurgeArgs),
    /// Write complete dead letters as JSON, one per line
    Export(export::DeadExportArgs),
}

pub(crate) async fn run(context: &Context, command: DeadCommand) -> Result<Exit, CliError> {
    match command {
        DeadCommand::List(arguments) => context.or_interrupt(list::run(context, &arguments)).await,
        DeadCommand::Show { id } => context.or_interrupt(show::run(context, &id)).await,
        DeadCommand::Replay(arguments) => replay::run(context, arguments).await,
        DeadCommand::Purge(arguments) => purge::run(context, arguments).await,
        DeadCommand::Export(arguments) => {
            context.or_interrupt(export::run(context, &arguments)).await
        }
    }
}
