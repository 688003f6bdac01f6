//! Who needed how much processor time while something was measured.

use std::time::Duration;

use garenne_common::config::broker_pid;
use serde::Serialize;

use super::usage::{cpu_seconds, machine_seconds};
use crate::cluster::Cluster;

/// Processor time of one run, in seconds, averaged over the runs.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Effort {
    /// The figure that it belongs to.
    pub(super) id: String,
    pub(super) title: String,
    /// Whether it is the bare client's.
    pub(super) raw: bool,
    pub(super) tasks: f64,
    pub(super) elapsed: f64,
    pub(super) spent: Spent,
}

/// Seconds of processor time by who spent them; what is not known is absent.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(super) struct Spent {
    /// This process: the producer, or all ends of the bare client.
    pub(super) client: Option<f64>,
    pub(super) workers: Option<f64>,
    pub(super) collector: Option<f64>,
    pub(super) broker: Option<f64>,
    /// Everything else on the machine, which a fair measurement has little of. Holds the broker where
    /// that is not known.
    pub(super) others: Option<f64>,
}

impl Spent {
    /// In the order of the tables.
    pub(super) fn parts(&self) -> [Option<f64>; 5] {
        [self.client, self.workers, self.collector, self.broker, self.others]
    }
}

/// Processor time so far: of this process, workers, collector, broker, and the whole machine.
pub(super) struct Reading([Option<f64>; 5]);

impl Reading {
    pub(super) fn take(cluster: &Cluster) -> Self {
        let of = |name: &str| cpu_seconds(cluster.process_id(name)?);
        let workers = cluster.running(|name| name.starts_with("Worker"));
        let workers = workers.into_iter().filter_map(cpu_seconds).reduce(|a, b| a + b);
        let broker = broker_pid().and_then(cpu_seconds);
        let this = cpu_seconds(std::process::id());
        Self([this, workers, of("Collector"), broker, machine_seconds()])
    }
}

/// Sums over the runs of one figure.
#[derive(Default)]
pub(super) struct Meter {
    runs: f64,
    tasks: f64,
    elapsed: f64,
    spent: [Option<f64>; 5],
}

impl Meter {
    pub(super) fn add(&mut self, before: &Reading, after: &Reading, tasks: u64, took: Duration) {
        self.runs += 1.0;
        self.tasks += count(tasks);
        self.elapsed += took.as_secs_f64();
        for ((sum, before), after) in self.spent.iter_mut().zip(before.0).zip(after.0) {
            let spent = before.zip(after).map(|(before, after)| after - before);
            *sum = spent.map(|spent| sum.unwrap_or(0.0) + spent);
        }
    }

    pub(super) fn average(self, id: &str, title: &str, raw: bool) -> Effort {
        let spent = self.spent.map(|sum| sum.map(|sum| sum / self.runs));
        let [client, workers, collector, broker, machine] = spent;
        let ours = [client, workers, collector, broker].into_iter().flatten().sum::<f64>();
        // Ticks of a hundredth of a second may sum up to a little less than nothing.
        let others = machine.map(|machine| (machine - ours).max(0.0));
        let spent = Spent { client, workers, collector, broker, others };
        let (tasks, elapsed) = (self.tasks / self.runs, self.elapsed / self.runs);
        Effort { id: id.to_owned(), title: title.to_owned(), raw, tasks, elapsed, spent }
    }
}

/// Tasks a second.
pub(super) fn rate(tasks: u64, took: Duration) -> f64 {
    count(tasks) / took.as_secs_f64()
}

#[expect(clippy::cast_precision_loss, reason = "counts of tasks are far below 2^52")]
fn count(tasks: u64) -> f64 {
    tasks as f64
}
