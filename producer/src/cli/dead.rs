//! `garenne dead`: the tasks that were given up. Looking only; nothing here brings one back.

use clap::Subcommand;
use comfy_table::Color;
use garenne_common::TaskId;
use garenne_common::wire::{Answer, DeadSummary, Question};

use super::context::Context;
use super::error::{CliError, Exit};
use super::output::{Format, Paint, cell, facts, keep_whole, table};

const EXAMPLES: &str = "\
Examples:
  garenne dead list --limit 50
  garenne dead list -o json | jq -r '.[] | select(.reason == \"timed_out\") | .id'
  garenne dead show 0192f0c1-7a55-7e22-9c53-1f8e3a1d4b6a";

/// An error in a list is cut to this many characters; `show` has it whole.
const SHORT_ERROR: usize = 120;

#[derive(Debug, Subcommand)]
#[command(after_help = EXAMPLES)]
pub(crate) enum Command {
    /// List the newest dead letters
    #[command(after_help = EXAMPLES)]
    List {
        /// At most so many, up to 1000
        #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
        limit: u32,
    },
    /// Show one dead letter whole
    #[command(after_help = EXAMPLES)]
    Show {
        /// The task's id
        id: TaskId,
    },
}

pub(crate) async fn run(context: &Context, command: Command) -> Result<Exit, CliError> {
    match command {
        Command::List { limit } => list(context, limit).await,
        Command::Show { id } => show(context, &id).await,
    }
}

async fn list(context: &Context, limit: u32) -> Result<Exit, CliError> {
    let producer = context.producer("dead list").await?;
    let answer = context.ask(&producer, Question::DeadList { limit }).await;
    context.close(producer, &answer).await;
    let Answer::DeadList { letters } = answer? else { return Err(CliError::unexpected_answer()) };
    if letters.is_empty() && context.output.format == Format::Text {
        context.output.remark("no dead letters");
    } else {
        context.output.show(&letters, |paint| as_table(&letters, paint))?;
    }
    Ok(Exit::Success)
}

async fn show(context: &Context, id: &TaskId) -> Result<Exit, CliError> {
    let producer = context.producer("dead show").await?;
    let answer = context.ask(&producer, Question::Dead { id: id.clone() }).await;
    context.close(producer, &answer).await;
    let Answer::Dead { letter } = answer? else { return Err(CliError::unexpected_answer()) };
    let Some(letter) = letter else {
        return Err(CliError::unusable(format!("there is no dead letter {id}"))
            .exit(Exit::NotYet)
            .help("`garenne dead list` shows those there are, `garenne task show` how the task stands"));
    };
    context.output.show(&letter, |paint| describe(&letter, paint))?;
    Ok(Exit::Success)
}

fn as_table(letters: &[DeadSummary], paint: Paint) -> String {
    let mut table = table(["ID", "TASK AND REASON", "ERROR"], paint);
    keep_whole(&mut table, 1);
    for letter in letters {
        // One above the other: side by side they would leave no room for the error.
        let name = letter.name.as_deref().unwrap_or("(no name)");
        let what = format!("{name}\n{}", letter.reason.as_str());
        table.add_row([
            cell(&letter.id, None, paint),
            cell(what, Some(Color::Yellow), paint),
            cell(first_line(&letter.error), None, paint),
        ]);
    }
    table.trim_fmt()
}

fn first_line(error: &str) -> String {
    let line = error.lines().next().unwrap_or_default();
    if line.chars().count() > SHORT_ERROR {
        line.chars().take(SHORT_ERROR).chain(['…']).collect()
    } else {
        line.to_owned()
    }
}

fn describe(letter: &DeadSummary, paint: Paint) -> String {
    let args = letter.args.as_ref().and_then(|args| serde_json::to_string_pretty(args).ok());
    let size = format!("{} bytes", letter.body_bytes);
    facts(&[
        ("task", Some(letter.id.to_string())),
        ("name", letter.name.clone()),
        ("queue", Some(letter.queue.clone())),
        ("reason", Some(paint.red(letter.reason.as_str()))),
        ("error", Some(letter.error.clone())),
        ("given up", Some(format!("{} by {}", letter.at, letter.by))),
        ("body", Some(args.unwrap_or(format!("{size}, not JSON")))),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use garenne_common::{DeadReason, Timestamp};

    fn letter() -> DeadSummary {
        DeadSummary {
            id: TaskId::new("t-1").unwrap(),
            name: None,
            queue: "cpu".to_owned(),
            reason: DeadReason::Malformed,
            error: format!("{}\nsecond", "x".repeat(200)),
            by: "host:1".to_owned(),
            at: Timestamp::from_millis(0),
            body_bytes: 17,
            args: None,
        }
    }

    #[test]
    fn a_list_shows_one_line_of_an_error_and_a_letter_all() {
        let text = as_table(&[letter()], Paint::plain());
        assert!(text.contains('…') && !text.contains("second"), "{text}");
        let text = describe(&letter(), Paint::plain());
        assert!(text.contains("second") && text.contains("17 bytes, not JSON"), "{text}");
    }
}
