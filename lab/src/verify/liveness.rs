//! Does everything go on? For each that may have to wait (a task, a batch, a producer, a queue, a
//! process) the age of the oldest thing it waits for, judged all the time. Pure.
//!
//! Only time counts in which nothing is broken: what a fault holds up is due when the fault is over.

use std::collections::{BTreeMap, HashSet};
use std::time::{Duration, Instant};

use super::check::{Invariant, Violation};

/// What somebody waits for, and since when it could have come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Waiting {
    /// Who or what stands still.
    pub(super) subject: String,
    /// What it waits for.
    pub(super) what: String,
    pub(super) since: Instant,
}

/// Judges what waits.
#[derive(Debug)]
pub(super) struct Watch {
    limit: Duration,
    /// Since when nothing is broken.
    calm: Option<Instant>,
    named: HashSet<String>,
    worst: Duration,
}

impl Watch {
    /// Nothing may wait longer than `limit` while nothing is broken.
    pub(super) fn new(limit: Duration) -> Self {
        Self { limit, calm: None, named: HashSet::new(), worst: Duration::ZERO }
    }

    /// Takes note of what waits now; each subject that waits too long is a breach, once.
    pub(super) fn look(
        &mut self,
        now: Instant,
        broken: bool,
        waiting: impl IntoIterator<Item = Waiting>,
    ) -> Vec<Violation> {
        if broken {
            self.calm = None;
            return vec![];
        }
        let calm = *self.calm.get_or_insert(now);
        let mut breaches = vec![];
        for Waiting { subject, what, since } in waiting {
            let age = now.saturating_duration_since(since.max(calm));
            self.worst = self.worst.max(age);
            if age > self.limit && self.named.insert(subject.clone()) {
                let what = format!("for {} s with nothing broken: {what}", age.as_secs());
                breaches.push(Violation { invariant: Invariant::Liveness, subject, what });
            }
        }
        breaches
    }

    /// The longest that anything has waited.
    pub(super) fn worst(&self) -> Duration {
        self.worst
    }
}

/// Since when each queue has held the same number of messages, and more than none.
#[derive(Debug, Default)]
pub(super) struct Depths(BTreeMap<String, (u32, Instant)>);

impl Depths {
    pub(super) fn note(&mut self, depths: &[(String, u32)], now: Instant) {
        for (queue, ready) in depths {
            match self.0.get_mut(queue) {
                Some((known, since)) if known != ready => (*known, *since) = (*ready, now),
                Some(_) => {}
                None => drop(self.0.insert(queue.clone(), (*ready, now))),
            }
        }
    }

    pub(super) fn waiting(&self) -> impl Iterator<Item = Waiting> {
        let full = self.0.iter().filter(|(_, (ready, _))| *ready > 0);
        full.map(|(queue, (ready, since))| Waiting {
            subject: format!("queue {queue}"),
            what: format!("{ready} messages, and their number does not change"),
            since: *since,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    fn task(since: Instant) -> [Waiting; 1] {
        [Waiting { subject: "task 7".to_owned(), what: "its end".to_owned(), since }]
    }

    #[test]
    fn what_waits_too_long_is_named_once() {
        let (mut watch, begun) = (Watch::new(LIMIT), Instant::now());
        assert_eq!(watch.look(begun, false, task(begun)), []);
        assert_eq!(watch.look(begun + LIMIT, false, task(begun)), []);
        let late = begun + LIMIT * 2;
        let breaches = watch.look(late, false, task(begun));
        assert_eq!(breaches[0].subject, "task 7");
        assert_eq!(breaches[0].what, "for 20 s with nothing broken: its end");
        assert_eq!(watch.look(late, false, task(begun)), []);
        assert_eq!(watch.worst(), LIMIT * 2);
    }

    #[test]
    fn time_in_which_something_is_broken_does_not_count() {
        let (mut watch, begun) = (Watch::new(LIMIT), Instant::now());
        watch.look(begun, false, task(begun));
        assert_eq!(watch.look(begun + LIMIT * 2, true, task(begun)), []);
        assert_eq!(watch.look(begun + LIMIT * 3, false, task(begun)), []);
        assert_eq!(watch.look(begun + LIMIT * 4, false, task(begun)), []);
        assert_eq!(watch.look(begun + LIMIT * 5, false, task(begun)).len(), 1);
    }

    #[test]
    fn a_queue_waits_while_it_holds_the_same_number() {
        let (mut depths, begun) = (Depths::default(), Instant::now());
        let depth = |ready| [("results".to_owned(), ready)];
        depths.note(&depth(3), begun);
        depths.note(&depth(3), begun + LIMIT);
        assert_eq!(depths.waiting().next().map(|waiting| waiting.since), Some(begun));
        depths.note(&depth(2), begun + LIMIT);
        assert_eq!(depths.waiting().next().map(|waiting| waiting.since), Some(begun + LIMIT));
        depths.note(&depth(0), begun + LIMIT);
        assert_eq!(depths.waiting().next(), None);
    }
}
