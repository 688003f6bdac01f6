//! `garenne notices`: done notices as JSON Lines, as they come.

use clap::Args;
use garenne_common::{BatchId, TaskId};
use garenne_producer::{NoticeFilter, Notices};

use super::context::Context;
use super::error::{CliError, Exit};
use super::output::json_line;

const EXAMPLES: &str = "\
Examples:
  garenne notices                                   until Ctrl-C
  garenne notices --batch 0192f0c1-… --count 1      until that batch is done
  garenne notices | jq -r 'select(.subject == \"batch\") | .batch'

Only notices from now on: `garenne batch show` and `garenne task show` know what
was done before. A notice may come twice. A batch has one for all its tasks.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Arguments {
    /// Only the notice of this batch
    #[arg(long, value_name = "ID", conflicts_with = "task")]
    batch: Option<BatchId>,
    /// Only the notice of this task
    #[arg(long, value_name = "ID")]
    task: Option<TaskId>,
    /// Stop after so many
    #[arg(long, short = 'n', value_name = "N")]
    count: Option<u64>,
}

pub(crate) async fn run(context: &Context, arguments: Arguments) -> Result<Exit, CliError> {
    let filter = match (arguments.batch, arguments.task) {
        (Some(batch), _) => NoticeFilter::Batch(batch),
        (None, Some(task)) => NoticeFilter::Task(task),
        (None, None) => NoticeFilter::All,
    };
    let producer = context.producer("notices").await?;
    let mut notices = producer.notices(filter).await?;
    // Whoever starts work in another terminal must know that this one is listening.
    context.output.remark("listening for done notices; Ctrl-C ends");
    let printed = context.or_interrupt(print(&mut notices, arguments.count)).await;
    context.close(producer, &printed).await;
    printed
}

async fn print(notices: &mut Notices, count: Option<u64>) -> Result<Exit, CliError> {
    let mut left = count.unwrap_or(u64::MAX);
    while left > 0 {
        let Some(notice) = notices.next().await else { break };
        json_line(&notice)?;
        left -= 1;
    }
    Ok(Exit::Success)
}
