//! Which workers are alive and what they know, by their heartbeats. Pure: the caller says how late it is.

use std::collections::{HashMap, HashSet};
use std::time::Instant;

use garenne_common::wire::Heartbeat;
use garenne_common::{QueueName, TaskName};

/// Workers that are kept; more than any broker serves.
const MOST: usize = 10_000;

/// The workers that were heard of lately.
#[derive(Debug, Default)]
pub(crate) struct Live(HashMap<String, Worker>);

#[derive(Debug)]
struct Worker {
    until: Instant,
    queues: HashSet<QueueName>,
    tasks: HashSet<TaskName>,
}

impl Live {
    /// Takes a heartbeat in. A worker that drains takes no more tasks, and counts no more.
    pub(crate) fn hear(&mut self, heartbeat: Heartbeat, now: Instant) {
        let until = now + heartbeat.holds_for();
        let Heartbeat { worker, queues, tasks, draining, .. } = heartbeat;
        if draining {
            self.0.remove(&worker);
        } else if self.0.len() < MOST || self.0.contains_key(&worker) {
            let (queues, tasks) = (queues.into_iter().collect(), tasks.into_iter().collect());
            self.0.insert(worker, Worker { until, queues, tasks });
        }
    }

    /// Forgets workers that were not heard of for too long.
    pub(crate) fn prune(&mut self, now: Instant) {
        self.0.retain(|_, worker| worker.until > now);
    }

    /// Whether a worker serves this queue and knows this task.
    pub(crate) fn knows(&self, queue: &QueueName, task: &TaskName) -> bool {
        self.0.values().any(|worker| worker.queues.contains(queue) && worker.tasks.contains(task))
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
            slots: 1,
            running: 0,
            lost_slots: 0,
            draining,
            problems: vec![],
            every_ms: 2_000,
            at: Timestamp::from_millis(0),
        }
    }

    #[test]
    fn a_worker_counts_while_it_is_heard_of_and_takes_tasks() {
        let (mut live, now) = (Live::default(), Instant::now());
        let (cpu, task) = (QueueName::new("cpu").unwrap(), TaskName::new("a.b").unwrap());
        live.hear(heartbeat(false), now);
        assert!(live.knows(&cpu, &task));
        assert!(!live.knows(&QueueName::default(), &task));
        live.prune(now + Duration::from_secs(6));
        assert!(live.knows(&cpu, &task));
        live.prune(now + Duration::from_secs(7));
        assert!(!live.knows(&cpu, &task));
        live.hear(heartbeat(false), now);
        live.hear(heartbeat(true), now);
        assert!(!live.knows(&cpu, &task));
    }
}
