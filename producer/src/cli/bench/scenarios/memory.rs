//! The memory of worker and collector: idle, and with many deliveries in hand.

use std::time::Duration;

use garenne_common::QueueName;
use indicatif::HumanCount;
use tokio::time::{Instant, sleep};

use crate::cli::bench::Scenario;
use crate::cli::bench::figure::{Figure, Samples, Target, Unit};
use crate::cli::bench::load::{Way, Work};
use crate::cli::bench::stage::{Bench, Crew};
use crate::cli::bench::usage::Memory;
use crate::cli::error::CliError;

/// How long a process is left alone before its memory is read.
const SETTLING: Duration = Duration::from_secs(1);
/// How long a worker may take to fetch what it may hold.
const FETCHED_WITHIN: Duration = Duration::from_mins(1);
/// So long a task sleeps that none ends before the memory is read.
const ASLEEP: u64 = 600_000;

impl Bench<'_> {
    /// A fresh worker, the same one with as many unacknowledged tasks as it may hold, and the
    /// collector after all that came before.
    pub(in super::super) async fn memory(&mut self) -> Result<(), CliError> {
        let held = self.extent.held;
        let slots = self.tuned(1).slots.min(held);
        let crew = Crew { count: 1, slots, lookahead: held - slots };
        let (mut idle, mut full, mut peak) = (vec![], vec![], vec![]);
        for run in 1..=self.extent.repeats {
            self.remark("memory", run);
            self.no_workers().await?;
            self.workers(crew).await?;
            sleep(SETTLING).await;
            idle.extend(self.memory_of("Worker 1").map(|memory| memory.resident));
            self.fill(held).await?;
            sleep(SETTLING).await;
            let memory = self.memory_of("Worker 1");
            full.extend(memory.map(|memory| memory.resident));
            peak.extend(memory.map(|memory| memory.peak));
        }
        self.no_workers().await?;
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
            let figure = Figure::new(Scenario::Memory, id, title, Unit::Mebibytes, samples);
            self.figures.push(figure.wanting(target.map(Target::at_most)));
        }
        Ok(())
    }

    /// Gives the worker exactly what it may hold, and a little to leave in the queue.
    async fn fill(&self, held: usize) -> Result<(), CliError> {
        let left = held / 20;
        let count = u64::try_from(held + left).unwrap_or(u64::MAX);
        let load = self.load(Work::Sleep { millis: ASLEEP }, Way::Singles);
        load.submit(&self.producer, count).await?;
        let queue = self.cluster.config().broker.topology().task_queue(&QueueName::default());
        let (admin, deadline) = (self.cluster.admin(), Instant::now() + FETCHED_WITHIN);
        loop {
            let ready = admin.depth(&queue).await?.unwrap_or_default();
            if usize::try_from(ready).is_ok_and(|ready| ready <= left) {
                return Ok(());
            }
            if Instant::now() > deadline {
                let what = format!("a worker left {ready} of {count} tasks in the queue");
                return Err(CliError::unusable(what));
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    fn memory_of(&self, name: &str) -> Option<Memory> {
        Memory::of(self.cluster.process_id(name)?)
    }
}
