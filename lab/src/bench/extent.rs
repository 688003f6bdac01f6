//! How much a run of the command does: how long each timed run lasts, and the sizes that are tried.

use super::BenchArgs;

/// More tasks than this in one run would say nothing new, and fill disks.
const MOST_TASKS: u64 = 2_000_000;

/// The sizes of everything.
#[derive(Debug, Clone)]
pub(super) struct Extent {
    /// About how long one timed run lasts.
    pub(super) seconds: f64,
    /// How often each is run.
    pub(super) repeats: u32,
    /// So many tasks a run, whatever time that takes.
    tasks: Option<u64>,
    /// Tasks of the first warm-up.
    pub(super) first: u64,
    /// Round trips that count, and those before that do not.
    pub(super) round_trips: u64,
    pub(super) round_trips_before: u64,
    /// Worker starts in one run.
    pub(super) starts: u32,
    /// Unacknowledged tasks that a worker holds when its memory is read.
    pub(super) held: usize,
    /// Bytes of a payload.
    pub(super) payloads: &'static [usize],
    /// Tasks that wait.
    pub(super) backlogs: Vec<u64>,
    /// Worker processes.
    pub(super) workers: &'static [usize],
    /// Producers, each with connections of its own.
    pub(super) producers: &'static [usize],
}

impl Extent {
    pub(super) fn of(arguments: &BenchArgs) -> Self {
        let mut extent = if arguments.quick { Self::quick() } else { Self::full() };
        extent.seconds = arguments.seconds.unwrap_or(extent.seconds);
        extent.repeats = arguments.repeats.unwrap_or(extent.repeats);
        extent.tasks = arguments.tasks;
        if let Some(backlog) = arguments.backlog {
            extent.backlogs = vec![backlog];
        }
        extent
    }

    fn full() -> Self {
        Self {
            seconds: 3.0,
            repeats: 3,
            tasks: None,
            first: 1_000,
            round_trips: 500,
            round_trips_before: 50,
            starts: 5,
            held: 10_000,
            payloads: &[100, 1_024, 10_240, 102_400],
            backlogs: vec![100_000, 1_000_000],
            workers: &[1, 2, 4, 8],
            producers: &[1, 2, 4, 8, 16],
        }
    }

    /// Everything once and briefly: shows that it works, and says little about speed.
    fn quick() -> Self {
        Self {
            seconds: 0.2,
            repeats: 1,
            tasks: None,
            first: 50,
            round_trips: 50,
            round_trips_before: 5,
            starts: 1,
            held: 300,
            payloads: &[100, 10_240],
            backlogs: vec![2_000],
            workers: &[1, 2],
            producers: &[1, 2],
        }
    }

    /// How many tasks a run has that shall last this share of the usual time, at this rate.
    pub(super) fn tasks(&self, rate: f64, share: f64) -> u64 {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "rates are positive and far below 2^64"
        )]
        let fitting = (rate * self.seconds * share) as u64;
        self.tasks.unwrap_or_else(|| fitting.clamp(self.first, MOST_TASKS))
    }

    /// The largest backlog.
    pub(super) fn deepest(&self) -> u64 {
        self.backlogs.iter().copied().max().unwrap_or_default()
    }
}
