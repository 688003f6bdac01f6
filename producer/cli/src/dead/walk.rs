//! Going through many letters page by page: asking a person first, keeping a pace, stopping in order.
//!
//! Pages go from the newest to the oldest and never meet what died after the first one, so a replayed
//! task that dies again is not replayed again by the same command.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use clap::Args;
use garenne_common::TaskId;
use garenne_common::wire::{DeadCursor, DeadFilter, DeadPage};
use garenne_producer::Producer;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::time::Instant;

use super::which::{Which, how_many, letters, page};
use crate::context::Context;
use crate::error::{CliError, Exit};

/// Letters dealt with by one question.
const SLICE: u64 = 200;
/// At a capped rate, how much of a second one slice is.
const SLICES_PER_SECOND: u64 = 5;

/// How carefully.
#[derive(Debug, Args)]
pub(crate) struct Care {
    /// All dead letters, if no filter is given
    #[arg(long)]
    all: bool,
    /// At most so many, the newest
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) limit: Option<u64>,
    /// Only say what would be done
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Do not ask
    #[arg(long, short)]
    yes: bool,
}

impl Care {
    /// All letters are never meant by forgetting to say which.
    pub(crate) fn require(&self, which: &Which) -> Result<(), CliError> {
        if which.is_everything() && !self.all {
            return Err(CliError::unusable("which dead letters?")
                .help("name ids, or filters such as --task and --reason, or say --all"));
        }
        Ok(())
    }
}

/// What is to be done, and how carefully.
pub(crate) struct Walk<'a> {
    pub(crate) context: &'a Context,
    pub(crate) producer: &'a Producer,
    pub(crate) which: &'a Which,
    /// "replay", "purge".
    pub(crate) verb: &'static str,
    pub(crate) care: &'a Care,
    pub(crate) rate: Option<u64>,
}

/// How a walk ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Walked {
    /// At the last letter.
    Through,
    /// By a signal: the letters so far are dealt with, the others are as they were.
    Interrupted(Exit),
    /// Nothing matched.
    Nothing,
    /// A person said no.
    Declined,
}

impl Walk<'_> {
    /// Calls `act` with slices of ids until there are no more.
    pub(crate) async fn run(
        &self,
        mut act: impl AsyncFnMut(&[TaskId]) -> Result<(), CliError>,
    ) -> Result<Walked, CliError> {
        if self.which.is_ids_alone() {
            return self.through_ids(&mut act).await;
        }
        let filter = self.which.filter();
        let mut found = match self.page(&filter, None, 0).await? {
            Ok(first) => first,
            Err(exit) => return Ok(Walked::Interrupted(exit)),
        };
        let (total, more) = (found.total.unwrap_or_default(), found.more_than_total);
        if total == 0 && !more {
            return Ok(Walked::Nothing);
        }
        if (total > 1 || more) && !self.agreed() && !self.ask(&how_many(&found)).await? {
            return Ok(Walked::Declined);
        }
        let mut pace = self.pace(total);
        loop {
            let ids: Vec<_> = found.letters.into_iter().map(|letter| letter.id).collect();
            if !ids.is_empty() {
                if let Some(exit) = pace.keep(self.context).await {
                    return Ok(Walked::Interrupted(exit));
                }
                act(&ids).await?;
                pace.done(ids.len());
            }
            if found.next.is_none() || self.slice(pace.done).is_none() {
                return Ok(Walked::Through);
            }
            found = match self.page(&filter, found.next, pace.done).await? {
                Ok(next) => next,
                Err(exit) => return Ok(Walked::Interrupted(exit)),
            };
        }
    }

    /// The next page, unless a signal comes first.
    async fn page(
        &self,
        filter: &DeadFilter,
        from: Option<DeadCursor>,
        done: u64,
    ) -> Result<Result<DeadPage, Exit>, CliError> {
        let slice = self.slice(done).unwrap_or(1);
        let asked = page(self.context, self.producer, filter, from, (slice, false));
        tokio::select! {
            page = asked => page.map(Ok),
            exit = self.context.stop.requested() => Ok(Err(exit)),
        }
    }

    /// Whether nobody needs to be asked: a person has agreed, or nothing is changed anyway.
    fn agreed(&self) -> bool {
        self.care.yes || self.care.dry_run
    }

    /// Whoever has named every letter is not asked again.
    async fn through_ids(
        &self,
        act: &mut impl AsyncFnMut(&[TaskId]) -> Result<(), CliError>,
    ) -> Result<Walked, CliError> {
        let mut rest = &self.which.ids[..];
        let mut pace = self.pace(rest.len() as u64);
        while let Some(slice) = self.slice(pace.done).filter(|_| !rest.is_empty()) {
            let slice = usize::try_from(slice).unwrap_or(rest.len()).min(rest.len());
            if let Some(exit) = pace.keep(self.context).await {
                return Ok(Walked::Interrupted(exit));
            }
            act(&rest[..slice]).await?;
            pace.done(slice);
            rest = &rest[slice..];
        }
        Ok(Walked::Through)
    }

    /// How many letters the next question is about; `None` when the limit is reached.
    fn slice(&self, done: u64) -> Option<u64> {
        let left = self.care.limit.map_or(u64::MAX, |limit| limit - done.min(limit));
        let paced = self.rate.map_or(SLICE, |rate| (rate / SLICES_PER_SECOND).clamp(1, SLICE));
        Some(left.min(paced)).filter(|slice| *slice > 0)
    }

    fn pace(&self, total: u64) -> DurationEstimates {
        let total = self.care.limit.map_or(total, |limit| limit.min(total));
        // Draws on standard error, and only where that is a terminal.
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len}  {per_sec}  ETA {eta}");
        let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = if total > SLICE || self.rate.is_some() {
            ProgressBar::new(total).with_style(style)
        } else {
            ProgressBar::hidden()
        };
        self.context.screen.share(&bar);
        DurationEstimates { rate: self.rate, started: Instant::now(), done: 0, bar }
    }

    async fn ask(&self, how_many: &str) -> Result<bool, CliError> {
        let verb = self.verb;
        let limited = match self.care.limit {
            Some(limit) => format!("the newest {limit} of {how_many}"),
            None => how_many.to_owned(),
        };
        if !std::io::stdin().is_terminal() {
            return Err(CliError::unusable(format!("this would {verb} {limited}")).help(
                "add --yes if that is meant, or --dry-run to look first; letters named by id need neither",
            ));
        }
        // A prompt is for the terminal, whatever becomes of standard output.
        let mut prompt = std::io::stderr();
        drop(write!(prompt, "{verb} {limited}? [y/N] ").and_then(|()| prompt.flush()));
        let answer = tokio::task::spawn_blocking(|| {
            let mut line = String::new();
            std::io::stdin().read_line(&mut line).map(|_| line)
        });
        tokio::select! {
            answer = answer => {
                let line = answer.map(Result::unwrap_or_default).unwrap_or_default();
                Ok(["y", "yes"].contains(&line.trim().to_ascii_lowercase().as_str()))
            }
            _ = self.context.stop.requested() => Ok(false),
        }
    }
}

/// Not faster than asked for, and how far it is.
struct DurationEstimates {
    rate: Option<u64>,
    started: Instant,
    done: u64,
    bar: ProgressBar,
}

impl DurationEstimates {
    /// Waits until the next slice is due.
    async fn keep(&self, context: &Context) -> Option<Exit> {
        let due = match self.rate {
            Some(rate) => {
                let millis = self.done.saturating_mul(1_000) / rate.max(1);
                self.started + Duration::from_millis(millis)
            }
            None => self.started,
        };
        tokio::select! {
            biased;
            exit = context.stop.requested() => Some(exit),
            () = tokio::time::sleep_until(due) => None,
        }
    }

    fn done(&mut self, letters: usize) {
        self.done += letters as u64;
        self.bar.set_position(self.done);
    }
}

impl Drop for DurationEstimates {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// The last word of a command, and its exit code.
pub(crate) fn finish(
    context: &Context,
    walked: Walked,
    (past, done): (&str, u64),
    exit: Exit,
) -> Exit {
    match walked {
        Walked::Nothing => {
            context.output.remark("no dead letter matches");
            Exit::Success
        }
        Walked::Declined => {
            context.output.remark("nothing was done");
            Exit::Success
        }
        Walked::Through => {
            context.output.remark(format_args!("{past} {}", letters(done)));
            exit
        }
        Walked::Interrupted(signal) => {
            let done = letters(done);
            context.output.remark(format_args!("{past} {done}; the others are as they were"));
            signal
        }
    }
}
