//! How large bundles of tasks are: a small slice of work, by the times that tasks were seen to take.
//!
//! A bundle goes to one worker, so a large one of slow tasks would keep that worker busy while others
//! have nothing to do. What is not known to be quick travels in smaller bundles, what is slow alone.
//! Pure arithmetic over what was measured; whoever sends bundles does the measuring.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use foldhash::fast::RandomState;

use crate::names::TaskName;
use crate::task::TaskMessage;
use crate::wire::bundle;

/// More bytes do not make a message cheaper, but a bundle is held in memory whole; below the 128 KiB
/// that RabbitMQ takes in one frame.
const MAX_BYTES: usize = 96 * 1024;
/// Names whose times are kept; beyond that all are learnt anew.
const MOST_NAMES: usize = 10_000;
/// Of how many tasks a mean is the memory, roughly.
const MEMORY: f64 = 16.0;

/// What bounds a bundle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// How many tasks it may hold.
    pub tasks: usize,
    /// How long one worker, running one after the other, should take for it.
    pub work: Duration,
}

/// How long tasks of each name take, on average; recent ones count more.
#[derive(Debug, Default)]
pub struct DurationEstimates(Mutex<HashMap<TaskName, f64, RandomState>>);

impl DurationEstimates {
    /// A task took so long.
    pub fn note(&self, name: &TaskName, took: Duration) {
        let (mut means, took) = (self.lock(), took.as_secs_f64());
        if let Some(mean) = means.get_mut(name) {
            *mean += (took - *mean) / MEMORY;
            return;
        }
        if means.len() >= MOST_NAMES {
            means.clear();
        }
        means.insert(name.clone(), took);
    }

    /// How long a task of this name is likely to take, if any was seen.
    pub fn estimate(&self, name: &TaskName) -> Option<Duration> {
        self.lock().get(name).copied().map(Duration::from_secs_f64)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<TaskName, f64, RandomState>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Limits {
    /// Divides tasks into bundles, in their order, by how long each is likely to take. A task that
    /// alone is too much for a bundle is alone in one.
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
        // Bundles mostly hold one kind of tasks, so one name is looked up once.
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
    fn a_bundle_is_a_slice_of_work() {
        assert_eq!(sizes(alike(250), |_| 0), [100, 100, 50]);
        assert_eq!(sizes(alike(50), |_| 1_000), [20, 20, 10]);
        assert_eq!(sizes(alike(3), |_| 5_000_000), [1, 1, 1]);
        assert_eq!(sizes(vec![], |_| 0), [0; 0]);
    }

    #[test]
    fn a_slow_task_among_quick_ones_gets_no_company_after_it() {
        let mixed = [task("a", 0), task("slow", 0), task("a", 0), task("a", 0)];
        let takes = |name: &str| if name == "slow" { 1_000_000 } else { 10 };
        assert_eq!(sizes(mixed.into(), takes), [1, 1, 2]);
    }

    #[test]
    fn bytes_bound_it_too() {
        assert_eq!(sizes((0..4).map(|_| task("a", 40_000)).collect(), |_| 0), [2, 2]);
        assert_eq!(sizes(vec![task("a", 900_000), task("a", 1)], |_| 0), [1, 1]);
    }

    #[test]
    fn the_pace_follows_what_is_measured() {
        let (pace, name) = (DurationEstimates::default(), TaskName::new("a").unwrap());
        assert_eq!(pace.estimate(&name), None);
        pace.note(&name, Duration::from_secs(1));
        assert_eq!(pace.estimate(&name), Some(Duration::from_secs(1)));
        (0..100).for_each(|_| pace.note(&name, Duration::ZERO));
        assert!(pace.estimate(&name) < Some(Duration::from_millis(5)));
    }

    #[test]
    fn the_names_that_are_kept_are_bounded() {
        let pace = DurationEstimates::default();
        for number in 0..=MOST_NAMES {
            pace.note(&TaskName::new(&format!("n{number}")).unwrap(), Duration::ZERO);
        }
        assert_eq!(pace.lock().len(), 1);
    }
}
