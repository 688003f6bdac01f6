//! Tasks a second while very many others wait, beside an empty queue.

use std::time::Instant;

use garenne_cli::error::CliError;
use garenne_producer::SealedBatch;
use indicatif::HumanCount;

use crate::bench::Scenario;
use crate::bench::figure::{Figure, FigureUnit, Samples, Target};
use crate::bench::load::{Load, Way, Work, done};
use crate::bench::meter::rate;
use crate::bench::stage::Bench;

/// How long a run lasts, as a share of the usual time.
const SHARE: f64 = 0.6;

/// What was measured on an empty queue, to be compared with the same before a backlog.
struct Empty {
    load: Load,
    /// Tasks of a run.
    tasks: u64,
    depths: Vec<u64>,
    rates: Vec<f64>,
}

impl Bench<'_> {
    /// With one message a task at every depth; in the other ways, which means fewer messages, at the
    /// deepest.
    pub(in super::super) async fn backlog(&mut self) -> Result<(), CliError> {
        // All of them first: a broker that was just relieved of a million messages has to clean up.
        let mut empty = vec![];
        for way in Way::ALL {
            let load = self.load(Work::Nothing, way);
            self.no_workers().await?;
            self.workers(self.tuned(1)).await?;
            let depths = match way {
                Way::Apart => self.extent.backlogs.clone(),
                Way::Singles | Way::Bulk => vec![self.extent.deepest()],
            };
            empty.push(self.on_empty(load, depths).await?);
        }
        for Empty { load, tasks, depths, rates } in empty {
            for depth in depths {
                let full = self.before(&load, tasks, depth).await?;
                let deepest = depth == self.extent.deepest();
                let target = deepest.then_some(Target::times(0.8));
                let figure = figure(load.way, depth, Samples::of(full)).wanting(target);
                self.figures.push(figure.beside("empty queue", Samples::of(rates.clone())));
            }
        }
        Ok(())
    }

    async fn on_empty(&mut self, load: Load, depths: Vec<u64>) -> Result<Empty, CliError> {
        let what = format!("{}, empty queue", load.way.title());
        self.remark(&what, 0);
        let run = async |bench: &Self, count| load.run_batch(bench.by(&load), count).await;
        let fitting = self.warm_up(SHARE, &run).await?;
        // The runs come out of the backlog, which shall hardly shrink by them.
        let runs = u64::from(self.extent.repeats) + 1;
        let shallowest = depths.iter().copied().min().unwrap_or_default();
        let tasks = fitting.min(shallowest / (2 * runs)).max(1);
        let mut rates = vec![];
        for run in 1..=self.extent.repeats {
            self.remark(&what, run);
            rates.push(rate(tasks, load.run_batch(self.by(&load), tasks).await?));
        }
        self.figures.push(figure(load.way, 0, Samples::of(rates.clone())));
        Ok(Empty { load, tasks, depths, rates })
    }

    /// Fills the queue without a worker, with a batch for each run at its head. In each run so many
    /// tasks are submitted, behind the backlog, and so many are done: the work of a run on an empty queue.
    async fn before(&mut self, load: &Load, tasks: u64, depth: u64) -> Result<Vec<f64>, CliError> {
        let what = format!("{} before {}", load.way.title(), HumanCount(depth));
        self.no_workers().await?;
        self.note(&what, "filling the queue");
        let mut heads = vec![];
        for _ in 0..=self.extent.repeats {
            heads.push(load.open_batch(self.by(load), tasks).await?);
        }
        let runs = u64::from(self.extent.repeats) + 1;
        load.submit(self.by(load), depth.saturating_sub(runs * tasks)).await?;
        self.workers(self.tuned(1)).await?;
        let mut rates = vec![];
        for (run, head) in (0..).zip(&heads) {
            self.remark(&what, run);
            rates.push(self.beside_backlog(load, tasks, head).await?);
        }
        self.no_workers().await?;
        // The first was the warm-up.
        Ok(rates.split_off(1))
    }

    async fn beside_backlog(
        &self,
        load: &Load,
        tasks: u64,
        head: &SealedBatch,
    ) -> Result<f64, CliError> {
        let begin = Instant::now();
        tokio::try_join!(load.submit(self.by(load), tasks), done(head))?;
        Ok(rate(tasks, begin.elapsed()))
    }
}

fn figure(way: Way, depth: u64, samples: Option<Samples>) -> Figure {
    let id = format!("backlog.{}.{depth}", way.name());
    let title = match depth {
        0 => format!("{}, empty queue", way.title()),
        _ => format!("{} before {}", way.title(), HumanCount(depth)),
    };
    let figure = Figure::new(Scenario::Backlog, id, title, FigureUnit::PerSecond, samples);
    figure.at(way.name(), depth)
}
