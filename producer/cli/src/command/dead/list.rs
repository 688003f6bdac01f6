//! `garenne dead list`: dead letters as a table, one row each, and their number.

use clap::Args;
use comfy_table::Color;
use garenne_common::wire::{DeadPage, DeadSummary, LetterState};
use garenne_producer::Producer;

use super::selection::{PageRequest, Selection, how_many, page};
use crate::context::Context;
use crate::error::{CliError, Exit};
use crate::output::{Format, Paint, cell, keep_whole, rendered, table};

const EXAMPLES: &str = "\
Examples:
  garenne dead list --limit 50
  garenne dead list --task 'mail.*' --reason timed_out,panicked --since 2h
  garenne dead list --error 'connection refused' --queue cpu
  garenne dead list --replayed
  garenne dead list -o json --limit 1000 | jq -r '.[] | .id'

Reasons: retries_exhausted, fatal, timed_out, panicked, crashed, expired,
malformed, unknown_task, unrouted, broker.";

/// Characters of an error in a list; `show` prints all of it.
const SHORT_ERROR: usize = 120;
/// The most letters in one query.
const PAGE: u64 = 1_000;

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct DeadListArgs {
    #[command(flatten)]
    selection: Selection,
    /// Instead of the others, letters that were replayed
    #[arg(long, conflicts_with = "late")]
    replayed: bool,
    /// At most this many
    #[arg(long, value_name = "N", default_value_t = 20)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=100_000))]
    limit: u64,
}

pub(crate) async fn run(context: &Context, arguments: &DeadListArgs) -> Result<Exit, CliError> {
    let producer = context.producer("dead list").await?;
    let found = find(context, &producer, arguments).await;
    context.close(producer, &found).await;
    let found = found?;
    let text = context.output.format == Format::Text;
    if found.letters.is_empty() && text {
        context.output.remark("no dead letters");
        return Ok(Exit::Success);
    }
    context.output.show(&found.letters, |paint| as_table(&found.letters, paint))?;
    if found.next.is_some() {
        let all = how_many(&found);
        let shown = found.letters.len();
        context.output.remark(format_args!("the newest {shown} of {all}; --limit shows more"));
    }
    Ok(Exit::Success)
}

async fn find(
    context: &Context,
    producer: &Producer,
    arguments: &DeadListArgs,
) -> Result<DeadPage, CliError> {
    let mut filter = arguments.selection.filter();
    if arguments.replayed {
        filter.state = LetterState::Replayed;
    }
    let mut found = DeadPage::default();
    loop {
        let missing = arguments.limit - found.letters.len() as u64;
        let (from, limit) = (found.next, missing.min(PAGE));
        let request = PageRequest { filter: &filter, from, limit, whole: false };
        let next = page(context, producer, request).await?;
        if next.total.is_some() {
            (found.total, found.more_than_total) = (next.total, next.more_than_total);
        }
        found.next = next.next;
        found.letters.extend(next.letters);
        if found.next.is_none() || found.letters.len() as u64 >= arguments.limit {
            return Ok(found);
        }
    }
}

fn as_table(letters: &[DeadSummary], paint: Paint) -> String {
    let mut table = table(["ID", "TASK AND REASON", "ERROR"], paint);
    keep_whole(&mut table, 1);
    for letter in letters {
        // On two lines, because side by side they would leave no room for the error.
        let name = letter.name.as_deref().unwrap_or("(no name)");
        let what = format!("{name}\n{}", letter.reason.as_str());
        let error = match &letter.replayed_as {
            Some(new) => format!("{}\nreplayed as {new}", first_line(&letter.error)),
            None => first_line(&letter.error),
        };
        table.add_row([
            cell(format_args!("{}\n{}", letter.id, letter.at), None, paint),
            cell(what, Some(Color::Yellow), paint),
            cell(error, None, paint),
        ]);
    }
    rendered(&table)
}

fn first_line(error: &str) -> String {
    let line = error.lines().next().unwrap_or_default();
    if line.chars().count() > SHORT_ERROR {
        line.chars().take(SHORT_ERROR).chain(['…']).collect()
    } else {
        line.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::dead::show::tests::letter;

    #[test]
    fn a_list_contains_only_the_first_line_of_an_error() {
        let text = as_table(&[letter()], Paint::plain());
        assert!(text.contains('…') && !text.contains("second"), "{text}");
    }
}
