//! `garenne dead purge`: dead letters go for good.

use clap::Args;
use garenne_common::wire::Purged;
use garenne_producer::Producer;

use super::walk::{Care, Walk, Walked, finish};
use super::which::{Which, how_many, page};
use crate::context::Context;
use crate::error::{CliError, Exit};

const EXAMPLES: &str = "\
Examples:
  garenne dead purge 0192f0c1-…
  garenne dead purge --until 7days --dry-run
  garenne dead export --until 7days --file old.jsonl \\
    && garenne dead purge --until 7days --yes

The letters are deleted; that their tasks failed stays on record, and batches
keep their counts. A task that no worker knew (unknown_task) has no such record
yet: the purge ends it as failed, and its batch counts it.

More than one match is asked about; without a terminal give --yes.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Arguments {
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    care: Care,
}

pub(crate) async fn run(context: &Context, arguments: Arguments) -> Result<Exit, CliError> {
    arguments.care.require(&arguments.which)?;
    let producer = tokio::select! {
        producer = context.producer("dead purge") => producer?,
        exit = context.stop.requested() => return Ok(exit),
    };
    let done = if arguments.care.dry_run {
        look(context, &producer, &arguments).await
    } else {
        purge(context, &producer, &arguments).await
    };
    context.close(producer, &done).await;
    done
}

async fn look(
    context: &Context,
    producer: &Producer,
    arguments: &Arguments,
) -> Result<Exit, CliError> {
    let page = page(context, producer, &arguments.which.filter(), None, (1, false)).await?;
    let limit =
        arguments.care.limit.map_or(String::new(), |limit| format!(", the newest {limit} of them"));
    let value = serde_json::json!({ "matches": page.total, "more": page.more_than_total });
    context.output.show(&value, |_| format!("{} would be deleted{limit}", how_many(&page)))?;
    Ok(Exit::Success)
}

async fn purge(
    context: &Context,
    producer: &Producer,
    arguments: &Arguments,
) -> Result<Exit, CliError> {
    let walk = Walk {
        context,
        producer,
        which: &arguments.which,
        verb: "delete",
        care: &arguments.care,
        rate: None,
    };
    let (mut all, mut asked) = (Purged::default(), 0);
    let walked = walk
        .run(async |ids| {
            let purged = producer.purge_within(ids, context.deadline).await?;
            all.purged += purged.purged;
            all.ended += purged.ended;
            asked += ids.len() as u64;
            Ok(())
        })
        .await?;
    // Only ids can be unknown; what a filter found may have been purged by somebody else meanwhile.
    let missing = arguments.which.is_ids_alone() && asked > all.purged && walked == Walked::Through;
    let exit = finish(
        context,
        walked,
        ("deleted", all.purged),
        if missing { Exit::NotYet } else { Exit::Success },
    );
    if missing {
        let missing = asked - all.purged;
        context.output.remark(format_args!("{missing} of the ids are not among the dead letters"));
    }
    if all.ended > 0 {
        context.output.remark(format_args!("{} of them ended as failed by this", all.ended));
    }
    if context.output.format == crate::output::Format::Json {
        crate::output::json_line(&all)?;
    }
    Ok(exit)
}
