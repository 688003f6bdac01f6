//! From what was seen to a verdict: each function looks for the breaches of one invariant. Pure.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use garenne_common::wire::{BatchState, BatchSummary, DeadSummary};
use garenne_common::{Payload, TaskResult};
use garenne_producer::Totals;
use serde::Serialize;

use super::ledger::Book;
use super::listener::{Heard, Told};
use super::mix::Mix;
use super::workload::BatchFate;

/// What must hold of every run, whatever is broken in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Invariant {
    /// I1: every confirmed task has a final record.
    Lost,
    /// I2: nothing has a record, an execution or a notice that nobody submitted.
    Phantom,
    /// I3: a task's final record is one, and never changes.
    SecondOutcome,
    /// I3: it is the outcome that the task's handler brought about.
    WrongOutcome,
    /// I4: a handler that uses the idempotency key leaves one effect.
    SecondEffect,
    /// I4: a task that succeeded has left its effect.
    MissingEffect,
    /// I5: every batch has a true notice, and not before its members have ended.
    Notice,
    /// I6: nothing stays in a queue, and the dead letters are those that must be.
    Conservation,
    /// I7: memory, files and connections come back to where they were.
    Bounds,
    /// I8: the backlog drains once everything is mended.
    Liveness,
    /// I9: no task runs more often than its attempts and the faults explain.
    Attempts,
    /// No process ends by itself.
    Process,
}

/// A breach.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Violation {
    pub(super) invariant: Invariant,
    /// Which task, batch, queue or process.
    pub(super) subject: String,
    pub(super) what: String,
}

/// Everything that was seen of a run.
pub(super) struct Evidence<'a> {
    pub(super) mix: Mix,
    /// By number: when the broker had it, and how often it was submitted.
    pub(super) confirmed: &'a [Option<Instant>],
    pub(super) handed: &'a [u32],
    /// By number: its final record at the end.
    pub(super) records: &'a [Option<TaskResult>],
    /// Final records as they were during the run.
    pub(super) early: &'a [(u64, TaskResult)],
    pub(super) book: &'a Book,
    pub(super) heard: &'a Heard,
    pub(super) batches: &'a HashMap<u64, BatchFate>,
    pub(super) batch_deadline: Duration,
    pub(super) totals: Totals,
    /// By number: dead letters, of all or of some tasks that were given up.
    pub(super) letters: &'a HashMap<u64, Option<DeadSummary>>,
    /// Queues and what waits in them at the end.
    pub(super) queues: &'a [(String, u32)],
    /// When something was broken, was mended, or a connection was made again.
    pub(super) disturbances: &'a [Instant],
    /// When the run began.
    pub(super) begun: Instant,
    /// Breaches that were seen as they happened: bounds, liveness, processes.
    pub(super) noted: &'a [Violation],
}

impl Evidence<'_> {
    /// All breaches.
    pub(super) fn violations(&self) -> Vec<Violation> {
        let mut found = self.noted.to_vec();
        found.extend(self.lost());
        found.extend(self.phantoms());
        found.extend(self.second_outcomes());
        found.extend(self.wrong_outcomes());
        found.extend(self.effects());
        found.extend(self.task_notices());
        found.extend(self.batch_notices());
        found.extend(self.conservation());
        found.extend(self.attempts());
        found
    }

    fn breach(&self, invariant: Invariant, index: u64, what: impl Into<String>) -> Violation {
        let subject = self.mix.id(index).map_or_else(|_| index.to_string(), |id| id.to_string());
        Violation { invariant, subject, what: what.into() }
    }

    fn numbered<T>(items: &[T]) -> impl Iterator<Item = (u64, &T)> {
        (0..).zip(items)
    }

    fn records(&self) -> impl Iterator<Item = (u64, &TaskResult)> {
        Self::numbered(self.records).filter_map(|(n, record)| Some((n, record.as_ref()?)))
    }

    fn lost(&self) -> Vec<Violation> {
        let confirmed = Self::numbered(self.confirmed).filter(|(_, at)| at.is_some());
        let lost = confirmed.filter(|(n, _)| self.record(*n).is_none());
        lost.map(|(n, _)| self.breach(Invariant::Lost, n, "confirmed, and no final record"))
            .collect()
    }

    fn record(&self, index: u64) -> Option<&TaskResult> {
        self.records.get(usize::try_from(index).ok()?)?.as_ref()
    }

    fn phantoms(&self) -> Vec<Violation> {
        let phantom = |what: &str, seen: &str| Violation {
            invariant: Invariant::Phantom,
            subject: seen.to_owned(),
            what: what.to_owned(),
        };
        let mut found: Vec<_> =
            self.book.strangers.iter().map(|seen| phantom("in the ledger", seen)).collect();
        found.extend(self.heard.strangers.iter().map(|seen| phantom("on the notices", seen)));
        let known = self.records().count() as u64;
        if self.totals.results > known {
            let seen = format!("{} records", self.totals.results - known);
            found.push(phantom("in the store, of tasks that nobody submitted", &seen));
        }
        let of_nobody = Self::numbered(self.handed).filter(|(_, handed)| **handed == 0);
        let of_nobody = of_nobody.filter(|(n, _)| self.record(*n).is_some());
        found.extend(of_nobody.map(|(n, _)| {
            self.breach(Invariant::Phantom, n, "a final record before it was submitted")
        }));
        found
    }

    fn second_outcomes(&self) -> Vec<Violation> {
        let mut found = vec![];
        for (n, early) in self.early {
            if self.record(*n).is_some_and(|last| last != early) {
                let what = format!("its record was {}, and changed", outcome(early));
                found.push(self.breach(Invariant::SecondOutcome, *n, what));
            }
        }
        for (n, told) in &self.heard.tasks {
            let Some(last) = self.record(*n) else { continue };
            let said = &told.summary;
            let same = said.status == last.status
                && said.reason == last.reason
                && said.attempt == last.attempt
                && said.worker == last.worker
                && said.finished_at == last.finished_at;
            if !same || told.other.is_some() {
                let what = "its notice tells of another outcome than its record";
                found.push(self.breach(Invariant::SecondOutcome, *n, what));
            }
        }
        found
    }

    fn wrong_outcomes(&self) -> Vec<Violation> {
        let mut found = vec![];
        for (n, record) in self.records() {
            let job = self.mix.job(n);
            let output: Option<u64> =
                record.output.as_ref().and_then(|output| output.decode().ok());
            let error = record.error.as_deref().unwrap_or_default();
            let fine = job.may_end(record.status, record.reason)
                && job.evidence().is_none_or(|evidence| error.contains(&evidence))
                && (!job.succeeds() || output == Some(n))
                && (!job.succeeds() || record.attempt > job.failures)
                && record.attempt <= job.max_attempts();
            if !fine {
                let (status, reason) = job.expected();
                let expected = reason.map_or(status.as_str(), garenne_common::DeadReason::as_str);
                let what = format!("ended as {}, expected {expected}", outcome(record));
                found.push(self.breach(Invariant::WrongOutcome, n, what));
            }
        }
        found
    }

    fn effects(&self) -> Vec<Violation> {
        let mut found = vec![];
        for (n, effects) in &self.book.effects {
            let keyed = self.mix.job(*n).keyed;
            if keyed && effects.len() > 1 {
                let what = format!("{} effects under different keys", effects.len());
                found.push(self.breach(Invariant::SecondEffect, *n, what));
            }
        }
        let succeeded = self.records().filter(|(n, _)| self.mix.job(*n).succeeds());
        let without = succeeded.filter(|(n, _)| !self.book.effects.contains_key(n));
        found.extend(without.map(|(n, _)| {
            self.breach(Invariant::MissingEffect, n, "succeeded, and the ledger has no effect")
        }));
        found
    }

    /// A task outside of batches has a notice of its own.
    fn task_notices(&self) -> Vec<Violation> {
        let alone = self.records().filter(|(_, record)| record.batch.is_none());
        let untold = alone.filter(|(n, _)| !self.heard.tasks.contains_key(n));
        untold.map(|(n, _)| self.breach(Invariant::Notice, n, "ended, and no notice")).collect()
    }

    fn batch_notices(&self) -> Vec<Violation> {
        let mut found = vec![];
        let mut known = 0_u64;
        for fate in self.batches.values() {
            let told = fate.id.as_ref().and_then(|id| self.heard.batches.get(id));
            known += u64::from(told.is_some());
            let problem = match told {
                None if fate.id.is_none() => None,
                None => Some("no notice".to_owned()),
                Some(told) => self.batch_problem(fate, told),
            };
            let subject = fate.id.clone().unwrap_or_default();
            found.extend(problem.map(|what| Violation {
                invariant: Invariant::Notice,
                subject: format!("batch {subject}"),
                what,
            }));
        }
        if self.heard.batches.len() as u64 > known {
            found.extend(self.strange_batches());
        }
        found
    }

    /// Batches that no producer spoke of: it was killed between the opening and its report, or opened
    /// another one because the confirm got lost. Such a batch has no members.
    fn strange_batches(&self) -> Vec<Violation> {
        let spoken: Vec<_> = self.batches.values().filter_map(|fate| fate.id.as_deref()).collect();
        let spoken: std::collections::HashSet<_> = spoken.into_iter().collect();
        let strange = self.heard.batches.values().map(|told| &told.summary);
        let strange = strange.filter(|summary| !spoken.contains(summary.batch.as_str()));
        let bad =
            strange.filter(|summary| summary.state != BatchState::Abandoned || summary.ended() > 0);
        bad.map(|summary| Violation {
            invariant: Invariant::Phantom,
            subject: format!("batch {}", summary.batch),
            what: format!("a notice of a batch that nobody opened: {}", summary.state.as_str()),
        })
        .collect()
    }

    fn batch_problem(&self, fate: &BatchFate, told: &Told<BatchSummary>) -> Option<String> {
        let summary = &told.summary;
        if told.other.is_some() {
            return Some("its notices contradict each other".to_owned());
        }
        match summary.state {
            BatchState::Open | BatchState::Sealed => Some("a notice before its end".to_owned()),
            BatchState::Abandoned if fate.must_be_done(self.batch_deadline) => {
                Some("abandoned, though it was sealed in time".to_owned())
            }
            BatchState::Abandoned if summary.ended() > fate.count => {
                Some(format!("abandoned with {} of {} ended", summary.ended(), fate.count))
            }
            BatchState::Abandoned => None,
            BatchState::Done if fate.orphaned => {
                Some("done, though nobody can have sealed it".to_owned())
            }
            BatchState::Done => self.false_counts(fate, summary),
        }
    }

    fn false_counts(&self, fate: &BatchFate, summary: &BatchSummary) -> Option<String> {
        let members = fate.first..fate.first + fate.count;
        let good = members.clone().filter(|n| self.mix.job(*n).succeeds()).count() as u64;
        let counts = (summary.total, summary.succeeded, summary.failed, summary.cancelled);
        if counts != (Some(fate.count), good, fate.count - good, 0) {
            return Some(format!(
                "counts {counts:?}, but {good} of {} members succeed",
                fate.count
            ));
        }
        let missing = members.clone().filter(|n| self.record(*n).is_none()).count();
        (missing > 0).then(|| format!("done while {missing} members have no record"))
    }

    fn conservation(&self) -> Vec<Violation> {
        let breach = |subject: &str, what: String| Violation {
            invariant: Invariant::Conservation,
            subject: subject.to_owned(),
            what,
        };
        let full = self.queues.iter().filter(|(_, ready)| *ready > 0);
        let mut found: Vec<_> =
            full.map(|(name, ready)| breach(name, format!("{ready} messages stay"))).collect();
        let failed = self.records().filter(|(_, r)| r.reason.is_some()).count() as u64;
        if self.totals.dead != failed {
            let what = format!("{} for {failed} tasks that were given up", self.totals.dead);
            found.push(breach("dead letters", what));
        }
        for (n, letter) in self.letters {
            let reason = self.mix.job(*n).expected().1;
            let same = letter.as_ref().is_some_and(|letter| {
                Some(letter.reason) == reason
                    && letter.args.as_ref().map(Payload::to_json_value)
                        == Some(self.mix.job(*n).arguments())
            });
            if !same {
                let what = "its dead letter is missing or not what was submitted";
                found.push(self.breach(Invariant::Conservation, *n, what));
            }
        }
        found
    }

    /// Every chain of attempts comes from a submission or from a disturbance that made a message come
    /// twice; each has at most the policy's attempts.
    fn attempts(&self) -> Vec<Violation> {
        let mut found = vec![];
        for (n, runs) in &self.book.runs {
            let job = self.mix.job(*n);
            let most = job.most_executions();
            let handed = usize::try_from(*n).ok().and_then(|n| self.handed.get(n)).copied();
            let last = runs.iter().map(|run| run.at).max().unwrap_or(self.begun);
            let disturbed = self.disturbances.partition_point(|at| *at <= last);
            let chains = u64::from(handed.unwrap_or(1)) + disturbed as u64;
            let beyond = runs.iter().any(|run| run.attempt > job.max_attempts());
            if beyond || runs.len() as u64 > u64::from(most) * chains {
                let what = format!("{} executions, {most} allowed for each delivery", runs.len());
                found.push(self.breach(Invariant::Attempts, *n, what));
            }
        }
        found
    }
}

fn outcome(record: &TaskResult) -> String {
    let reason = record.reason.map(|reason| format!(" ({})", reason.as_str()));
    let (status, attempt) = (record.status.as_str(), record.attempt);
    format!("{status}{} at attempt {attempt}", reason.unwrap_or_default())
}

#[cfg(test)]
mod tests;
