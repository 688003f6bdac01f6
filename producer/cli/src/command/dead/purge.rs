//! `garenne dead purge`: deletes dead letters permanently.

use clap::Args;
use garenne_common::wire::Purged;
use garenne_producer::Producer;

use super::selection::{PageRequest, Selection, how_many, page};
use super::walk::{SafetyArgs, Walk, Walked, finish};
use crate::context::Context;
use crate::error::{CliError, Exit};

const EXAMPLES: &str = "\
Examples:
  garenne dead purge 0192f0c1-…
  garenne dead purge --until 7days --dry-run
  garenne dead export --until 7days --file old.jsonl \\
    && garenne dead purge --until 7days --yes

The letters are deleted. The final records of their tasks stay, and batches keep
their counts. A parked task (unknown_task) has no final record yet: the purge
ends it as failed, and its batch counts it.

Deleting more than one match by filters needs a confirmation, or --yes without a
terminal. Exit code 3 if an id is unknown.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct DeadPurgeArgs {
    #[command(flatten)]
    selection: Selection,
    #[command(flatten)]
    safety: SafetyArgs,
}

pub(crate) async fn run(context: &Context, arguments: DeadPurgeArgs) -> Result<Exit, CliError> {
    arguments.safety.check(&arguments.selection)?;
    let producer = tokio::select! {
        producer = context.producer("dead purge") => producer?,
        exit = context.stop.requested() => return Ok(exit),
    };
    let done = if arguments.safety.dry_run {
        count(context, &producer, &arguments).await
    } else {
        purge(context, &producer, &arguments).await
    };
    context.close(producer, &done).await;
    done
}

async fn count(
    context: &Context,
    producer: &Producer,
    arguments: &DeadPurgeArgs,
) -> Result<Exit, CliError> {
    let filter = arguments.selection.filter();
    let request = PageRequest { filter: &filter, from: None, limit: 1, whole: false };
    let page = page(context, producer, request).await?;
    let limit = arguments
        .safety
        .limit
        .map_or(String::new(), |limit| format!(", the newest {limit} of them"));
    let value = serde_json::json!({ "matches": page.total, "more": page.more_than_total });
    context.output.show(&value, |_| format!("{} would be deleted{limit}", how_many(&page)))?;
    Ok(Exit::Success)
}

async fn purge(
    context: &Context,
    producer: &Producer,
    arguments: &DeadPurgeArgs,
) -> Result<Exit, CliError> {
    let walk = Walk {
        context,
        producer,
        selection: &arguments.selection,
        verb: "delete",
        safety: &arguments.safety,
        rate: None,
    };
    let (mut all, mut requested) = (Purged::default(), 0);
    let walked = walk
        .run(async |ids| {
            let purged = producer.purge_within(ids, context.deadline).await?;
            all.purged += purged.purged;
            all.ended += purged.ended;
            requested += ids.len() as u64;
            Ok(())
        })
        .await?;
    // Only given ids can be unknown. Letters that a filter found may have been purged by others
    // meanwhile.
    let missing =
        arguments.selection.is_ids_only() && requested > all.purged && walked == Walked::Finished;
    let exit = if missing { Exit::NotYet } else { Exit::Success };
    let exit = finish(context, walked, "deleted", all.purged, exit);
    if missing {
        let missing = requested - all.purged;
        context.output.remark(format_args!("{missing} of the ids are not among the dead letters"));
    }
    if all.ended > 0 {
        context.output.remark(format_args!("{} of their tasks ended as failed", all.ended));
    }
    if context.output.format == crate::output::Format::Json {
        crate::output::json_line(&all)?;
    }
    Ok(exit)
}
