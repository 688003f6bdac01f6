//! What each task of a run does and how it must end: a pure function of the seed and the task's number,
//! so that the process that submits and the one that judges agree without a word.

use std::ops::Range;
use std::time::Duration;

use garenne_cli::error::CliError;
use garenne_common::outcome::{DeadReason, Status};
use garenne_common::{RetryPolicy, TaskId};
use garenne_producer::{Submission, SubmitError};
use serde_json::{Value, json};

/// How many tasks stand together; some of these blocks are batches.
const BLOCK: u64 = 40;
/// How many tasks stand together that may all be of one kind.
const BURST: u64 = 200;
/// The burst that every run has which is long enough: it all fails, and its producers wait.
const FAILING_BURST: u64 = 1;
/// The one that is mixed of all kinds of bursts.
const MIXED_BURST: u64 = 2;
/// How long a task works that is to be cancelled. Its producer may be killed before it cancels it.
const CANCELLED_WORK: u64 = 10_000;
/// Members of a batch that are submitted together, if so many are left; at most it is the whole block.
const FEWEST_TOGETHER: u64 = 2;
/// How long a task that overruns may run.
const LIMIT: Duration = Duration::from_millis(250);
/// Attempts that a task which must succeed has beside those that are meant to fail.
const SPARE_ATTEMPTS: u32 = 4;
/// How often the process of a task may die; the workers of a run get the same.
pub(super) const CRASH_BUDGET: u32 = 3;
/// These tasks kill the process that runs them, in a run of any size: one in the first batch, where it
/// comes in a bundle, and one after it.
const POISON: [u64; 2] = [21, 41];

/// All tasks of a run.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mix {
    pub(super) seed: u64,
    pub(super) tasks: u64,
}

/// What is submitted at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Unit {
    /// A task of this number.
    One(u64),
    /// A batch of so many, from this number on.
    Batch { first: u64, count: u64 },
}

/// One task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Job {
    pub(super) index: u64,
    /// How long its handler works.
    millis: u64,
    /// How long the broker holds it back.
    pub(super) delay: Duration,
    /// So many first attempts fail.
    pub(super) failures: u32,
    end: End,
    /// Whether its effect goes under the idempotency key.
    pub(super) keyed: bool,
    blocking: bool,
}

/// How the attempts after the failures end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Succeed,
    Fail,
    Fatal,
    Panic,
    Overrun,
    Crash,
    /// Its producer cancels it once it is confirmed.
    Cancel,
}

/// What all tasks of a burst have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Burst {
    Failures,
    Retries,
    Timeouts,
    Cancellations,
    /// Each task is of one of these kinds.
    Mixed,
}

impl Mix {
    /// The task of this number.
    pub(super) fn job(self, index: u64) -> Job {
        // Spread by the golden ratio: neighbours must not get neighbouring seeds.
        let spread = index.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let mut rng = fastrand::Rng::with_seed(self.seed ^ spread);
        let mut job = Job {
            index,
            millis: rng.u64(0..3),
            delay: Duration::ZERO,
            failures: 0,
            end: End::Succeed,
            keyed: rng.u8(..10) < 7,
            blocking: false,
        };
        match rng.u32(..1_000) {
            0..60 => job.millis = rng.u64(50..=300),
            60..100 => (job.blocking, job.millis) = (true, rng.u64(5..=50)),
            100..170 => job.failures = rng.u32(1..=2),
            170..190 => job.end = End::Fail,
            190..200 => job.end = End::Fatal,
            200..215 => job.end = End::Panic,
            215..225 => job.end = End::Overrun,
            225..300 => job.delay = Duration::from_millis(rng.u64(100..=5_000)),
            300 => job.end = End::Crash,
            _ => {}
        }
        if let Some(burst) = self.burst(index / BURST) {
            burst.shape(&mut job, &mut rng);
        }
        if POISON.contains(&index) {
            job.end = End::Crash;
        }
        // The counts of a batch must be known beforehand.
        if job.end == End::Cancel && self.is_member(index) {
            job.end = End::Fatal;
        }
        if job.end == End::Cancel {
            (job.millis, job.blocking, job.failures) = (CANCELLED_WORK, false, 0);
        }
        job
    }

    /// One burst in five is of one kind.
    fn burst(self, number: u64) -> Option<Burst> {
        let mut rng =
            fastrand::Rng::with_seed(self.seed ^ number.wrapping_mul(0xD6E8_FEB8_6659_FD93));
        let drawn = match rng.u8(..30) {
            0 => Some(Burst::Failures),
            1 => Some(Burst::Retries),
            2 => Some(Burst::Timeouts),
            3 => Some(Burst::Cancellations),
            4 | 5 => Some(Burst::Mixed),
            _ => None,
        };
        match number {
            // The first tasks are of all kinds, and hold the ones that kill their process.
            0 => None,
            FAILING_BURST => Some(Burst::Failures),
            MIXED_BURST => Some(Burst::Mixed),
            _ => drawn,
        }
    }

    /// Whether this task is a member of a batch.
    pub(super) fn is_member(self, index: u64) -> bool {
        self.is_batch(index - index % BLOCK)
    }

    /// Whether the block that begins with this task is a batch.
    fn is_batch(self, first: u64) -> bool {
        let mut rng = fastrand::Rng::with_seed(self.seed.wrapping_add(first));
        first == 0 || rng.u8(..4) == 0
    }

    /// The id of the task of this number; the same whoever submits it, and however often.
    pub(super) fn id(self, index: u64) -> Result<TaskId, CliError> {
        TaskId::new(&format!("v-{:x}-{index}", self.seed))
            .map_err(|error| CliError::unusable(error.to_string()))
    }

    /// The number of the task of this id, if it is one of this run.
    pub(super) fn index_of(self, id: &str) -> Option<u64> {
        let (seed, index) = id.strip_prefix("v-")?.split_once('-')?;
        let own = u64::from_str_radix(seed, 16) == Ok(self.seed);
        index.parse().ok().filter(|index| own && *index < self.tasks)
    }

    /// Everything there is to submit, in order. The first block is always a batch.
    pub(super) fn units(self) -> Vec<Unit> {
        let mut units = vec![];
        for first in (0..self.tasks).step_by(usize::try_from(BLOCK).unwrap_or(1)) {
            let count = BLOCK.min(self.tasks - first);
            if self.is_batch(first) {
                units.push(Unit::Batch { first, count });
            } else {
                units.extend((first..first + count).map(Unit::One));
            }
        }
        units
    }

    /// Which of these tasks are submitted together: groups of all sizes, one after the other.
    pub(super) fn groups(self, mut members: Range<u64>) -> Vec<Range<u64>> {
        let mut groups = vec![];
        while !members.is_empty() {
            let mut rng = fastrand::Rng::with_seed(self.seed.wrapping_sub(members.start));
            let end = (members.start + rng.u64(FEWEST_TOGETHER..=BLOCK)).min(members.end);
            groups.push(members.start..end);
            members.start = end;
        }
        groups
    }

    /// Whether a task of a group that is submitted together shares its message: with those that become
    /// due when it does.
    pub(super) fn shares(self, index: u64, group: &Range<u64>) -> bool {
        let delay = self.job(index).delay;
        group.clone().any(|other| other != index && self.job(other).delay == delay)
    }
}

impl Burst {
    fn shape(self, job: &mut Job, rng: &mut fastrand::Rng) {
        (job.delay, job.failures, job.millis) = (Duration::ZERO, 0, rng.u64(0..3));
        job.end = match self {
            Self::Failures => [End::Fail, End::Fatal, End::Fatal][rng.usize(..3)],
            Self::Retries => {
                job.failures = rng.u32(1..=2);
                End::Succeed
            }
            Self::Timeouts => End::Overrun,
            Self::Cancellations => End::Cancel,
            Self::Mixed => {
                let one = [Self::Failures, Self::Retries, Self::Timeouts, Self::Cancellations];
                return one[rng.usize(..one.len())].shape(job, rng);
            }
        };
    }
}

impl Unit {
    /// The numbers of its tasks.
    pub(super) fn indices(self) -> Range<u64> {
        match self {
            Self::One(index) => index..index + 1,
            Self::Batch { first, count } => first..first + count,
        }
    }
}

impl Job {
    /// The arguments that travel.
    pub(super) fn arguments(&self) -> Value {
        let end = match self.end {
            End::Succeed | End::Cancel => "succeed",
            End::Fail => "fail",
            End::Fatal => "fatal",
            End::Panic => "panic",
            End::Overrun => "overrun",
            End::Crash => "crash",
        };
        json!({
            "index": self.index, "millis": self.millis, "failures": self.failures, "end": end,
            "keyed": self.keyed,
        })
    }

    /// What to submit.
    pub(super) fn submission(&self, id: TaskId) -> Result<Submission<Value>, SubmitError> {
        let name = if self.blocking { "garenne.verify_blocking" } else { "garenne.verify" };
        let retry = RetryPolicy {
            max_attempts: self.max_attempts(),
            base: Duration::from_millis(150),
            factor: 1.5,
            max: Duration::from_secs(1),
        };
        let mut submission = Submission::dynamic(name, self.arguments())?
            .id(id)
            .delay(self.delay)
            .retry_policy(retry);
        if self.end == End::Overrun {
            submission = submission.timeout(LIMIT);
        }
        Ok(submission)
    }

    /// The most attempts that its policy gives it.
    pub(super) fn max_attempts(&self) -> u32 {
        match self.end {
            End::Succeed | End::Fatal => self.failures + SPARE_ATTEMPTS,
            End::Fail | End::Panic => 2,
            End::Overrun | End::Crash => 1,
            // Whoever runs it may be killed, and its next attempt is cancelled as well.
            End::Cancel => SPARE_ATTEMPTS,
        }
    }

    /// How often one message of it runs at most: a crash costs no attempt, and those of a task that
    /// nobody suspects are not charged: in the bundle that it may have come in, and once more alone.
    pub(super) fn most_executions(&self) -> u32 {
        self.max_attempts() + if self.crashes() { CRASH_BUDGET + 1 } else { 0 }
    }

    /// Whether it kills the process that runs it.
    pub(super) fn crashes(&self) -> bool {
        self.end == End::Crash
    }

    /// Whether its producer cancels it.
    pub(super) fn is_cancelled(&self) -> bool {
        self.end == End::Cancel
    }

    /// Whether it must end as a dead letter.
    #[cfg(test)]
    pub(super) fn fails(&self) -> bool {
        self.expected().0 == Status::Failed
    }

    /// Whether it may end like this; one that is cancelled may have ended before, or its producer may
    /// have been killed before it cancelled it.
    pub(super) fn may_end(&self, status: Status, reason: Option<DeadReason>) -> bool {
        let late = self.is_cancelled() && (status, reason) == (Status::Succeeded, None);
        (status, reason) == self.expected() || late
    }

    /// What its final error must say.
    pub(super) fn evidence(&self) -> Option<String> {
        self.crashes().then(|| format!("died {CRASH_BUDGET} times"))
    }

    /// How it must end.
    pub(super) fn expected(&self) -> (Status, Option<DeadReason>) {
        match self.end {
            End::Succeed => (Status::Succeeded, None),
            End::Fail => (Status::Failed, Some(DeadReason::RetriesExhausted)),
            End::Fatal => (Status::Failed, Some(DeadReason::Fatal)),
            End::Panic => (Status::Failed, Some(DeadReason::Panicked)),
            End::Overrun => (Status::Failed, Some(DeadReason::TimedOut)),
            End::Crash => (Status::Failed, Some(DeadReason::Crashed)),
            End::Cancel => (Status::Cancelled, None),
        }
    }

    /// Whether it must end as a success.
    pub(super) fn succeeds(&self) -> bool {
        self.end == End::Succeed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    const MIX: Mix = Mix { seed: 7, tasks: 5_000 };

    #[test]
    fn the_same_seed_is_the_same_mix() {
        let jobs = |mix: Mix| (0..500).map(|n| mix.job(n)).collect::<Vec<_>>();
        assert_eq!(jobs(MIX), jobs(MIX));
        assert_ne!(jobs(MIX), jobs(Mix { seed: 8, ..MIX }));
    }

    #[test]
    fn every_task_is_submitted_once_and_known_by_its_id() {
        let indices: Vec<u64> = MIX.units().into_iter().flat_map(Unit::indices).collect();
        assert_eq!(indices, (0..MIX.tasks).collect::<Vec<_>>());
        assert!(indices.iter().all(|n| MIX.index_of(MIX.id(*n).unwrap().as_str()) == Some(*n)));
        assert_eq!(MIX.index_of("v-7-5000"), None, "beyond the last one");
        assert_eq!(MIX.index_of("v-8-1"), None, "of another run");
    }

    #[test]
    fn groups_cover_a_batch_and_most_of_its_tasks_share_a_message() {
        let groups: Vec<_> = (0..MIX.tasks).step_by(40).map(|n| MIX.groups(n..n + 40)).collect();
        assert!(groups.iter().any(|groups| groups.len() == 1));
        assert!(groups.iter().any(|groups| groups.len() > 2));
        let groups: Vec<_> = groups.into_iter().flatten().collect();
        assert!(groups.iter().cloned().flatten().eq(0..MIX.tasks), "each task once and in order");
        let shares = |group: &Range<u64>| group.clone().filter(|n| MIX.shares(*n, group)).count();
        let sharing: usize = groups.iter().map(shares).sum();
        assert!((4_000..5_000).contains(&sharing), "all but delayed and lonely ones: {sharing}");
        assert!(!MIX.shares(7, &(7..8)));
    }

    #[test]
    fn all_kinds_occur_and_most_tasks_succeed() {
        let jobs: Vec<_> = (0..5_000).map(|n| MIX.job(n)).collect();
        let ends: HashSet<_> = jobs.iter().map(Job::expected).collect();
        assert_eq!(ends.len(), 7, "{ends:?}");
        assert!(jobs.iter().any(|job| job.blocking) && jobs.iter().any(|job| job.failures == 2));
        assert!(jobs.iter().any(|job| !job.delay.is_zero()));
        let good = jobs.iter().filter(|job| job.succeeds()).count();
        assert!((3_500..4_700).contains(&good), "{good}");
        let burst = MIX.job(FAILING_BURST * BURST).expected();
        assert_eq!(burst.0, Status::Failed, "a burst of failures comes early in every run");
        assert!(MIX.units().iter().any(|unit| matches!(unit, Unit::Batch { .. })));
    }
}
