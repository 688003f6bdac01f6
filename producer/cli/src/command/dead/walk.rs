//! Processing many letters page by page: confirmation first, then slices at a limited rate until
//! the end or a signal.
//!
//! Ids come in through queries and go to the action of a subcommand. Pages go from the newest
//! letter to the oldest and exclude letters that were stored after the first page, so a replayed
//! task that fails again is not replayed again by the same command.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use clap::Args;
use garenne_common::TaskId;
use garenne_common::wire::{DeadCursor, DeadFilter, DeadPage};
use garenne_producer::Producer;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::time::Instant;

use super::selection::{PageRequest, Selection, how_many, letters, page};
use crate::context::Context;
use crate::error::{CliError, Exit};

/// Letters per query.
const SLICE: u64 = 200;
/// Slices per second at a limited rate.
const SLICES_PER_SECOND: u64 = 5;

/// Options of commands that change letters.
#[derive(Debug, Args)]
pub(crate) struct SafetyArgs {
    /// Select all dead letters
    #[arg(long)]
    all: bool,
    /// At most this many, the newest first
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) limit: Option<u64>,
    /// Only print what would be done
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Do not ask for confirmation
    #[arg(long, short)]
    yes: bool,
}

impl SafetyArgs {
    /// Requires `--all` for a selection of all letters, so that a forgotten filter affects nothing.
    pub(crate) fn check(&self, selection: &Selection) -> Result<(), CliError> {
        if selection.is_everything() && !self.all {
            return Err(CliError::unusable("no dead letters are selected")
                .help("give ids, or filters such as --task and --reason, or --all"));
        }
        Ok(())
    }
}

/// What is to be done with which letters.
pub(crate) struct Walk<'a> {
    pub(crate) context: &'a Context,
    pub(crate) producer: &'a Producer,
    pub(crate) selection: &'a Selection,
    /// The verb of the prompt: "replay", "delete".
    pub(crate) verb: &'static str,
    pub(crate) safety: &'a SafetyArgs,
    /// The most letters per second.
    pub(crate) rate: Option<u64>,
}

/// How a walk ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Walked {
    /// All letters were processed.
    Finished,
    /// A signal arrived: the letters so far are processed, the others unchanged.
    Interrupted(Exit),
    /// No letter matched.
    Nothing,
    /// The confirmation was denied.
    Declined,
}

impl Walk<'_> {
    /// Calls `act` with slices of ids until there are no more letters or a signal arrives.
    pub(crate) async fn run(
        &self,
        mut act: impl AsyncFnMut(&[TaskId]) -> Result<(), CliError>,
    ) -> Result<Walked, CliError> {
        if self.selection.is_ids_only() {
            return self.process_ids(&mut act).await;
        }
        let filter = self.selection.filter();
        let mut found = match self.page(&filter, None, 0).await? {
            Ok(first) => first,
            Err(exit) => return Ok(Walked::Interrupted(exit)),
        };
        let (total, more) = (found.total.unwrap_or_default(), found.more_than_total);
        if total == 0 && !more {
            return Ok(Walked::Nothing);
        }
        if (total > 1 || more) && !self.is_confirmed() && !self.confirm(&how_many(&found)).await? {
            return Ok(Walked::Declined);
        }
        let mut pacer = self.pacer(total);
        loop {
            let ids: Vec<_> = found.letters.into_iter().map(|letter| letter.id).collect();
            if !ids.is_empty() {
                if let Some(exit) = pacer.wait(self.context).await {
                    return Ok(Walked::Interrupted(exit));
                }
                act(&ids).await?;
                pacer.advance(ids.len());
            }
            if found.next.is_none() || self.slice(pacer.done).is_none() {
                return Ok(Walked::Finished);
            }
            found = match self.page(&filter, found.next, pacer.done).await? {
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
        let limit = self.slice(done).unwrap_or(1);
        let request = PageRequest { filter, from, limit, whole: false };
        tokio::select! {
            page = page(self.context, self.producer, request) => page.map(Ok),
            exit = self.context.stop.requested() => Ok(Err(exit)),
        }
    }

    /// Whether no confirmation is needed: `--yes` was given, or nothing is changed.
    fn is_confirmed(&self) -> bool {
        self.safety.yes || self.safety.dry_run
    }

    /// Processes letters that are given by id, which need no confirmation.
    async fn process_ids(
        &self,
        act: &mut impl AsyncFnMut(&[TaskId]) -> Result<(), CliError>,
    ) -> Result<Walked, CliError> {
        let mut rest = &self.selection.ids[..];
        let mut pacer = self.pacer(rest.len() as u64);
        while let Some(slice) = self.slice(pacer.done).filter(|_| !rest.is_empty()) {
            let slice = usize::try_from(slice).unwrap_or(rest.len()).min(rest.len());
            if let Some(exit) = pacer.wait(self.context).await {
                return Ok(Walked::Interrupted(exit));
            }
            act(&rest[..slice]).await?;
            pacer.advance(slice);
            rest = &rest[slice..];
        }
        Ok(Walked::Finished)
    }

    /// The number of letters in the next query; `None` when the limit is reached.
    fn slice(&self, done: u64) -> Option<u64> {
        let left = self.safety.limit.map_or(u64::MAX, |limit| limit - done.min(limit));
        let rated = self.rate.map_or(SLICE, |rate| (rate / SLICES_PER_SECOND).clamp(1, SLICE));
        Some(left.min(rated)).filter(|slice| *slice > 0)
    }

    fn pacer(&self, total: u64) -> Pacer {
        let total = self.safety.limit.map_or(total, |limit| limit.min(total));
        // indicatif draws on standard error, and only on a terminal.
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len}  {per_sec}  ETA {eta}");
        let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = if total > SLICE || self.rate.is_some() {
            ProgressBar::new(total).with_style(style)
        } else {
            ProgressBar::hidden()
        };
        self.context.screen.share(&bar);
        Pacer { rate: self.rate, started: Instant::now(), done: 0, bar }
    }

    /// Asks a person for confirmation. Fails if standard input is no terminal.
    async fn confirm(&self, how_many: &str) -> Result<bool, CliError> {
        let verb = self.verb;
        let limited = match self.safety.limit {
            Some(limit) => format!("the newest {limit} of {how_many}"),
            None => how_many.to_owned(),
        };
        if !std::io::stdin().is_terminal() {
            return Err(CliError::unusable(format!("this would {verb} {limited}")).help(
                "add --yes to confirm, or --dry-run to look first; letters given by id need \
                 neither",
            ));
        }
        // On standard error, since standard output may be redirected.
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

/// Limits the rate and shows the progress.
struct Pacer {
    rate: Option<u64>,
    started: Instant,
    done: u64,
    bar: ProgressBar,
}

impl Pacer {
    /// Waits until the next slice is due; returns early, with an exit code, at a signal.
    async fn wait(&self, context: &Context) -> Option<Exit> {
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

    fn advance(&mut self, letters: usize) {
        self.done += letters as u64;
        self.bar.set_position(self.done);
    }
}

impl Drop for Pacer {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// Prints the final remark of a command and returns its exit code; `exit` is that of a walk that
/// has finished. `past` is the past tense of the verb, `done` the number of letters.
pub(crate) fn finish(context: &Context, walked: Walked, past: &str, done: u64, exit: Exit) -> Exit {
    match walked {
        Walked::Nothing => {
            context.output.remark("no dead letter matches");
            Exit::Success
        }
        Walked::Declined => {
            context.output.remark("nothing was done");
            Exit::Success
        }
        Walked::Finished => {
            context.output.remark(format_args!("{past} {}", letters(done)));
            exit
        }
        Walked::Interrupted(signal) => {
            let done = letters(done);
            context.output.remark(format_args!("{past} {done}; the others are unchanged"));
            signal
        }
    }
}
