//! What is still to be submitted, what is with a producer, and what the broker has confirmed. Pure.
//!
//! What a killed producer had not reported as confirmed is submitted again, under the same id: the caller
//! of a submission whose outcome is unknown does the same. Its batch ends as abandoned, so those members
//! go without one.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use super::mix::{Mix, Unit};

/// All of it.
pub(super) struct Workload {
    waiting: VecDeque<Unit>,
    /// By number: how often it was handed to a producer.
    pub(super) handed: Vec<u32>,
    /// By number: when the broker had it.
    pub(super) confirmed: Vec<Option<Instant>>,
    confirmed_count: u64,
    /// How many of these are known to have shared a message.
    pub(super) bundled: u64,
    /// Results that producers waited for and have.
    pub(super) answered: u64,
    handed_count: u64,
    /// By the number of their first member.
    pub(super) batches: HashMap<u64, BatchFate>,
}

/// What is known of a batch on this side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BatchFate {
    pub(super) first: u64,
    pub(super) count: u64,
    /// Known once its producer has said so.
    pub(super) id: Option<String>,
    handed_at: Instant,
    pub(super) sealed: Option<Instant>,
    /// Its producer could not say whether it is sealed.
    doubtful: bool,
    /// Its producer was killed with members unconfirmed, so nobody can have sealed it.
    pub(super) orphaned: bool,
}

/// What a producer reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Said {
    Confirmed(u64),
    /// A producer that waits for results has this one.
    Answered(u64),
    /// So many of the confirmed came to the broker in bundles.
    Bundled(u64),
    Opened {
        first: u64,
        id: String,
    },
    Sealed(u64),
    /// The sealing failed in a way that leaves open whether it happened.
    Unsealed(u64),
}

impl Said {
    /// Reads a line of a producer.
    pub(super) fn read(line: &str) -> Option<Self> {
        let mut words = line.split(' ');
        let (what, index) = (words.next()?, words.next()?.parse().ok()?);
        match (what, words.next()) {
            ("confirmed", None) => Some(Self::Confirmed(index)),
            ("answered", None) => Some(Self::Answered(index)),
            ("bundled", None) => Some(Self::Bundled(index)),
            ("opened", Some(id)) => Some(Self::Opened { first: index, id: id.to_owned() }),
            ("sealed", None) => Some(Self::Sealed(index)),
            ("unsealed", None) => Some(Self::Unsealed(index)),
            _ => None,
        }
    }
}

impl Workload {
    pub(super) fn new(mix: Mix) -> Self {
        let tasks = usize::try_from(mix.tasks).unwrap_or(usize::MAX);
        Self {
            waiting: mix.units().into(),
            handed: vec![0; tasks],
            confirmed: vec![None; tasks],
            confirmed_count: 0,
            bundled: 0,
            answered: 0,
            handed_count: 0,
            batches: HashMap::new(),
        }
    }

    /// The next unit to submit, unless that would be more than `allowance` tasks in all.
    pub(super) fn next(&mut self, allowance: u64, now: Instant) -> Option<Unit> {
        let unit = *self.waiting.front()?;
        // What is handed out a second time was allowed before.
        let fresh = unit.indices().filter(|n| self.handed[at(*n)] == 0).count() as u64;
        if fresh > 0 && self.handed_count >= allowance {
            return None;
        }
        self.waiting.pop_front();
        self.handed_count += fresh;
        unit.indices().for_each(|n| self.handed[at(n)] += 1);
        if let Unit::Batch { first, count } = unit {
            let fate = BatchFate {
                first,
                count,
                id: None,
                handed_at: now,
                sealed: None,
                doubtful: false,
                orphaned: false,
            };
            self.batches.insert(first, fate);
        }
        Some(unit)
    }

    /// Notes what a producer has reported.
    pub(super) fn heard(&mut self, said: &Said, now: Instant) {
        match said {
            Said::Confirmed(index) => {
                if let Some(place) = self.confirmed.get_mut(at(*index))
                    && place.is_none()
                {
                    *place = Some(now);
                    self.confirmed_count += 1;
                }
            }
            Said::Answered(_) => self.answered += 1,
            Said::Bundled(count) => self.bundled += count,
            Said::Opened { first, id } => {
                if let Some(batch) = self.batches.get_mut(first) {
                    batch.id = Some(id.clone());
                }
            }
            Said::Sealed(first) => {
                if let Some(batch) = self.batches.get_mut(first) {
                    batch.sealed = Some(now);
                }
            }
            Said::Unsealed(first) => {
                if let Some(batch) = self.batches.get_mut(first) {
                    batch.doubtful = true;
                }
            }
        }
    }

    /// A producer died with these units: what it did not confirm goes to the front again.
    pub(super) fn lost(&mut self, units: impl IntoIterator<Item = Unit>) {
        for unit in units {
            let open: Vec<_> =
                unit.indices().filter(|n| self.confirmed[at(*n)].is_none()).collect();
            if let Unit::Batch { first, .. } = unit
                && let Some(batch) = self.batches.get_mut(&first)
            {
                // A producer seals only after it has reported every member.
                batch.orphaned = !open.is_empty();
                batch.doubtful = open.is_empty();
            }
            self.waiting.extend(open.into_iter().map(Unit::One));
        }
        // Before what is new: a caller who must try again does not let others go first.
        let (again, fresh): (VecDeque<_>, VecDeque<_>) = std::mem::take(&mut self.waiting)
            .into_iter()
            .partition(|unit| unit.indices().all(|n| self.handed[at(n)] > 0));
        self.waiting = again.into_iter().chain(fresh).collect();
    }

    pub(super) fn confirmed_count(&self) -> u64 {
        self.confirmed_count
    }

    /// How many tasks were submitted more than once.
    pub(super) fn resubmitted(&self) -> u64 {
        self.handed.iter().filter(|handed| **handed > 1).count() as u64
    }

    /// Whether the broker has everything.
    pub(super) fn is_done(&self) -> bool {
        self.confirmed_count == self.confirmed.len() as u64
            && self.batches.values().all(BatchFate::is_decided)
    }
}

impl BatchFate {
    /// Whether it must end as done: sealed well before its deadline, which the collector counts.
    pub(super) fn must_be_done(&self, deadline: Duration) -> bool {
        let slack = Duration::from_secs(3);
        self.sealed.is_some_and(|sealed| sealed - self.handed_at + slack < deadline)
    }

    fn is_decided(&self) -> bool {
        self.sealed.is_some() || self.doubtful || self.orphaned
    }

    /// Until when the collector may keep it open.
    pub(super) fn decided_by(&self, deadline: Duration) -> Instant {
        self.handed_at + deadline
    }
}

fn at(index: u64) -> usize {
    usize::try_from(index).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload() -> Workload {
        Workload::new(Mix { seed: 7, tasks: 200 })
    }

    #[test]
    fn lines_are_read_whole_or_not_at_all() {
        assert_eq!(Said::read("confirmed 7"), Some(Said::Confirmed(7)));
        assert_eq!(Said::read("bundled 7"), Some(Said::Bundled(7)));
        let opened = Said::Opened { first: 0, id: "b".to_owned() };
        assert_eq!(Said::read("opened 0 b"), Some(opened));
        for bad in ["", "confirmed", "confirmed x", "sealed 1 2", "hello 1"] {
            assert_eq!(Said::read(bad), None, "{bad}");
        }
    }

    #[test]
    fn nothing_runs_ahead_of_the_allowance() {
        let (mut workload, now) = (workload(), Instant::now());
        let mut handed = 0;
        while let Some(unit) = workload.next(60, now) {
            handed += unit.indices().count();
        }
        assert!((60..100).contains(&handed), "{handed}");
        assert!(workload.next(61, now).is_some() || handed > 61);
    }

    #[test]
    fn what_a_dead_producer_left_goes_first_and_without_its_batch() {
        let (mut workload, now) = (workload(), Instant::now());
        let unit = workload.next(200, now).unwrap();
        assert_eq!(unit, Unit::Batch { first: 0, count: 40 });
        (0..38).for_each(|n| workload.heard(&Said::Confirmed(n), now));
        workload.lost([unit]);
        assert!(workload.batches[&0].orphaned);
        assert_eq!(workload.next(0, now), Some(Unit::One(38)), "whatever the allowance");
        assert_eq!(workload.next(0, now), Some(Unit::One(39)));
        assert_eq!((workload.handed[38], workload.handed[0]), (2, 1));
    }

    #[test]
    fn it_is_done_when_everything_is_confirmed_and_every_batch_decided() {
        let (mut workload, now) = (workload(), Instant::now());
        while let Some(unit) = workload.next(200, now) {
            unit.indices().for_each(|n| workload.heard(&Said::Confirmed(n), now));
        }
        assert!(!workload.is_done(), "the batches are not sealed");
        let firsts: Vec<u64> = workload.batches.keys().copied().collect();
        for first in firsts {
            workload.heard(&Said::Sealed(first), now);
        }
        assert!(workload.is_done());
        assert!(workload.batches[&0].must_be_done(Duration::from_secs(15)));
    }
}
