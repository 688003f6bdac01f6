//! Which workers are alive and what they know, by their heartbeats. Pure: the caller says how late it is.
//!
//! Anybody who may publish heartbeats can invent workers, so their number, the names they bring and the
//! time that they count are bounded, and what was not heard of for the longest time goes first: a worker
//! that is really there is heard of again at its next heartbeat.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Instant;

use garenne_common::wire::Heartbeat;
use garenne_common::{QueueName, TaskName};

/// Workers that are kept; more than any broker serves.
const MOST: usize = 10_000;
/// Of these, the workers of one sender: a user of RabbitMQ as it vouches for it, or all who name none.
const MOST_OF_SENDER: usize = MOST / 2;
/// Names of queues and tasks that are kept of all workers together.
const MOST_NAMES: usize = 500_000;

/// Who sent a heartbeat; two senders may use the same name for a worker.
type Sender = Option<String>;
type Key = (Sender, String);

/// The workers that were heard of lately.
#[derive(Debug, Default)]
pub(crate) struct Live {
    workers: HashMap<Key, Worker>,
    /// The workers of each sender in the order in which they were last heard of.
    heard: HashMap<Sender, BTreeMap<u64, String>>,
    /// Counts heartbeats.
    clock: u64,
    names: usize,
}

#[derive(Debug)]
struct Worker {
    until: Instant,
    heard: u64,
    queues: HashSet<QueueName>,
    tasks: HashSet<TaskName>,
}

impl Live {
    /// Takes a heartbeat in. A worker that drains takes no more tasks, and counts no more.
    pub(crate) fn hear(&mut self, sender: Option<&str>, heartbeat: Heartbeat, now: Instant) {
        let until = now + heartbeat.holds_for();
        let Heartbeat { worker, queues, tasks, draining, .. } = heartbeat;
        let key = (sender.map(str::to_owned), worker);
        self.forget(&key);
        if draining {
            return;
        }
        let (queues, tasks): (HashSet<_>, HashSet<_>) =
            (queues.into_iter().collect(), tasks.into_iter().collect());
        self.clock += 1;
        self.names += queues.len() + tasks.len();
        self.heard.entry(key.0.clone()).or_default().insert(self.clock, key.1.clone());
        self.workers.insert(key.clone(), Worker { until, heard: self.clock, queues, tasks });
        while self.heard.get(&key.0).is_some_and(|workers| workers.len() > MOST_OF_SENDER) {
            self.forget_oldest(Some(&key.0));
        }
        while self.workers.len() > MOST || (self.names > MOST_NAMES && self.workers.len() > 1) {
            self.forget_oldest(None);
        }
    }

    /// Forgets workers that were not heard of for too long.
    pub(crate) fn prune(&mut self, now: Instant) {
        let late = self.workers.iter().filter(|(_, worker)| worker.until <= now);
        for key in late.map(|(key, _)| key.clone()).collect::<Vec<_>>() {
            self.forget(&key);
        }
    }

    /// Whether a worker serves this queue and knows this task.
    pub(crate) fn knows(&self, queue: &QueueName, task: &TaskName) -> bool {
        let mut workers = self.workers.values();
        workers.any(|worker| worker.queues.contains(queue) && worker.tasks.contains(task))
    }

    fn forget_oldest(&mut self, of: Option<&Sender>) {
        let oldest = |(sender, workers): (&Sender, &BTreeMap<u64, String>)| {
            workers.first_key_value().map(|(heard, name)| (*heard, (sender.clone(), name.clone())))
        };
        let senders = self.heard.iter().filter(|(sender, _)| of.is_none_or(|of| of == *sender));
        if let Some((_, key)) = senders.filter_map(oldest).min_by_key(|(heard, _)| *heard) {
            self.forget(&key);
        }
    }

    fn forget(&mut self, key: &Key) {
        let Some(worker) = self.workers.remove(key) else { return };
        self.names -= worker.queues.len() + worker.tasks.len();
        if let Some(workers) = self.heard.get_mut(&key.0) {
            workers.remove(&worker.heard);
            if workers.is_empty() {
                self.heard.remove(&key.0);
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
    fn a_worker_counts_while_it_is_heard_of_and_takes_tasks() {
        let (mut live, now) = (Live::default(), Instant::now());
        let (cpu, task) = known();
        live.hear(None, heartbeat(false), now);
        assert!(live.knows(&cpu, &task));
        assert!(!live.knows(&QueueName::default(), &task));
        live.prune(now + Duration::from_secs(6));
        assert!(live.knows(&cpu, &task));
        live.prune(now + Duration::from_secs(7));
        assert!(!live.knows(&cpu, &task));
        live.hear(None, heartbeat(false), now);
        live.hear(None, heartbeat(true), now);
        assert!(!live.knows(&cpu, &task));
    }

    #[test]
    fn invented_workers_keep_no_real_one_out_and_are_forgotten() {
        let (mut live, now) = (Live::default(), Instant::now());
        let (cpu, task) = known();
        for number in 0..20_000 {
            live.hear(None, invented(number), now);
        }
        live.hear(None, heartbeat(false), now);
        assert!(live.knows(&cpu, &task));
        assert_eq!(live.workers.len(), MOST_OF_SENDER);
        live.prune(now + Duration::from_secs(182));
        assert!(live.workers.is_empty() && live.heard.is_empty() && live.names == 0);
    }

    #[test]
    fn a_sender_displaces_its_own_workers_and_speaks_for_no_others() {
        let (mut live, now) = (Live::default(), Instant::now());
        let (cpu, task) = known();
        live.hear(Some("garenne"), heartbeat(false), now);
        for number in 0..20_000 {
            live.hear(Some("mallory"), invented(number), now);
        }
        live.hear(Some("mallory"), heartbeat(true), now);
        assert!(live.knows(&cpu, &task));
    }

    #[test]
    fn names_are_bounded_too() {
        let (mut live, now) = (Live::default(), Instant::now());
        let tasks: Vec<_> =
            (0..20_000).map(|n| TaskName::new(&format!("t.{n}")).unwrap()).collect();
        for number in 0..100 {
            live.hear(None, Heartbeat { tasks: tasks.clone(), ..invented(number) }, now);
            assert!(live.names <= MOST_NAMES);
        }
        live.hear(None, heartbeat(false), now);
        let (cpu, task) = known();
        assert!(live.knows(&cpu, &task));
    }
}
