//! Which faults come when: a pure function of the seed, the size of the run and the kinds asked for.
//!
//! A fault has no time of its own but a number of ended tasks: it comes when so many have ended. The
//! workload in turn may not run ahead of the faults ([`Schedule::allowance`]), so that every fault meets
//! tasks under way, however fast the machine is.

use std::collections::BTreeMap;
use std::time::Duration;

use clap::ValueEnum;
use garenne_cli::error::CliError;
use serde::Serialize;

/// A run of so many tasks has the full number of faults; a smaller one its share, and of each kind one.
const FULL: u64 = 100_000;

/// A kind of fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Kind {
    /// A worker is killed (SIGKILL) and started again
    Worker,
    /// A collector is killed and started again
    Collector,
    /// A process that submits is killed; another one takes over
    Producer,
    /// One connection or all of them are cut, or nothing passes for some seconds
    Connection,
    /// The broker is killed and started again (only a node of this run's own)
    Broker,
    /// A process is stopped (SIGSTOP) for some seconds and goes on, unaware
    Freeze,
}

impl Kind {
    pub(super) const ALL: [Self; 6] = [
        Self::Worker,
        Self::Collector,
        Self::Producer,
        Self::Connection,
        Self::Broker,
        Self::Freeze,
    ];

    /// How many a run of [`FULL`] tasks has at least.
    const fn in_full(self) -> u64 {
        match self {
            Self::Worker | Self::Connection => 20,
            Self::Collector | Self::Producer | Self::Broker | Self::Freeze => 5,
        }
    }

    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Worker => "worker",
            Self::Collector => "collector",
            Self::Producer => "producer",
            Self::Connection => "connection",
            Self::Broker => "broker",
            Self::Freeze => "freeze",
        }
    }
}

/// One thing to break. `pick` chooses among the victims there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    KillWorker {
        pick: usize,
        away: Duration,
    },
    KillCollector {
        pick: usize,
        away: Duration,
    },
    KillProducer {
        pick: usize,
    },
    CutOne {
        pick: usize,
    },
    CutAll,
    /// Connections stay open and nothing passes.
    Silence(Duration),
    KillBroker {
        away: Duration,
    },
    Freeze {
        victim: Victim,
        pick: usize,
        away: Duration,
    },
}

/// Who is frozen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Victim {
    Worker,
    Collector,
    Producer,
    Broker,
}

impl Fault {
    pub(super) const fn kind(self) -> Kind {
        match self {
            Self::KillWorker { .. } => Kind::Worker,
            Self::KillCollector { .. } => Kind::Collector,
            Self::KillProducer { .. } => Kind::Producer,
            Self::CutOne { .. } | Self::CutAll | Self::Silence(_) => Kind::Connection,
            Self::KillBroker { .. } => Kind::Broker,
            Self::Freeze { .. } => Kind::Freeze,
        }
    }
}

/// What is to happen in a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Schedule {
    tasks: u64,
    /// After how many ended tasks, and what; in order.
    pub(super) faults: Vec<(u64, Fault)>,
}

impl Schedule {
    /// The faults of these kinds, spread over the run. `own_broker`: whether the broker may be harmed.
    pub(super) fn new(seed: u64, tasks: u64, kinds: &[Kind], own_broker: bool) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut faults = vec![];
        for kind in kinds {
            let count = (kind.in_full() * tasks).div_ceil(FULL).max(1);
            faults.extend((0..count).map(|n| fault(*kind, n, own_broker, &mut rng)));
        }
        rng.shuffle(&mut faults);
        // Between 5 % and 85 %: nothing to break before, time to recover after.
        let (begin, span) = (tasks / 20, tasks * 8 / 10);
        let count = faults.len() as u64;
        let place = |n: u64, rng: &mut fastrand::Rng| {
            let step = span / count;
            begin + n * span / count + if step > 0 { rng.u64(..step) } else { 0 }
        };
        let faults = (0..count).zip(faults).map(|(n, fault)| (place(n, &mut rng), fault));
        Self { tasks, faults: faults.collect() }
    }

    /// How many tasks may have been submitted while fault number `next` has not come yet.
    pub(super) fn allowance(&self, next: usize) -> u64 {
        let ahead = (self.tasks / 20).max(100);
        self.faults.get(next).map_or(self.tasks, |(at, _)| (at + ahead).min(self.tasks))
    }

    /// How many of each kind.
    pub(super) fn counts(&self) -> BTreeMap<Kind, u64> {
        let mut counts = BTreeMap::new();
        for (_, fault) in &self.faults {
            *counts.entry(fault.kind()).or_default() += 1;
        }
        counts
    }
}

fn fault(kind: Kind, number: u64, own_broker: bool, rng: &mut fastrand::Rng) -> Fault {
    let pick = rng.usize(..1_000);
    let away = Duration::from_millis(rng.u64(..1_500));
    // Workers and brokers notice after two heartbeats of 2 s; some outages are shorter, some longer.
    let frozen = Duration::from_millis(rng.u64(2_000..7_000));
    match kind {
        Kind::Worker => Fault::KillWorker { pick, away },
        Kind::Collector => Fault::KillCollector { pick, away },
        Kind::Producer => Fault::KillProducer { pick },
        Kind::Connection => match number % 4 {
            0 => Fault::CutAll,
            1 | 2 => Fault::CutOne { pick },
            _ => Fault::Silence(frozen),
        },
        Kind::Broker => Fault::KillBroker { away },
        Kind::Freeze => {
            let victim = match number % 4 {
                1 => Victim::Collector,
                2 if own_broker => Victim::Broker,
                3 => Victim::Producer,
                _ => Victim::Worker,
            };
            Fault::Freeze { victim, pick, away: frozen }
        }
    }
}

/// Kinds that are not possible, and why.
pub(super) type LeftOut = BTreeMap<Kind, &'static str>;

/// What `--faults` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Wanted {
    /// Whatever is possible here.
    All,
    /// Exactly these.
    Only(Vec<Kind>),
}

impl std::str::FromStr for Wanted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "all" => return Ok(Self::All),
            "none" => return Ok(Self::Only(vec![])),
            _ => {}
        }
        let mut kinds = vec![];
        for word in text.split(',') {
            let kind = Kind::from_str(word.trim(), true).map_err(|_| {
                let known = Kind::ALL.map(Kind::as_str).join(", ");
                format!("{word:?} is no kind of fault; write all, none, or some of {known}")
            })?;
            if !kinds.contains(&kind) {
                kinds.push(kind);
            }
        }
        kinds.sort_unstable();
        Ok(Self::Only(kinds))
    }
}

impl Wanted {
    /// The kinds to inject, and those left out of "all" with the reason.
    pub(super) fn resolve(
        &self,
        possible: impl Fn(Kind) -> Result<(), &'static str>,
    ) -> Result<(Vec<Kind>, LeftOut), CliError> {
        let mut left_out = LeftOut::new();
        let mut kinds = vec![];
        let asked = match self {
            Self::All => &Kind::ALL[..],
            Self::Only(kinds) => kinds,
        };
        for kind in asked {
            match possible(*kind) {
                Ok(()) => kinds.push(*kind),
                Err(reason) if *self == Self::All => drop(left_out.insert(*kind, reason)),
                Err(reason) => {
                    let message = format!("no faults of the kind {} here", kind.as_str());
                    return Err(CliError::unusable(message).help(reason));
                }
            }
        }
        Ok((kinds, left_out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_run_has_what_was_promised_and_a_small_one_has_each_kind() {
        let counts = Schedule::new(1, 100_000, &Kind::ALL, true).counts();
        let counts: Vec<u64> = counts.into_values().collect();
        assert_eq!(counts, [20, 5, 5, 20, 5, 5]);
        let counts = Schedule::new(1, 300, &Kind::ALL, true).counts();
        assert_eq!(counts.into_values().collect::<Vec<u64>>(), [1; 6]);
    }

    #[test]
    fn the_seed_alone_decides() {
        let schedule = |seed| Schedule::new(seed, 20_000, &Kind::ALL, true);
        assert_eq!(schedule(3), schedule(3));
        assert_ne!(schedule(3), schedule(4));
    }

    #[test]
    fn faults_come_in_order_and_within_the_run_and_the_workload_waits_for_them() {
        for tasks in [100, 300, 5_000, 100_000] {
            let schedule = Schedule::new(9, tasks, &Kind::ALL, true);
            let at: Vec<u64> = schedule.faults.iter().map(|(at, _)| *at).collect();
            assert!(at.is_sorted() && at.last() < Some(&(tasks * 9 / 10)), "{tasks}: {at:?}");
            for (next, at) in at.iter().enumerate() {
                let allowance = schedule.allowance(next);
                assert!(allowance > *at, "the fault can come");
            }
            assert_eq!(schedule.allowance(at.len()), tasks);
        }
        let large = Schedule::new(9, 100_000, &Kind::ALL, true);
        assert!(large.allowance(0) < 20_000, "not all is submitted before the first fault");
    }

    #[test]
    fn a_broker_of_others_is_left_alone() {
        let kinds = [Kind::Freeze];
        let schedule = Schedule::new(2, 1_000_000, &kinds, false);
        let hits = |fault: &Fault| matches!(fault, Fault::Freeze { victim: Victim::Broker, .. });
        assert!(!schedule.faults.iter().any(|(_, fault)| hits(fault)));
        assert!(Schedule::new(2, 1_000_000, &kinds, true).faults.iter().any(|(_, f)| hits(f)));
    }

    #[test]
    fn all_leaves_out_what_cannot_be_and_a_list_insists() {
        let possible = |kind| if kind == Kind::Broker { Err("not ours") } else { Ok(()) };
        let (kinds, left_out) = "all".parse::<Wanted>().unwrap().resolve(possible).unwrap();
        assert_eq!((kinds.len(), left_out), (5, [(Kind::Broker, "not ours")].into()));
        let error = "worker,broker".parse::<Wanted>().unwrap().resolve(possible).unwrap_err();
        assert_eq!(error.help.as_deref(), Some("not ours"));
        assert_eq!("none".parse::<Wanted>().unwrap(), Wanted::Only(vec![]));
        assert!("wroker".parse::<Wanted>().unwrap_err().contains("freeze"));
    }
}
