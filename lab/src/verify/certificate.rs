//! What a run ends in: a statement of what was done, what was seen, and whether it holds.
//!
//! As JSON its fields are stable (docs/testing.md lists them); a change of meaning raises `schema`.

use std::collections::BTreeMap;

use garenne_cli::output::{Paint, facts};
use garenne_common::Timestamp;
use serde::Serialize;

use super::bounds;
use super::check::{Invariant, Violation};
use super::plan::{Kind, LeftOut};

/// Breaches that are shown one by one.
const SHOWN: usize = 20;

#[derive(Debug, Serialize)]
pub(super) struct Certificate {
    pub(super) schema: u32,
    pub(super) holds: bool,
    /// What to run to see the same workload and the same faults again.
    pub(super) repeat: String,
    pub(super) seed: u64,
    pub(super) tasks: u64,
    pub(super) workers: usize,
    pub(super) collectors: usize,
    pub(super) producers: usize,
    pub(super) started_at: Timestamp,
    pub(super) seconds: f64,
    pub(super) versions: Versions,
    pub(super) injected: BTreeMap<Kind, u64>,
    pub(super) planned: BTreeMap<Kind, u64>,
    pub(super) left_out: LeftOut,
    pub(super) counts: Counts,
    /// Breaches by invariant, all of them, zeros included.
    pub(super) breaches: BTreeMap<Invariant, u64>,
    pub(super) worst_stall_seconds: f64,
    /// The longest that a task, batch, producer, queue or process waited while nothing was broken.
    pub(super) longest_wait_seconds: f64,
    pub(super) drained_seconds: f64,
    pub(super) processes: Vec<bounds::BoundedProcess>,
    /// The first of them.
    pub(super) violations: Vec<Shown>,
}

#[derive(Debug, Serialize)]
pub(super) struct Versions {
    pub(super) garenne: &'static str,
    pub(super) profile: &'static str,
    pub(super) rabbitmq: Option<String>,
}

/// How much there was of what.
#[derive(Debug, Default, Serialize)]
pub(super) struct Counts {
    pub(super) confirmed: u64,
    /// Those of them that shared a message on their way to a worker.
    pub(super) bundled: u64,
    /// Submitted again under the same id, because a killed producer had not reported the confirm.
    pub(super) resubmitted: u64,
    pub(super) succeeded: u64,
    pub(super) failed: u64,
    pub(super) cancelled: u64,
    /// Results that producers waited for and got.
    pub(super) answered: u64,
    pub(super) batches_done: u64,
    pub(super) batches_abandoned: u64,
    pub(super) executions: u64,
    /// Executions of an attempt that had begun before. No breach: at least once is the promise.
    pub(super) duplicate_executions: u64,
    pub(super) duplicate_rate: f64,
    /// Effects that the idempotency key has kept from happening again.
    pub(super) refused_effects: u64,
    /// Effects of handlers without a key that happened again.
    pub(super) unkeyed_repeats: u64,
    pub(super) repeated_results: u64,
    pub(super) repeated_notices: u64,
    /// Workers that died of a task, before anybody could suspect it.
    pub(super) poisoned_workers: u64,
    /// Connections to the broker that were made in all.
    pub(super) connections: u64,
}

/// A breach with what is known of its task.
#[derive(Debug, Serialize)]
pub(super) struct Shown {
    #[serde(flatten)]
    pub(super) violation: Violation,
    pub(super) history: Vec<String>,
}

impl Invariant {
    const ALL: [Self; 12] = [
        Self::Lost,
        Self::Phantom,
        Self::SecondOutcome,
        Self::WrongOutcome,
        Self::SecondEffect,
        Self::MissingEffect,
        Self::Notice,
        Self::Conservation,
        Self::Bounds,
        Self::Liveness,
        Self::Attempts,
        Self::Process,
    ];

    const fn words(self) -> &'static str {
        match self {
            Self::Lost => "lost",
            Self::Phantom => "phantom",
            Self::SecondOutcome => "second outcomes",
            Self::WrongOutcome => "wrong outcomes",
            Self::SecondEffect => "second effects",
            Self::MissingEffect => "missing effects",
            Self::Notice => "notices missing or false",
            Self::Conservation => "left in queues, wrong dead letters",
            Self::Bounds => "grown processes",
            Self::Liveness => "stood still",
            Self::Attempts => "too many executions",
            Self::Process => "processes that ended by themselves",
        }
    }
}

/// How many breaches there are of each invariant.
pub(super) fn tally(violations: &[Violation]) -> BTreeMap<Invariant, u64> {
    let mut tally: BTreeMap<_, u64> = Invariant::ALL.into_iter().map(|one| (one, 0)).collect();
    for violation in violations {
        *tally.entry(violation.invariant).or_default() += 1;
    }
    tally
}

/// The breaches to show: some of each invariant before more of one.
pub(super) fn chosen(mut violations: Vec<Violation>) -> Vec<Violation> {
    let mut seen: BTreeMap<Invariant, usize> = BTreeMap::new();
    let mut turns: Vec<(usize, Violation)> = violations
        .drain(..)
        .map(|violation| {
            let turn = seen.entry(violation.invariant).or_default();
            *turn += 1;
            (*turn, violation)
        })
        .collect();
    turns.sort_by_key(|(turn, violation)| (*turn, violation.invariant));
    turns.into_iter().take(SHOWN).map(|(_, violation)| violation).collect()
}

impl Certificate {
    /// For people.
    pub(super) fn as_text(&self, paint: Paint) -> String {
        let mut text = format!(
            "{} tasks, {} workers, {} collectors, {} producers, {:.0} s\n",
            self.tasks, self.workers, self.collectors, self.producers, self.seconds
        );
        text.push_str(&facts(&[
            ("seed", Some(self.seed.to_string())),
            ("versions", Some(self.versions())),
            ("faults", Some(self.faults())),
            ("left out", self.left_out()),
            ("outcomes", Some(self.outcomes())),
            ("repeats", Some(self.repeats())),
            ("worst stall", Some(format!("{:.1} s", self.worst_stall_seconds))),
            (
                "longest wait",
                Some(format!("{:.1} s with nothing broken", self.longest_wait_seconds)),
            ),
            ("drained", Some(format!("{:.1} s after the last repair", self.drained_seconds))),
        ]));
        text.push_str("\n\n");
        for (invariant, count) in &self.breaches {
            let line = format!("{count:>7} {}\n", invariant.words());
            text.push_str(&if *count > 0 { paint.red(&line) } else { line });
        }
        text.push('\n');
        if self.holds {
            text.push_str(&paint.green("holds"));
        } else {
            text.push_str(&paint.red("DOES NOT HOLD"));
            text.push_str(&self.shown());
            text.push_str("\n\nagain: ");
            text.push_str(&self.repeat);
        }
        text
    }

    fn versions(&self) -> String {
        let rabbitmq = self.versions.rabbitmq.as_deref().unwrap_or("of unknown version");
        let Versions { garenne, profile, .. } = &self.versions;
        format!("garenne {garenne} ({profile} build), RabbitMQ {rabbitmq}")
    }

    fn faults(&self) -> String {
        let kinds = self.planned.iter().map(|(kind, planned)| {
            let injected = self.injected.get(kind).copied().unwrap_or_default();
            let missing =
                if injected < *planned { format!(" of {planned}") } else { String::new() };
            format!("{injected}{missing} {}", kind.as_str())
        });
        let kinds: Vec<_> = kinds.collect();
        if kinds.is_empty() { "none".to_owned() } else { kinds.join(", ") }
    }

    fn left_out(&self) -> Option<String> {
        let kinds = self.left_out.iter().map(|(kind, why)| format!("{}: {why}", kind.as_str()));
        let kinds: Vec<_> = kinds.collect();
        (!kinds.is_empty()).then(|| kinds.join("\n"))
    }

    fn outcomes(&self) -> String {
        let Counts {
            confirmed,
            bundled,
            succeeded,
            failed,
            cancelled,
            answered,
            batches_done,
            batches_abandoned,
            ..
        } = self.counts;
        format!(
            "{confirmed} confirmed, {bundled} of them in bundles; {succeeded} succeeded, {failed} given up as they should, \
             {cancelled} cancelled; {answered} results came to those who waited; \
             {batches_done} batches done, {batches_abandoned} abandoned with their producer"
        )
    }

    fn repeats(&self) -> String {
        let counts = &self.counts;
        format!(
            "{} of {} executions ({:.3} %), {} effects refused by key, {} without a key\n\
             {} resubmissions, {} results, {} notices, {} connections made; \
             {} workers died of a task",
            counts.duplicate_executions,
            counts.executions,
            100.0 * counts.duplicate_rate,
            counts.refused_effects,
            counts.unkeyed_repeats,
            counts.resubmitted,
            counts.repeated_results,
            counts.repeated_notices,
            counts.connections,
            counts.poisoned_workers,
        )
    }

    fn shown(&self) -> String {
        let shown = self.violations.iter().map(|shown| {
            let Violation { invariant, subject, what } = &shown.violation;
            let history: String =
                shown.history.iter().map(|line| format!("\n    {line}")).collect();
            format!("\n  {}: {subject}: {what}{history}", invariant.words())
        });
        shown.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_invariant_is_counted_and_each_is_shown_before_more_of_one() {
        let breach = |invariant, subject: &str| Violation {
            invariant,
            subject: subject.to_owned(),
            what: "so".to_owned(),
        };
        let mut all: Vec<_> = (0..50).map(|n| breach(Invariant::Lost, &n.to_string())).collect();
        all.push(breach(Invariant::Process, "w"));
        let tally = tally(&all);
        assert_eq!((tally[&Invariant::Lost], tally[&Invariant::Process]), (50, 1));
        assert_eq!(tally.len(), Invariant::ALL.len());
        let chosen = chosen(all);
        assert_eq!(chosen.len(), SHOWN);
        assert_eq!(chosen[1].invariant, Invariant::Process);
    }
}
