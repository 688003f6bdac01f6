//! The memory of worker and collector: idle, and with many deliveries in hand.

use std::time::Duration;

use garenne_cli::error::CliError;
use garenne_common::QueueName;
use indicatif::HumanCount;
use tokio::time::{Instant, sleep};

use super::scaling::odd;
use crate::bench::Scenario;
use crate::bench::figure::{Figure, FigureUnit, Samples, Target};
use crate::bench::load::{Load, Way, Work};
use crate::bench::stage::{Bench, WorkerCrew};
use crate::bench::usage::Memory;
use crate::cluster::WorkerSpec;

/// How long a process is left alone before its memory is read.
const SETTLING: Duration = Duration::from_secs(1);
/// How long a worker may take to fetch what it may hold.
const FETCHED_WITHIN: Duration = Duration::from_mins(1);
/// So long a task sleeps that none ends before the memory is read.
const ASLEEP: u64 = 600_000;

/// A quorum queue gives one consumer at most 2,000 messages that it has not acknowledged.
const QUEUES: [&str; 5] = ["held-1", "held-2", "held-3", "held-4", "held-5"];

impl Bench<'_> {
    /// A fresh worker, the same one with as many unacknowledged tasks as it may hold, and the
    /// collector after all that came before.
    pub(in super::super) async fn memory(&mut self) -> Result<(), CliError> {
        let held = self.extent.held;
        let concurrency = self.tuned(1).concurrency.min(held);
        let crew = WorkerCrew { count: 1, concurrency, prefetch: held };
        let topology = self.cluster.config().broker.topology();
        for queue in names()? {
            self.cluster.declare(&topology.task_queue_declarations(&queue)).await?;
        }
        let worker = [WorkerSpec { queues: names()?, ..crew.spec(1) }];
        let (mut idle, mut full, mut peak) = (vec![], vec![], vec![]);
        for run in 1..=self.extent.repeats {
            self.remark("memory", run);
            self.empty_queues().await?;
            self.start_afresh(&worker).await?;
            sleep(SETTLING).await;
            idle.extend(self.memory_of("Worker 1").map(|memory| memory.resident));
            self.fill(held).await?;
            sleep(SETTLING).await;
            let memory = self.memory_of("Worker 1");
            full.extend(memory.map(|memory| memory.resident));
            peak.extend(memory.map(|memory| memory.peak));
        }
        self.empty_queues().await?;
        let in_flight = HumanCount(u64::try_from(held).unwrap_or(u64::MAX));
        let collector = self.memory_of("Collector");
        let one = |value: Option<f64>| value.into_iter().collect::<Vec<_>>();
        for (id, title, samples, target) in [
            ("worker_idle", "worker, idle".to_owned(), idle, Some(20.0)),
            ("worker_full", format!("worker, {in_flight} in flight"), full, None),
            ("worker_peak", "worker, peak of that".to_owned(), peak, Some(60.0)),
            ("collector", "collector, now".to_owned(), one(collector.map(|m| m.resident)), None),
            ("collector_peak", "collector, peak".to_owned(), one(collector.map(|m| m.peak)), None),
        ] {
            let (id, samples) = (format!("memory.{id}"), Samples::of(samples));
            let figure = Figure::new(Scenario::Memory, id, title, FigureUnit::Mebibytes, samples);
            self.figures.push(figure.wanting(target.map(Target::at_most)));
        }
        Ok(())
    }

    /// Gives the worker exactly what it may hold, and a little to leave in the queues.
    async fn fill(&self, held: usize) -> Result<(), CliError> {
        let each = held.div_ceil(QUEUES.len());
        let left = each / 20;
        let count = u64::try_from(each + left).unwrap_or(u64::MAX);
        for queue in QUEUES {
            let load = self.load(Work::Sleep { millis: ASLEEP }, Way::Apart);
            Load { queue, ..load.clone() }.submit(self.by(&load), count).await?;
        }
        let (topology, admin) = (self.cluster.config().broker.topology(), self.cluster.admin());
        let deadline = Instant::now() + FETCHED_WITHIN;
        for queue in names()? {
            let name = topology.task_queue(&queue);
            loop {
                let ready = admin.depth(&name).await?.unwrap_or_default();
                if usize::try_from(ready).is_ok_and(|ready| ready <= left) {
                    break;
                }
                if Instant::now() > deadline {
                    let what = format!("a worker left {ready} of {count} tasks in queue {queue}");
                    return Err(CliError::unusable(what));
                }
                sleep(Duration::from_millis(20)).await;
            }
        }
        Ok(())
    }

    async fn empty_queues(&mut self) -> Result<(), CliError> {
        self.no_workers().await?;
        for queue in names()? {
            self.cluster.purge(&queue).await?;
        }
        Ok(())
    }

    fn memory_of(&self, name: &str) -> Option<Memory> {
        Memory::of(self.cluster.process_id(name)?)
    }
}

fn names() -> Result<Vec<QueueName>, CliError> {
    let names = QUEUES.map(|name| QueueName::new(name).map_err(|error| odd(&error)));
    names.into_iter().collect()
}
