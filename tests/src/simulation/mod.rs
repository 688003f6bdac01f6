//! A simulation: the real decisions of workers and collectors against a model of everything else.
//!
//! A schedule is what one seed decides: producers, tasks and how they behave, processes, the order of
//! every small step, and what breaks between any two of them. [`world`] runs it, [`books`] holds the
//! promises against it. The real code is `garenne_worker::protocol` and `decide`,
//! `garenne_collector::rules::aggregate`, `batch` and `group`, the wire formats and the topology; [`broker`],
//! [`worker`], [`collector`] and [`producer`] model what lies between. docs/decisions/0012 says why.
//!
//! A failure prints its seed and the last steps. `GARENNE_SIM_SEED=7` runs that one schedule and prints
//! all of them; `GARENNE_SIM_SCHEDULES=1000000` runs more.

#![allow(clippy::print_stdout, reason = "a replayed schedule is there to be read")]

mod books;
mod broker;
mod channel;
mod collector;
mod env;
mod layout;
mod ledger;
mod mutation;
mod producer;
mod script;
mod worker;
mod world;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use mutation::Mutation;
use world::{Done, Stage, World};

const SCHEDULES: u64 = 10_000;
/// What a planted mistake has to be found within.
const ENOUGH: u64 = 10_000;
/// Lines of a failed schedule that are worth reading.
const LAST_STEPS: usize = 80;

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable} is a whole number, not {text:?}")))
}

fn run(stage: &Stage, seed: u64, mutation: Option<Mutation>) -> Result<Done, String> {
    World::new(stage, seed, mutation, false).run()
}

/// Runs a schedule again and writes down what happens.
fn tell(stage: &Stage, seed: u64, last: usize) -> String {
    let mut world = World::new(stage, seed, None, true);
    let broken = world.run();
    let trace = world.trace();
    let lines = trace[trace.len().saturating_sub(last)..].join("\n");
    format!("{lines}\nseed {seed}: {broken:?}\nreplay it: GARENNE_SIM_SEED={seed}")
}

/// Every schedule from `first` on, on two threads; the first that fails ends it.
fn run_all(first: u64, schedules: u64) -> Result<Done, u64> {
    let stage = Stage::new();
    let (next, failed) = (AtomicU64::new(0), AtomicU64::new(u64::MAX));
    let work = || {
        let mut sum = Done::default();
        loop {
            let seed = first + next.fetch_add(1, Ordering::Relaxed);
            if seed >= first + schedules || failed.load(Ordering::Relaxed) < seed {
                return sum;
            }
            match run(&stage, seed, None) {
                Ok(done) => sum = sum.plus(done),
                Err(_) => drop(failed.fetch_min(seed, Ordering::Relaxed)),
            }
        }
    };
    let sum = std::thread::scope(|scope| {
        let other = scope.spawn(work);
        work().plus(other.join().unwrap())
    });
    match failed.into_inner() {
        u64::MAX => Ok(sum),
        seed => Err(seed),
    }
}

impl Done {
    fn plus(self, other: Self) -> Self {
        Self {
            steps: self.steps + other.steps,
            tasks: self.tasks + other.tasks,
            faults: self.faults + other.faults,
        }
    }
}

#[test]
fn every_promise_holds_whatever_the_schedule() {
    if let Some(seed) = number("GARENNE_SIM_SEED") {
        println!("{}", tell(&Stage::new(), seed, usize::MAX));
        assert!(run(&Stage::new(), seed, None).is_ok(), "the schedule above breaks a promise");
        return;
    }
    let (begun, schedules) = (Instant::now(), number("GARENNE_SIM_SCHEDULES").unwrap_or(SCHEDULES));
    let done = run_all(0, schedules);
    let done = done.unwrap_or_else(|seed| panic!("{}", tell(&Stage::new(), seed, LAST_STEPS)));
    println!("{schedules} schedules in {:?}: {done:?}", begun.elapsed());
    assert!(
        done.faults > schedules && done.tasks > schedules,
        "hardly anything happened: {done:?}"
    );
}

#[test]
fn a_seed_is_the_same_schedule_each_time() {
    let stage = Stage::new();
    for seed in 0..50 {
        let traces = [(), ()].map(|()| {
            let mut world = World::new(&stage, seed, None, true);
            let done = world.run();
            (done, world.trace().to_vec())
        });
        assert!(traces[0] == traces[1], "seed {seed}");
    }
}

#[test]
fn every_planted_mistake_is_found() {
    let stage = Stage::new();
    let found = Mutation::ALL.map(|mutation| {
        let broken = |seed| Some((seed, run(&stage, seed, Some(mutation)).err()?));
        (mutation, (0..ENOUGH).find_map(broken))
    });
    for (mutation, found) in &found {
        println!("{mutation:?}: {found:?}");
    }
    let missed: Vec<_> = found.iter().filter(|(_, found)| found.is_none()).collect();
    assert!(missed.is_empty(), "the simulation is blind to {missed:?}");
}
