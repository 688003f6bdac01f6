//! Divides tasks into bundles by how long tasks of their name took before.
//!
//! A bundle is delivered to one worker, so a large bundle of slow tasks keeps that worker busy
//! while others are idle. Tasks that are not known to be fast are sent in smaller bundles, slow
//! tasks alone. Pure arithmetic over measured durations; the producer measures, and chooses the
//! bundle size for task names whose duration has not been measured yet.

use std::collections::HashMap;
use std::time::Duration;

use foldhash::fast::RandomState;
use parking_lot::Mutex;

use crate::names::TaskName;
use crate::task::TaskMessage;
use crate::wire::bundle;

/// Largest bundle in bytes, below the 128 KiB of one frame in RabbitMQ. Larger messages are not
/// cheaper, and a bundle is held in memory as a whole.
const MAX_BYTES: usize = 96 * 1024;
/// Most task names whose durations are kept; beyond that all are measured again.
const MOST_NAMES: usize = 10_000;
/// Approximate number of recent tasks that a mean reflects.
const MEAN_OVER: f64 = 16.0;

/// The limits of a bundle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most tasks in a bundle.
    pub tasks: usize,
    /// Longest estimated time in which one worker runs all tasks of a bundle one after the other.
    pub work: Duration,
}

/// Mean durations of tasks by name; recent tasks have more weight.
#[derive(Debug, Default)]
pub struct DurationEstimates(Mutex<HashMap<TaskName, f64, RandomState>>);

impl DurationEstimates {
    /// Records the duration of a task.
    pub fn note(&self, name: &TaskName, took: Duration) {
        let (mut means, took) = (self.0.lock(), took.as_secs_f64());
        if let Some(mean) = means.get_mut(name) {
            *mean += (took - *mean) / MEAN_OVER;
            return;
        }
        if means.len() >= MOST_NAMES {
            means.clear();
        }
        means.insert(name.clone(), took);
    }

    /// The estimated duration of a task of this name; `None` if no such task has been measured.
    pub fn estimate(&self, name: &TaskName) -> Option<Duration> {
        self.0.lock().get(name).copied().map(Duration::from_secs_f64)
    }
}

impl Limits {
    /// Divides tasks into bundles, in their order, by their estimated durations. A task that
    /// exceeds a limit alone is the only one in its bundle.
    pub fn divide<T>(
        self,
        tasks: Vec<T>,
        task: impl Fn(&T) -> &TaskMessage,
        estimate: impl Fn(&TaskName) -> Duration,
    ) -> Vec<Vec<T>> {
        let sizes = self.sizes(tasks.iter().map(task), estimate);
        if sizes.len() == 1 {
            return vec![tasks];
        }
        let mut tasks = tasks.into_iter();
        sizes.into_iter().map(|size| tasks.by_ref().take(size).collect()).collect()
    }

    fn sizes<'t>(
        self,
        tasks: impl Iterator<Item = &'t TaskMessage>,
        estimate: impl Fn(&TaskName) -> Duration,
    ) -> Vec<usize> {
        let mut sizes: Vec<usize> = vec![];
        let (mut work, mut bytes) = (Duration::ZERO, 0);
        // Neighbours usually have the same name, so the last estimate is kept.
        let mut known: Option<(&TaskName, Duration)> = None;
        for task in tasks {
            let takes = match known {
                Some((name, takes)) if *name == task.name => takes,
                Some(_) | None => estimate(&task.name),
            };
            known = Some((&task.name, takes));
            let weight = bundle::weight(task);
            (work, bytes) = (work.saturating_add(takes), bytes + weight);
            match sizes.last_mut() {
                Some(size) if *size < self.tasks && work <= self.work && bytes <= MAX_BYTES => {
                    *size += 1;
                }
                Some(_) | None => {
                    (work, bytes) = (takes, weight);
                    sizes.push(1);
                }
            }
        }
        sizes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::{QueueName, TaskId};
    use crate::task::Options;
    use crate::wire::{Codec, Payload};

    const LIMITS: Limits = Limits { tasks: 100, work: Duration::from_millis(20) };

    fn task(name: &str, bytes: usize) -> TaskMessage {
        TaskMessage {
            id: TaskId::generate(),
            name: TaskName::new(name).unwrap(),
            queue: QueueName::default(),
            args: Payload { codec: Codec::Bincode, bytes: vec![0; bytes].into() },
            attempt: 1,
            batch: None,
            reply: None,
            options: Options::default(),
            submitted_at: None,
            traceparent: None,
            fingerprint: None,
        }
    }

    fn sizes(tasks: Vec<TaskMessage>, takes: impl Fn(&str) -> u64) -> Vec<usize> {
        let takes = |name: &TaskName| Duration::from_micros(takes(name.as_str()));
        LIMITS.divide(tasks, |task| task, takes).iter().map(Vec::len).collect()
    }

    fn alike(count: usize) -> Vec<TaskMessage> {
        (0..count).map(|_| task("a", 0)).collect()
    }

    #[test]
    fn bundles_are_limited_by_number_and_duration() {
        assert_eq!(sizes(alike(250), |_| 0), [100, 100, 50]);
        assert_eq!(sizes(alike(50), |_| 1_000), [20, 20, 10]);
        assert_eq!(sizes(alike(3), |_| 5_000_000), [1, 1, 1]);
        assert_eq!(sizes(vec![], |_| 0), [0; 0]);
    }

    #[test]
    fn a_slow_task_among_fast_ones_is_alone() {
        let mixed = [task("a", 0), task("slow", 0), task("a", 0), task("a", 0)];
        let takes = |name: &str| if name == "slow" { 1_000_000 } else { 10 };
        assert_eq!(sizes(mixed.into(), takes), [1, 1, 2]);
    }

    #[test]
    fn bundles_are_limited_by_bytes() {
        assert_eq!(sizes((0..4).map(|_| task("a", 40_000)).collect(), |_| 0), [2, 2]);
        assert_eq!(sizes(vec![task("a", 900_000), task("a", 1)], |_| 0), [1, 1]);
    }

    #[test]
    fn estimates_follow_recent_durations() {
        let (estimates, name) = (DurationEstimates::default(), TaskName::new("a").unwrap());
        assert_eq!(estimates.estimate(&name), None);
        estimates.note(&name, Duration::from_secs(1));
        assert_eq!(estimates.estimate(&name), Some(Duration::from_secs(1)));
        (0..100).for_each(|_| estimates.note(&name, Duration::ZERO));
        assert!(estimates.estimate(&name) < Some(Duration::from_millis(5)));
    }

    #[test]
    fn the_number_of_names_is_bounded() {
        let estimates = DurationEstimates::default();
        for number in 0..=MOST_NAMES {
            estimates.note(&TaskName::new(&format!("n{number}")).unwrap(), Duration::ZERO);
        }
        assert_eq!(estimates.0.lock().len(), 1);
    }
}
