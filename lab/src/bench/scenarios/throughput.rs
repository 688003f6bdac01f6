//! Tasks a second: one by one and in bulk, stored and not, and handlers that take their time.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use crate::bench::bare::Bare;
use garenne_cli::error::CliError;
use garenne_common::QueueName;

use crate::bench::Scenario;
use crate::bench::figure::{Figure, FigureUnit, RAW, Samples, Target};
use crate::bench::load::{Load, Way, Work};
use crate::bench::meter::rate;
use crate::bench::stage::{Bench, Contest};

/// What a handler of the scenarios `sleep` and `spin` takes.
const MILLIS: u64 = 1;

impl Bench<'_> {
    /// A call for each task, from the first submit to the batch's done notice; with a worker tuned
    /// for many small tasks, and with one as it is configured by default. Then with a message for
    /// each task as well.
    pub(in super::super) async fn singles(&mut self) -> Result<(), CliError> {
        let load = self.load(Work::Nothing, Way::Singles);
        self.workers(self.tuned(1)).await?;
        let contest = Contest::new(Scenario::Singles, "singles", "singles, stored");
        self.batches(contest.wanting(Target::times(1.6)), load.clone()).await?;
        self.workers(self.shipped()).await?;
        let title = "singles, worker as shipped";
        let contest = Contest::new(Scenario::Singles, "singles.shipped", title);
        self.batches(contest.lasting(0.5), load).await?;
        self.workers(self.tuned(1)).await?;
        let contest = Contest::new(Scenario::Singles, "apart", "singles apart, stored");
        self.batches(contest, self.load(Work::Nothing, Way::Apart)).await
    }

    /// All tasks in one call, from the first submit to the batch's done notice.
    pub(in super::super) async fn bulk(&mut self) -> Result<(), CliError> {
        let load = self.load(Work::Nothing, Way::Bulk);
        self.workers(self.tuned(1)).await?;
        let contest = Contest::new(Scenario::Bulk, "bulk", "bulk, stored");
        self.batches(contest.wanting(Target::times(5.0)), load).await
    }

    /// All tasks in one call, and every output in the submitter's hands; no collector runs, so nothing
    /// is stored.
    pub(in super::super) async fn replies(&mut self) -> Result<(), CliError> {
        // A starting worker asks the collector what is cancelled: it goes only after that.
        self.workers(self.tuned(1)).await?;
        self.cluster.stop(|name| name == "Collector").await;
        let load = self.load(Work::Nothing, Way::Bulk);
        let contest = Contest::new(Scenario::Replies, "replies", "bulk to producer, no store");
        let measured = self
            .compare(
                contest.wanting(Target::times(15.0)),
                async |bench, count| {
                    let took = load.run_to_producer(&bench.producer, count).await?;
                    bench.drop_results().await.map(|()| took)
                },
                async |raw, count| raw.tasks_with_results(count).await,
            )
            .await;
        self.figures.push(measured?);
        self.cluster.start_collector(&self.producer).await
    }

    /// Confirmed submissions without anybody to take them.
    pub(in super::super) async fn submit(&mut self) -> Result<(), CliError> {
        self.no_workers().await?;
        let consumed = RefCell::new(vec![]);
        let raw = async |raw: &Bare, count| {
            let published = raw.publish(count).await?;
            let took = raw.consume(count).await?;
            consumed.borrow_mut().push(rate(count, took));
            Ok(published)
        };
        for way in Way::ALL {
            let load = self.load(Work::Nothing, way);
            let (id, title) =
                (format!("submit.{}", way.name()), format!("submit {}, confirmed", way.title()));
            let mut contest = Contest::new(Scenario::Submit, id, title);
            if way == Way::Bulk {
                contest = contest.wanting(Target::at_least(300_000.0));
            }
            let ours = async |bench: &Self, count| bench.submit_only(&load, count).await;
            let figure = self.compare(contest, ours, &raw).await?;
            self.figures.push(figure);
        }
        // Nothing of ours does only this, but it says what the broker gives at best.
        let figure = Figure::new(
            Scenario::Submit,
            "raw.consume",
            "consume, acknowledged",
            FigureUnit::PerSecond,
            None,
        );
        self.figures.push(figure.beside(RAW, Samples::of(consumed.into_inner())));
        Ok(())
    }

    /// Handlers that wait a millisecond, as many at once as the worker's concurrency.
    pub(in super::super) async fn sleep(&mut self) -> Result<(), CliError> {
        let load = self.load(Work::Sleep { millis: MILLIS }, Way::Bulk);
        self.workers(self.tuned(1)).await?;
        let contest = Contest::new(Scenario::Sleep, "sleep", "bulk of 1 ms async, stored");
        self.batches(contest, load).await
    }

    /// Handlers that use a millisecond of processor time each, beside what the cores can do at most.
    pub(in super::super) async fn spin(&mut self) -> Result<(), CliError> {
        let load = self.load(Work::Spin { millis: MILLIS }, Way::Bulk);
        self.workers(self.tuned(1)).await?;
        let contest = Contest::new(Scenario::Spin, "spin", "bulk of 1 ms CPU, stored");
        let ours = async |bench: &Self, count| load.run_batch(&bench.producer, count).await;
        let figure = self.measure(contest, ours).await?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let most = f64::from(u32::try_from(cores).unwrap_or(u32::MAX)) * 1_000.0;
        let limit = figure.garenne.as_ref().map(|ours| vec![most; ours.all.len()]);
        self.figures.push(figure.beside("the cores", limit.and_then(Samples::of)));
        Ok(())
    }

    async fn batches(&mut self, contest: Contest, load: Load) -> Result<(), CliError> {
        let figure = self
            .compare(
                contest,
                async |bench, count| load.run_batch(bench.by(&load), count).await,
                async |raw, count| raw.tasks_with_results(count).await,
            )
            .await?;
        self.figures.push(figure);
        Ok(())
    }

    async fn submit_only(&self, load: &Load, count: u64) -> Result<Duration, CliError> {
        let begin = Instant::now();
        load.submit(self.by(load), count).await?;
        let took = begin.elapsed();
        self.cluster.purge(&QueueName::default()).await?;
        Ok(took)
    }

    /// What no collector will take.
    async fn drop_results(&self) -> Result<(), CliError> {
        let results = self.cluster.config().broker.topology().results();
        Ok(self.cluster.admin().purge(&results).await?)
    }
}
