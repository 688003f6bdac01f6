//! `garenne dead replay`: submits dead letters again, as new tasks.

use clap::Args;
use garenne_common::QueueName;
use garenne_common::wire::letters::DEFAULT_MAX_REPLAYS;
use garenne_common::wire::{ReplayOutcome, ReplayPlan, Replayed};
use garenne_producer::Producer;

use super::selection::Selection;
use super::walk::{SafetyArgs, Walk, finish};
use crate::context::Context;
use crate::error::{CliError, Exit};
use crate::json_input;
use crate::output::{Format, json_line, line};

const EXAMPLES: &str = "\
Examples:
  garenne dead replay 0192f0c1-…                        one, or several ids
  garenne dead replay --task 'mail.*' --since 2h --dry-run
  garenne dead replay --task 'mail.*' --since 2h --rate 50 --yes
  garenne dead replay --reason unrouted --to-queue cpu
  garenne dead replay 0192f0c1-… --set 'path=\"/data/new\"' --set retries=3
  garenne dead replay 0192f0c1-… --args @corrected.json

A replay is a new task: new id, attempt 1, no batch (its batch has counted the
old task), no deadline, no reply. A parked task (unknown_task) has not ended: it
is submitted again unchanged and keeps all of these.

Prints one line per letter: OLD replayed as NEW in QUEUE. The letter is kept as
replayed: `garenne dead list --replayed`. Replaying more than one match by
filters needs a confirmation, or --yes without a terminal. After Ctrl-C the
letters that were printed are replayed, all others unchanged.

Exit codes: 0 all are replayed, now or before; 1 some were refused; 3 an id is
unknown.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct DeadReplayArgs {
    #[command(flatten)]
    selection: Selection,
    #[command(flatten)]
    safety: SafetyArgs,
    /// At most this many per second
    #[arg(long, value_name = "N", value_parser = rate)]
    rate: Option<u64>,
    /// Send them to this queue instead of their own
    #[arg(long, value_name = "QUEUE")]
    to_queue: Option<QueueName>,
    /// New arguments for all of them: JSON, @FILE, or - for standard input
    #[arg(long, value_name = "JSON")]
    args: Option<String>,
    /// A new value for one key of the arguments; may be repeated. Other keys are kept as they were
    /// written
    #[arg(long, value_name = "KEY=JSON", value_parser = pair)]
    set: Vec<(String, String)>,
    /// Refuse letters that were replayed this often
    #[arg(long, value_name = "N", default_value_t = DEFAULT_MAX_REPLAYS)]
    max_replays: u32,
    /// Replay letters however often they were replayed
    #[arg(long, conflicts_with = "max_replays")]
    force: bool,
}

pub(crate) async fn run(context: &Context, arguments: DeadReplayArgs) -> Result<Exit, CliError> {
    arguments.safety.check(&arguments.selection)?;
    let plan = plan(&arguments)?;
    let producer = tokio::select! {
        producer = context.producer("dead replay") => producer?,
        exit = context.stop.requested() => return Ok(exit),
    };
    let done = replay(context, &producer, &arguments, &plan).await;
    context.close(producer, &done).await;
    done
}

async fn replay(
    context: &Context,
    producer: &Producer,
    arguments: &DeadReplayArgs,
    plan: &ReplayPlan,
) -> Result<Exit, CliError> {
    let walk = Walk {
        context,
        producer,
        selection: &arguments.selection,
        verb: "replay",
        safety: &arguments.safety,
        rate: arguments.rate.filter(|_| !plan.dry_run),
    };
    let mut counts = ReplayCounts::default();
    let walked = walk
        .run(async |ids| {
            let replayed = producer.replay_within(ids, plan, context.deadline).await?;
            replayed.iter().try_for_each(|letter| {
                counts.add(letter);
                print(context, plan.dry_run, letter)
            })
        })
        .await?;
    let past = if plan.dry_run { "would replay" } else { "replayed" };
    let exit = finish(context, walked, past, counts.replayed, counts.exit());
    if counts.refused > 0 {
        context.output.remark(format_args!("refused {}, see above", counts.refused));
    }
    Ok(exit)
}

/// Numbers of letters by outcome.
#[derive(Default)]
struct ReplayCounts {
    replayed: u64,
    refused: u64,
    missing: u64,
}

impl ReplayCounts {
    fn add(&mut self, letter: &Replayed) {
        match letter.outcome {
            ReplayOutcome::Replayed { .. } => self.replayed += 1,
            ReplayOutcome::Already { .. } => {}
            ReplayOutcome::Refused { .. } => self.refused += 1,
            ReplayOutcome::NotFound => self.missing += 1,
        }
    }

    fn exit(&self) -> Exit {
        match (self.refused, self.missing) {
            (0, 0) => Exit::Success,
            (0, _) => Exit::NotYet,
            (_, _) => Exit::Failed,
        }
    }
}

fn print(context: &Context, dry_run: bool, letter: &Replayed) -> Result<(), CliError> {
    if context.output.format == Format::Json {
        return json_line(letter);
    }
    let id = &letter.id;
    match &letter.outcome {
        ReplayOutcome::Replayed { queue, .. } if dry_run => {
            line(format_args!("{id} would be replayed in {queue}"))
        }
        ReplayOutcome::Replayed { new_id, queue } if queue.is_empty() => {
            line(format_args!("{id} replayed as {new_id}"))
        }
        ReplayOutcome::Replayed { new_id, queue } => {
            line(format_args!("{id} replayed as {new_id} in {queue}"))
        }
        ReplayOutcome::Already { new_id } => {
            line(format_args!("{id} was replayed before, as {new_id}"))
        }
        ReplayOutcome::Refused { error } => line(format_args!("{id} refused: {error}")),
        ReplayOutcome::NotFound => line(format_args!("{id} is not among the dead letters")),
    }
}

fn plan(arguments: &DeadReplayArgs) -> Result<ReplayPlan, CliError> {
    let args = arguments.args.as_deref().map(|given| {
        json_input::read_given(given, || {
            "quote them for the shell: --args '{\"key\":\"value\"}'; - reads standard input, \
             @FILE a file"
                .to_owned()
        })
    });
    Ok(ReplayPlan {
        queue: arguments.to_queue.clone(),
        args: args.transpose()?.map(|args| args.get().to_owned()),
        set: arguments.set.clone(),
        max_replays: if arguments.force { u32::MAX } else { arguments.max_replays },
        late: arguments.selection.late,
        dry_run: arguments.safety.dry_run,
    })
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("write KEY=JSON")?;
    let value = json_input::check(value).map_err(|problem| {
        format!("the value is not JSON: {problem}; text needs quotes of its own: '{key}=\"text\"'")
    })?;
    Ok((key.to_owned(), value.get().to_owned()))
}

/// Parses `50` or `50/s`.
fn rate(text: &str) -> Result<u64, String> {
    let number = text.strip_suffix("/s").unwrap_or(text);
    let rate = number.parse().ok().filter(|rate| *rate > 0);
    rate.ok_or_else(|| "write a whole number of letters per second, such as 50".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_that_is_not_json_is_refused_with_advice_on_quoting() {
        assert_eq!(pair("a=1"), Ok(("a".to_owned(), "1".to_owned())));
        assert_eq!(pair("a=\"b=c\""), Ok(("a".to_owned(), "\"b=c\"".to_owned())));
        assert!(pair("a=text").unwrap_err().contains("'a=\"text\"'"));
        assert!(pair("a").unwrap_err().contains("KEY=JSON"));
    }

    #[test]
    fn a_rate_is_a_whole_number_above_zero() {
        assert_eq!((rate("50"), rate("50/s")), (Ok(50), Ok(50)));
        for wrong in ["0", "-1", "fast", "1.5"] {
            assert!(rate(wrong).is_err(), "{wrong}");
        }
    }
}
