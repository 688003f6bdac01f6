//! `garenne notices`: done notices as JSON Lines, as they arrive.

use clap::Args;
use garenne_common::{BatchId, TaskId};
use garenne_producer::{NoticeFilter, Notices};

use crate::context::Context;
use crate::error::{CliError, Exit};
use crate::output::json_line;

const EXAMPLES: &str = "\
Examples:
  garenne notices                                   until Ctrl-C
  garenne notices --batch 0192f0c1-… --count 1      until that batch is done
  garenne notices | jq -r 'select(.subject == \"batch\") | .batch'

Prints only notices that are published from now on; `garenne batch show` and
`garenne task show` know what was done before. A notice may arrive twice.
The tasks of a batch have one notice together, that of the batch.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct NoticesArgs {
    /// Only the notice of this batch
    #[arg(long, value_name = "ID", conflicts_with = "task")]
    batch: Option<BatchId>,
    /// Only the notice of this task
    #[arg(long, value_name = "ID")]
    task: Option<TaskId>,
    /// Stop after this many notices
    #[arg(long, short = 'n', value_name = "N")]
    count: Option<u64>,
}

pub(crate) async fn run(context: &Context, arguments: NoticesArgs) -> Result<Exit, CliError> {
    let filter = match (arguments.batch, arguments.task) {
        (Some(batch), _) => NoticeFilter::Batch(batch),
        (None, Some(task)) => NoticeFilter::Task(task),
        (None, None) => NoticeFilter::All,
    };
    let producer = context.producer("notices").await?;
    let mut notices = producer.notices(filter).await?;
    // For people who start work in another terminal: from now on no notice is missed.
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
