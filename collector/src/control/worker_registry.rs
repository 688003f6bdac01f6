//! The workers that are alive and their handlers, known by heartbeats. Pure: the time is a parameter.
//!
//! Any client that may publish heartbeats can invent workers. So the number of workers and names is bounded,
//! and so is the time that a heartbeat is valid. The worker without a heartbeat for the longest time is
//! removed first; a real one comes back with its next heartbeat.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Instant;

use garenne_common::wire::Heartbeat;
use garenne_common::{QueueName, TaskName};

/// Maximum number of workers, more than a broker serves.
const MAX_WORKERS: usize = 10_000;
/// Maximum number of workers of one sender: a user that RabbitMQ has verified, or all without one.
const MAX_PER_SENDER: usize = MAX_WORKERS / 2;
/// Maximum number of names of queues and tasks, over all workers.
const MAX_NAMES: usize = 500_000;

/// The sender of a heartbeat; two senders may use the same name for a worker.
type Sender = Option<String>;
type Key = (Sender, String);

/// The known workers.
#[derive(Debug, Default)]
pub(crate) struct WorkerRegistry {
    workers: HashMap<Key, Worker>,
    /// The workers of each sender in the order of their last heartbeats.
    order: HashMap<Sender, BTreeMap<u64, String>>,
    /// Number of heartbeats.
    clock: u64,
    names: usize,
}

#[derive(Debug)]
struct Worker {
    until: Instant,
    beat: u64,
    queues: HashSet<QueueName>,
    tasks: HashSet<TaskName>,
}

impl WorkerRegistry {
    /// Records a heartbeat. A draining worker takes no more tasks and is removed.
    pub(crate) fn record(&mut self, sender: Option<&str>, heartbeat: Heartbeat, now: Instant) {
        let until = now + heartbeat.holds_for();
        let Heartbeat { worker, queues, tasks, draining, .. } = heartbeat;
        let key = (sender.map(str::to_owned), worker);
        self.remove(&key);
        if draining {
            return;
        }
        let (queues, tasks): (HashSet<_>, HashSet<_>) =
            (queues.into_iter().collect(), tasks.into_iter().collect());
        self.clock += 1;
        self.names += queues.len() + tasks.len();
        self.order.entry(key.0.clone()).or_default().insert(self.clock, key.1.clone());
        self.workers.insert(key.clone(), Worker { until, beat: self.clock, queues, tasks });
        while self.order.get(&key.0).is_some_and(|workers| workers.len() > MAX_PER_SENDER) {
            self.remove_oldest(Some(&key.0));
        }
        while self.workers.len() > MAX_WORKERS || (self.names > MAX_NAMES && self.workers.len() > 1)
        {
            self.remove_oldest(None);
        }
    }

    /// Removes workers whose last heartbeat has expired.
    pub(crate) fn prune(&mut self, now: Instant) {
        let late = self.workers.iter().filter(|(_, worker)| worker.until <= now);
        for key in late.map(|(key, _)| key.clone()).collect::<Vec<_>>() {
            self.remove(&key);
        }
    }

    /// Whether a worker serves this queue and has a handler for this task.
    pub(crate) fn has_handler(&self, queue: &QueueName, task: &TaskName) -> bool {
        let mut workers = self.workers.values();
        workers.any(|worker| worker.queues.contains(queue) && worker.tasks.contains(task))
    }

    fn remove_oldest(&mut self, of: Option<&Sender>) {
        let oldest = |(sender, workers): (&Sender, &BTreeMap<u64, String>)| {
            workers.first_key_value().map(|(beat, name)| (*beat, (sender.clone(), name.clone())))
        };
        let senders = self.order.iter().filter(|(sender, _)| of.is_none_or(|of| of == *sender));
        if let Some((_, key)) = senders.filter_map(oldest).min_by_key(|(beat, _)| *beat) {
            self.remove(&key);
        }
    }

    fn remove(&mut self, key: &Key) {
        let Some(worker) = self.workers.remove(key) else { return };
        self.names -= worker.queues.len() + worker.tasks.len();
        if let Some(workers) = self.order.get_mut(&key.0) {
            workers.remove(&worker.beat);
            if workers.is_empty() {
                self.order.remove(&key.0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use garenne_common::Timestamp;
    use std::time::Duration;

    fn heartbeat(draining: bool) -> Heartbeat {
        Heartbeat {
            worker: "w".to_owned(),
            version: "1".to_owned(),
            queues: vec![QueueName::new("cpu").unwrap()],
            tasks: vec![TaskName::new("a.b").unwrap()],
            concurrency: 1,
            running: 0,
            stuck_handlers: 0,
            draining,
            problems: vec![],
            every_ms: 2_000,
            at: Timestamp::from_millis(0),
        }
    }

    fn invented(number: usize) -> Heartbeat {
        let task = TaskName::new("no.such").unwrap();
        let worker = format!("fake-{number}");
        Heartbeat { worker, tasks: vec![task], every_ms: u32::MAX, ..heartbeat(false) }
    }

    fn known() -> (QueueName, TaskName) {
        (QueueName::new("cpu").unwrap(), TaskName::new("a.b").unwrap())
    }

    #[test]
    fn a_worker_is_known_while_it_is_alive_and_not_draining() {
        let (mut registry, now) = (WorkerRegistry::default(), Instant::now());
        let (cpu, task) = known();
        registry.record(None, heartbeat(false), now);
        assert!(registry.has_handler(&cpu, &task));
        assert!(!registry.has_handler(&QueueName::default(), &task));
        registry.prune(now + Duration::from_secs(6));
        assert!(registry.has_handler(&cpu, &task));
        registry.prune(now + Duration::from_secs(7));
        assert!(!registry.has_handler(&cpu, &task));
        registry.record(None, heartbeat(false), now);
        registry.record(None, heartbeat(true), now);
        assert!(!registry.has_handler(&cpu, &task));
    }

    #[test]
    fn invented_workers_do_not_displace_real_ones_and_expire() {
        let (mut registry, now) = (WorkerRegistry::default(), Instant::now());
        let (cpu, task) = known();
        for number in 0..20_000 {
            registry.record(None, invented(number), now);
        }
        registry.record(None, heartbeat(false), now);
        assert!(registry.has_handler(&cpu, &task));
        assert_eq!(registry.workers.len(), MAX_PER_SENDER);
        registry.prune(now + Duration::from_secs(182));
        assert!(registry.workers.is_empty() && registry.order.is_empty() && registry.names == 0);
    }

    #[test]
    fn a_sender_displaces_only_its_own_workers() {
        let (mut registry, now) = (WorkerRegistry::default(), Instant::now());
        let (cpu, task) = known();
        registry.record(Some("garenne"), heartbeat(false), now);
        for number in 0..20_000 {
            registry.record(Some("mallory"), invented(number), now);
        }
        registry.record(Some("mallory"), heartbeat(true), now);
        assert!(registry.has_handler(&cpu, &task));
    }

    #[test]
    fn the_number_of_names_is_bounded() {
        let (mut registry, now) = (WorkerRegistry::default(), Instant::now());
        let tasks: Vec<_> =
            (0..20_000).map(|n| TaskName::new(&format!("t.{n}")).unwrap()).collect();
        for number in 0..100 {
            registry.record(None, Heartbeat { tasks: tasks.clone(), ..invented(number) }, now);
            assert!(registry.names <= MAX_NAMES);
        }
        registry.record(None, heartbeat(false), now);
        let (cpu, task) = known();
        assert!(registry.has_handler(&cpu, &task));
    }
}
