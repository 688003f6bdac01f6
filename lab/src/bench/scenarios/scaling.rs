//! Tasks a second with more workers, more producers, more queues.

use std::time::{Duration, Instant};

use futures_util::future::try_join_all;
use garenne_cli::error::CliError;
use garenne_common::QueueName;
use garenne_producer::Producer;

use crate::bench::Scenario;
use crate::bench::figure::Samples;
use crate::bench::load::{Load, Way, Work};
use crate::bench::stage::{Bench, Contest};
use crate::cluster::WorkerSpec;

/// How long a run lasts, as a share of the usual time.
const SHARE: f64 = 0.5;
/// The two queues, beside `default`.
const QUEUES: [&str; 2] = ["left", "right"];

impl Bench<'_> {
    /// More worker processes on one queue, with one producer.
    pub(in super::super) async fn more_workers(&mut self) -> Result<(), CliError> {
        for &count in self.extent.workers {
            self.workers(self.tuned(count)).await?;
            let title = format!("singles, {}", counted(count, "worker"));
            let contest = Contest::new(Scenario::Workers, format!("workers.{count}"), title);
            let load = self.load(Work::Nothing, Way::Singles);
            let figure = self
                .compare(
                    contest.lasting(SHARE),
                    async |bench, tasks| load.run_batch(&bench.producer, tasks).await,
                    async |raw, tasks| raw.tasks_with_results(tasks).await,
                )
                .await?;
            self.figures.push(figure.at("singles", at(count)));
        }
        Ok(())
    }

    /// More producers, each with connections of its own, in this process; one worker.
    pub(in super::super) async fn more_producers(&mut self) -> Result<(), CliError> {
        self.workers(self.tuned(1)).await?;
        for &count in self.extent.producers {
            let mut producers = vec![];
            for number in 1..=count {
                let name = format!("garenne bench {number}");
                producers.push(Producer::connect_as(self.cluster.config(), &name).await?);
            }
            let title = format!("singles, {}", counted(count, "producer"));
            let contest = Contest::new(Scenario::Producers, format!("producers.{count}"), title);
            let load = self.load(Work::Nothing, Way::Singles);
            let measured = self
                .compare(
                    contest.lasting(SHARE),
                    async |_, tasks| together(producers.iter().map(|p| (p, &load)), tasks).await,
                    async |raw, tasks| raw.tasks_with_results(tasks).await,
                )
                .await;
            for producer in producers {
                producer.close().await;
            }
            self.figures.push(measured?.at("singles", at(count)));
        }
        Ok(())
    }

    /// Two queues with a worker each, beside one queue with one worker.
    pub(in super::super) async fn more_queues(&mut self) -> Result<(), CliError> {
        let names = QUEUES.map(|name| QueueName::new(name).map_err(|error| odd(&error)));
        let topology = self.cluster.config().broker.topology();
        let mut specs = vec![];
        for (number, name) in (1..).zip(names) {
            let queue = name?;
            self.cluster.declare(&topology.task_queue_declarations(&queue)).await?;
            specs.push(WorkerSpec { queues: vec![queue], ..self.tuned(1).spec(number) });
        }
        let load = self.load(Work::Nothing, Way::Singles);
        let loads = QUEUES.map(|queue| Load { queue, ..load.clone() });
        let mut measured: Vec<(Samples, _)> = vec![];
        for queues in 1..=QUEUES.len() {
            self.start_afresh(&specs[..queues]).await?;
            let title = format!("{}, a worker each", counted(queues, "queue"));
            let contest = Contest::new(Scenario::Queues, format!("queues.{queues}"), title);
            let figure = self
                .measure(contest.lasting(SHARE), async |bench, tasks| {
                    together(loads[..queues].iter().map(|load| (&bench.producer, load)), tasks)
                        .await
                })
                .await?;
            measured.extend(figure.garenne.clone().map(|samples| (samples, figure)));
        }
        let one = measured.first().map(|(samples, _)| samples.clone());
        for (number, (_, figure)) in (1..).zip(measured) {
            let figure = if number == 1 { figure } else { figure.beside("1 queue", one.clone()) };
            self.figures.push(figure.at("singles", number));
        }
        Ok(())
    }
}

/// The tasks shared out evenly; until the last batch is done.
async fn together<'t>(
    loads: impl ExactSizeIterator<Item = (&'t Producer, &'t Load)>,
    tasks: u64,
) -> Result<Duration, CliError> {
    let begin = Instant::now();
    let share = tasks / at(loads.len()).max(1);
    try_join_all(loads.map(|(producer, load)| load.run_batch(producer, share))).await?;
    Ok(begin.elapsed())
}

fn at(count: usize) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}

fn counted(count: usize, what: &str) -> String {
    if count == 1 { format!("1 {what}") } else { format!("{count} {what}s") }
}

pub(super) fn odd(error: &garenne_common::InvalidName) -> CliError {
    CliError::unusable(format!("cannot name a queue: {error}"))
}
