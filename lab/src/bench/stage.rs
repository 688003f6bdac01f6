//! What all scenarios need: the processes, the producer, both clients compared in turns.

use std::time::Duration;

use super::bare::{ACK_EVERY, BODY_BYTES, Bare, PREFETCH, WINDOW};
use garenne_cli::context::Context;
use garenne_cli::error::CliError;
use garenne_common::{QueueName, config::WorkerConfig};
use garenne_producer::Producer;

use super::extent::Extent;
use super::figure::{Figure, FigureUnit, RAW, Samples, Target};
use super::load::{Load, Way, Work};
use super::meter::{Effort, Meter, Reading, rate};
use super::report::{Report, Settings};
use super::usage::Machine;
use super::{BenchArgs, Scenario};
use crate::cluster::{Cluster, WorkerSpec};

/// Workers that are alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct WorkerCrew {
    pub(super) count: usize,
    pub(super) concurrency: usize,
    pub(super) prefetch: usize,
}

impl WorkerCrew {
    pub(super) fn spec(self, number: usize) -> WorkerSpec {
        let Self { concurrency, prefetch, .. } = self;
        let queues = vec![QueueName::default()];
        WorkerSpec { name: format!("Worker {number}"), queues, concurrency, prefetch }
    }
}

/// A comparison to make.
pub(super) struct Contest {
    pub(super) scenario: Scenario,
    pub(super) id: String,
    pub(super) title: String,
    pub(super) target: Option<Target>,
    /// How long a run lasts, as a share of the usual time.
    pub(super) share: f64,
}

impl Contest {
    pub(super) fn new(scenario: Scenario, id: impl Into<String>, title: impl Into<String>) -> Self {
        Self { scenario, id: id.into(), title: title.into(), target: None, share: 1.0 }
    }

    pub(super) fn wanting(self, target: Target) -> Self {
        Self { target: Some(target), ..self }
    }

    /// With shorter runs, where there are many of them.
    pub(super) fn lasting(self, share: f64) -> Self {
        Self { share, ..self }
    }
}

/// One run of the command: what it needs, and what it has measured so far.
pub(super) struct Bench<'a> {
    context: &'a Context,
    arguments: &'a BenchArgs,
    pub(super) extent: Extent,
    pub(super) cluster: &'a mut Cluster,
    pub(super) raw: &'a Bare,
    pub(super) producer: Producer,
    /// Gives each task a message of its own.
    apart: Producer,
    pub(super) figures: Vec<Figure>,
    efforts: Vec<Effort>,
}

impl<'a> Bench<'a> {
    /// Connects and starts the collector, which runs through nearly all scenarios.
    pub(super) async fn start(
        context: &'a Context,
        arguments: &'a BenchArgs,
        cluster: &'a mut Cluster,
        raw: &'a Bare,
    ) -> Result<Self, CliError> {
        let producer = Producer::connect_as(cluster.config(), "garenne bench").await?;
        let mut config = cluster.config().clone();
        config.producer.bundles.tasks = 1;
        let apart = Producer::connect_as(&config, "garenne bench, apart").await?;
        cluster.start_collector(&producer).await?;
        let (extent, figures, efforts) = (Extent::of(arguments), vec![], vec![]);
        Ok(Self { context, arguments, extent, cluster, raw, producer, apart, figures, efforts })
    }

    /// Closes and reports.
    pub(super) async fn finish(self, machine: Machine) -> Report {
        self.producer.close().await;
        self.apart.close().await;
        let settings = Settings {
            quick: self.arguments.quick,
            seconds: self.extent.seconds,
            tasks: self.arguments.tasks,
            repeats: self.extent.repeats,
            worker_concurrency: self.arguments.concurrency,
            worker_prefetch: self.arguments.prefetch,
            publish_window: self.cluster.config().broker.publish_window,
            raw_publish_window: WINDOW,
            raw_prefetch: PREFETCH,
            raw_ack_every: ACK_EVERY,
            raw_body_bytes: BODY_BYTES,
        };
        Report { machine, settings, figures: self.figures, processor_time: self.efforts }
    }

    /// Warms both up, then measures both in turns, the bare client first: tasks a second, and who
    /// needed which processor time. The figure is not on the report yet.
    pub(super) async fn compare(
        &mut self,
        contest: Contest,
        ours: impl AsyncFn(&Self, u64) -> Result<Duration, CliError>,
        raw: impl AsyncFn(&Bare, u64) -> Result<Duration, CliError>,
    ) -> Result<Figure, CliError> {
        let Contest { scenario, id, title, target, share } = contest;
        self.remark(&title, 0);
        let raw = async |bench: &Self, count| Ok(raw(bench.raw, count).await?);
        let raw_tasks = self.warm_up(share, &raw).await?;
        let tasks = self.warm_up(share, &ours).await?;
        let mut rates = [vec![], vec![]];
        let (mut effort, mut raw_effort) = (Meter::default(), Meter::default());
        for run in 1..=self.extent.repeats {
            self.remark(&title, run);
            rates[1].push(self.timed(raw_tasks, &raw, &mut raw_effort).await?);
            rates[0].push(self.timed(tasks, &ours, &mut effort).await?);
        }
        let [garenne, raw] = rates.map(Samples::of);
        self.efforts.push(effort.average(&id, &title, false));
        self.efforts.push(raw_effort.average(&id, &title, true));
        let figure = Figure::new(scenario, id, title, FigureUnit::PerSecond, garenne);
        Ok(figure.wanting(target).beside(RAW, raw))
    }

    /// Measures ours alone.
    pub(super) async fn measure(
        &mut self,
        contest: Contest,
        ours: impl AsyncFn(&Self, u64) -> Result<Duration, CliError>,
    ) -> Result<Figure, CliError> {
        let Contest { scenario, id, title, target, share } = contest;
        self.remark(&title, 0);
        let tasks = self.warm_up(share, &ours).await?;
        let (mut rates, mut effort) = (vec![], Meter::default());
        for run in 1..=self.extent.repeats {
            self.remark(&title, run);
            rates.push(self.timed(tasks, &ours, &mut effort).await?);
        }
        self.efforts.push(effort.average(&id, &title, false));
        let figure = Figure::new(scenario, id, title, FigureUnit::PerSecond, Samples::of(rates));
        Ok(figure.wanting(target))
    }

    /// Runs briefly twice, and says how many tasks a run shall have. The first time everything is
    /// cold, so the second is what the estimate comes from.
    pub(super) async fn warm_up(
        &self,
        share: f64,
        run: &impl AsyncFn(&Self, u64) -> Result<Duration, CliError>,
    ) -> Result<u64, CliError> {
        let first = self.extent.first;
        let cold = rate(first, run(self, first).await?);
        let more = self.extent.tasks(cold, share / 5.0);
        let warm = rate(more, run(self, more).await?);
        Ok(self.extent.tasks(warm, share))
    }

    async fn timed(
        &self,
        tasks: u64,
        run: &impl AsyncFn(&Self, u64) -> Result<Duration, CliError>,
        meter: &mut Meter,
    ) -> Result<f64, CliError> {
        let before = Reading::take(self.cluster);
        let took = run(self, tasks).await?;
        meter.add(&before, &Reading::take(self.cluster), tasks, took);
        Ok(rate(tasks, took))
    }

    /// Exactly these workers, freshly started.
    pub(super) async fn workers(&mut self, crew: WorkerCrew) -> Result<(), CliError> {
        let specs: Vec<_> = (1..=crew.count).map(|number| crew.spec(number)).collect();
        self.start_afresh(&specs).await
    }

    pub(super) async fn start_afresh(&mut self, specs: &[WorkerSpec]) -> Result<(), CliError> {
        self.cluster.stop(|name| name.starts_with("Worker")).await;
        self.cluster.start_workers(specs).await
    }

    /// None at all, and nothing in the queue.
    pub(super) async fn no_workers(&mut self) -> Result<(), CliError> {
        self.cluster.stop(|name| name.starts_with("Worker")).await;
        Ok(self.cluster.purge(&QueueName::default()).await?)
    }

    /// So many workers with the requested concurrency and prefetch.
    pub(super) fn tuned(&self, count: usize) -> WorkerCrew {
        WorkerCrew {
            count,
            concurrency: self.arguments.concurrency,
            prefetch: self.arguments.prefetch,
        }
    }

    /// One worker as it is configured by default.
    pub(super) fn shipped(&self) -> WorkerCrew {
        let WorkerConfig { concurrency, prefetch, .. } = self.cluster.config().worker;
        WorkerCrew { count: 1, concurrency, prefetch }
    }

    /// Who submits in this way.
    pub(super) fn by(&self, load: &Load) -> &Producer {
        match load.way {
            Way::Apart => &self.apart,
            Way::Singles | Way::Bulk => &self.producer,
        }
    }

    /// Tasks for the queue `default`.
    pub(super) fn load(&self, work: Work, way: Way) -> Load {
        let window = self.cluster.config().broker.publish_window;
        Load { work, way, queue: "default", window }
    }

    /// Tells a person what goes on; run 0 is the warm-up.
    pub(super) fn remark(&self, what: &str, run: u32) {
        match run {
            0 => self.note(what, "warming up"),
            _ => self.note(what, &format!("run {run} of {}", self.extent.repeats)),
        }
    }

    pub(super) fn note(&self, what: &str, step: &str) {
        self.context.output.remark(format_args!("{what}: {step}"));
    }
}
