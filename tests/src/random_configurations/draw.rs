//! What a seed decides: configuration, work and faults.

use std::time::Duration;

use fastrand::Rng;

/// One configuration of a whole system with its work.
#[derive(Debug, Clone)]
pub(super) struct Draw {
    pub(super) producer: ProducerDraw,
    pub(super) workers: Vec<WorkerDraw>,
    pub(super) collector: CollectorDraw,
    pub(super) work: Vec<WorkKind>,
    pub(super) way: Way,
    /// What breaks when this share of the tasks has ended, in percent.
    pub(super) faults: Vec<(usize, Fault)>,
}

/// Of the process that submits and waits.
#[derive(Debug, Clone)]
pub(super) struct ProducerDraw {
    pub(super) publish_window: usize,
    pub(super) bundle_tasks: usize,
    pub(super) bundle_work: Duration,
}

#[derive(Debug, Clone)]
pub(super) struct WorkerDraw {
    pub(super) publish_window: usize,
    pub(super) concurrency: usize,
    pub(super) ahead: usize,
}

#[derive(Debug, Clone)]
pub(super) struct CollectorDraw {
    pub(super) publish_window: usize,
    pub(super) group_size: usize,
    pub(super) group_linger: Duration,
}

/// What a task does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WorkKind {
    Echo,
    /// An output of 20 KiB.
    Large,
    Sleeps,
    Fatal,
    FailsOnce,
    RetriesExhausted,
    Panics,
    TimesOut,
    Delayed,
    Cancelled,
}

/// How the tasks are submitted, and who waits for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// In calls of their own that are under way together.
    Singly,
    /// In one call.
    Together,
    /// In a batch.
    Batch,
    /// In one call, and nobody waits for results.
    Detached,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    KillWorker,
    KillCollector,
    CutLines,
    /// SIGSTOP for as long as it takes the rest to get a little further.
    FreezeWorker,
}

const FAILING: [WorkKind; 4] =
    [WorkKind::Fatal, WorkKind::FailsOnce, WorkKind::RetriesExhausted, WorkKind::Panics];
const SLOW: [WorkKind; 4] =
    [WorkKind::Sleeps, WorkKind::TimesOut, WorkKind::Delayed, WorkKind::Cancelled];

impl Draw {
    pub(super) fn of(seed: u64) -> Self {
        let mut random = Rng::with_seed(seed);
        let random = &mut random;
        Self {
            producer: ProducerDraw {
                publish_window: window(random),
                bundle_tasks: pick(random, &[1, 2, 10, 100, 500]),
                bundle_work: Duration::from_millis(pick(random, &[1, 20, 500])),
            },
            workers: (0..random.usize(1..=3)).map(|_| worker(random)).collect(),
            collector: CollectorDraw {
                publish_window: window(random),
                group_size: pick(random, &[1, 2, 50, 2_000]),
                group_linger: Duration::from_millis(pick(random, &[0, 5, 100])),
            },
            work: work(random),
            way: pick(
                random,
                &[Way::Singly, Way::Together, Way::Together, Way::Batch, Way::Detached],
            ),
            faults: faults(random),
        }
    }
}

fn pick<T: Copy>(random: &mut Rng, of: &[T]) -> T {
    of[random.usize(..of.len())]
}

fn window(random: &mut Rng) -> usize {
    pick(random, &[1, 1, 2, 3, 10, 64, 512])
}

fn worker(random: &mut Rng) -> WorkerDraw {
    WorkerDraw {
        publish_window: window(random),
        concurrency: pick(random, &[1, 2, 4, 16, 64]),
        ahead: pick(random, &[0, 1, 4, 32, 256]),
    }
}

/// One to three kinds, in bursts or mixed.
fn work(random: &mut Rng) -> Vec<WorkKind> {
    let mut work = vec![];
    for _ in 0..random.usize(1..=3) {
        let (kind, most) = match random.u8(..8) {
            0..4 => (pick(random, &FAILING), 400),
            4 | 5 => (pick(random, &SLOW), 40),
            6 => (WorkKind::Large, 200),
            _ => (WorkKind::Echo, 600),
        };
        work.extend(std::iter::repeat_n(kind, random.usize(1..=most)));
    }
    if random.bool() {
        random.shuffle(&mut work);
    }
    work
}

/// None in half of all draws.
fn faults(random: &mut Rng) -> Vec<(usize, Fault)> {
    let count = [0, 0, 1, 2][random.usize(..4)];
    let kinds = [Fault::KillWorker, Fault::KillCollector, Fault::CutLines, Fault::FreezeWorker];
    let mut faults: Vec<_> =
        (0..count).map(|_| (random.usize(5..80), pick(random, &kinds))).collect();
    faults.sort_by_key(|(when, _)| *when);
    faults
}
