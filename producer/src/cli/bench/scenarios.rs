//! The scenarios: each prepares, warms up, and then measures run by run, the bare client first.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use futures_util::{Stream, StreamExt};
use garenne_common::broker::BrokerError;
use garenne_common::broker::raw::{ACK_EVERY, BODY_BYTES, PREFETCH, Raw, WINDOW};
use garenne_common::config::broker_pid;
use garenne_common::{Codec, QueueName, Task, TaskId};
use garenne_producer::{Producer, Submission, SubmitError};
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use tokio::time::sleep;

use super::Arguments;
use super::report::{Effort, Figure, Report, Samples, Settings, Unit};
use super::usage::{Machine, Memory, cpu_seconds, machine_seconds};
use crate::cli::cluster::{Cluster, WorkerSpec};
use crate::cli::context::Context;
use crate::cli::error::CliError;

/// A run that takes longer has gone wrong.
const PATIENCE: Duration = Duration::from_mins(10);
/// Round trips in one run of `latency`, and those before that do not count.
const ROUND_TRIPS: u64 = 500;
const ROUND_TRIPS_BEFORE: u64 = 50;
/// Starts in one run of `start`.
const STARTS: u32 = 5;
/// How long a worker is left alone before its idle memory is read.
const SETTLING: Duration = Duration::from_secs(1);

/// The built-in `garenne.echo`, as a program would declare it.
#[derive(Serialize, Deserialize)]
struct Echo(u64);

impl Task for Echo {
    const NAME: &'static str = "garenne.echo";
    type Output = u64;
}

impl Echo {
    /// As JSON, which is the default and what `garenne.echo` reads.
    fn submission(number: u64) -> Submission<u64> {
        Submission::new(Self(number)).codec(Codec::Json)
    }
}

/// Workers that are alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Crew {
    count: usize,
    slots: usize,
    lookahead: usize,
}

impl Crew {
    fn spec(self, number: usize) -> WorkerSpec {
        let Self { slots, lookahead, .. } = self;
        let queues = vec![QueueName::default()];
        WorkerSpec { name: format!("Worker {number}"), queues, slots, lookahead }
    }
}

/// One run of the command: what it needs, and what it has measured so far.
pub(super) struct Bench<'a> {
    context: &'a Context,
    arguments: &'a Arguments,
    cluster: &'a mut Cluster,
    raw: &'a Raw,
    producer: Producer,
    figures: Vec<Figure>,
    efforts: Vec<Effort>,
}

impl<'a> Bench<'a> {
    /// Connects and starts the collector, which runs through all scenarios.
    pub(super) async fn start(
        context: &'a Context,
        arguments: &'a Arguments,
        cluster: &'a mut Cluster,
        raw: &'a Raw,
    ) -> Result<Self, CliError> {
        let producer = Producer::connect_as(cluster.config(), "garenne bench").await?;
        cluster.start_collector(&producer).await?;
        let (figures, efforts) = (vec![], vec![]);
        Ok(Self { context, arguments, cluster, raw, producer, figures, efforts })
    }

    /// Closes and reports.
    pub(super) async fn finish(self, machine: Machine) -> Report {
        self.producer.close().await;
        let settings = Settings {
            tasks: self.arguments.tasks,
            repeats: self.arguments.repeats,
            worker_slots: self.arguments.slots,
            worker_lookahead: self.arguments.lookahead,
            publish_window: self.cluster.config().broker.publish_window,
            raw_publish_window: WINDOW,
            raw_prefetch: PREFETCH,
            raw_ack_every: ACK_EVERY,
            raw_body_bytes: BODY_BYTES,
        };
        Report { machine, settings, figures: self.figures, processor_time: self.efforts }
    }

    /// From the first submit to the batch's done notice, with one worker, with two and with one as it
    /// is configured by default; and the memory of worker and collector before and after.
    pub(super) async fn tasks(&mut self) -> Result<(), CliError> {
        let (tasks, tuned) = (self.arguments.tasks, self.tuned());
        let worker = &self.cluster.config().worker;
        let default = Crew { count: 1, slots: worker.slots, lookahead: worker.lookahead };
        for (what, tasks, crew) in [
            ("tasks, 1 worker", tasks, tuned),
            ("tasks, 2 workers", tasks, Crew { count: 2, ..tuned }),
            // A fifth, because few unacknowledged deliveries mean many small steps.
            ("tasks, 1 worker as shipped", tasks / 5, default),
        ] {
            self.workers(crew).await?;
            sleep(SETTLING).await;
            let idle = self.memory();
            self.compare(what, tasks, Self::run_batch, async |raw, count| {
                raw.tasks_with_results(count).await
            })
            .await?;
            if crew == tuned {
                self.report_memory(idle);
            }
        }
        Ok(())
    }

    /// Confirmed submissions without anybody to take them.
    pub(super) async fn submit(&mut self) -> Result<(), CliError> {
        self.workers(Crew { count: 0, ..self.tuned() }).await?;
        let consumed = RefCell::new(vec![]);
        let raw = async |raw: &Raw, count| {
            let published = raw.publish(count).await?;
            let took = raw.consume(count).await?;
            consumed.borrow_mut().push(rate(count, took));
            Ok(published)
        };
        let tasks = self.arguments.tasks;
        self.compare("submit, confirmed", tasks, Self::run_submit, raw).await?;
        // Nothing of ours does only this, but it says what the broker gives at best. Not the warm-up.
        let raw = Samples::of(consumed.into_inner().split_off(1));
        self.figures.push(Figure::new("consume, acknowledged", Unit::PerSecond, None, raw));
        Ok(())
    }

    /// One task at a time; the quantiles of each run, and their medians over the runs.
    pub(super) async fn latency(&mut self) -> Result<(), CliError> {
        self.workers(self.tuned()).await?;
        let mut quantiles: [Vec<f64>; 4] = Default::default();
        for run in 1..=self.arguments.repeats {
            self.remark("round trips", run);
            let raw = self.raw.round_trips(ROUND_TRIPS_BEFORE + ROUND_TRIPS).await?;
            let ours = self.round_trips().await?;
            for (times, place) in [(ours, 0), (raw, 2)] {
                let histogram = histogram(&times)?;
                for (offset, quantile) in [(0, 0.5), (1, 0.99)] {
                    quantiles[place + offset]
                        .push(micros_to_millis(histogram.value_at_quantile(quantile)));
                }
            }
        }
        let [ours_p50, ours_p99, raw_p50, raw_p99] = quantiles.map(Samples::of);
        for (what, garenne, raw) in [
            ("idle round trip, p50", ours_p50, raw_p50),
            ("idle round trip, p99", ours_p99, raw_p99),
        ] {
            self.figures.push(Figure::new(what, Unit::Milliseconds, garenne, raw));
        }
        Ok(())
    }

    /// From the start of a worker process to the output of a task that waits for it.
    pub(super) async fn start_up(&mut self) -> Result<(), CliError> {
        let mut times = vec![];
        for run in 1..=self.arguments.repeats {
            self.remark("worker starts", run);
            for _ in 0..STARTS {
                self.workers(Crew { count: 0, ..self.tuned() }).await?;
                let waiting = self.producer.submit(Echo::submission(1)).await?;
                let begin = Instant::now();
                self.cluster.spawn_worker(&self.tuned().spec(1))?;
                waiting.output().await?;
                times.push(begin.elapsed().as_secs_f64() * 1e3);
            }
        }
        let what = "worker start to first result";
        self.figures.push(Figure::new(what, Unit::Milliseconds, Samples::of(times), None));
        Ok(())
    }

    /// Warms both up, then measures both in turns: tasks a second, and who needed which processor time.
    async fn compare(
        &mut self,
        what: &str,
        tasks: u64,
        ours: impl AsyncFn(&Self, u64) -> Result<Duration, CliError>,
        raw: impl AsyncFn(&Raw, u64) -> Result<Duration, BrokerError>,
    ) -> Result<(), CliError> {
        raw(self.raw, tasks / 10).await?;
        ours(self, tasks / 10).await?;
        let mut rates = [vec![], vec![]];
        let (mut effort, mut raw_effort) = (Meter::default(), Meter::default());
        for run in 1..=self.arguments.repeats {
            self.remark(what, run);
            let before = self.effort();
            let took = raw(self.raw, tasks).await?;
            raw_effort.add(&before, &self.effort(), took);
            rates[1].push(rate(tasks, took));
            let before = self.effort();
            let took = ours(self, tasks).await?;
            effort.add(&before, &self.effort(), took);
            rates[0].push(rate(tasks, took));
        }
        let [garenne, raw] = rates.map(Samples::of);
        self.figures.push(Figure::new(what, Unit::PerSecond, garenne, raw));
        self.efforts.push(effort.average(what.to_owned()));
        self.efforts.push(raw_effort.average("  the same, raw".to_owned()));
        Ok(())
    }

    async fn run_batch(&self, count: u64) -> Result<Duration, CliError> {
        let begin = Instant::now();
        let batch = self.producer.batch().await?;
        let submissions = futures_util::stream::iter((0..count).map(Echo::submission));
        all_confirmed(batch.submit_all_detached::<u64, _>(submissions)).await?;
        let summary = batch.seal().await?.wait_timeout(PATIENCE).await?;
        let took = begin.elapsed();
        if summary.succeeded == count {
            return Ok(took);
        }
        Err(CliError::unusable(format!("only {} of {count} tasks succeeded", summary.succeeded)))
    }

    async fn run_submit(&self, count: u64) -> Result<Duration, CliError> {
        let begin = Instant::now();
        let submissions = futures_util::stream::iter((0..count).map(Echo::submission));
        all_confirmed(self.producer.submit_all_detached::<u64, _>(submissions)).await?;
        let took = begin.elapsed();
        self.cluster.purge(&QueueName::default()).await?;
        Ok(took)
    }

    async fn round_trips(&self) -> Result<Vec<Duration>, CliError> {
        let mut times = vec![];
        for number in 0..ROUND_TRIPS_BEFORE + ROUND_TRIPS {
            let begin = Instant::now();
            let output = self.producer.submit(Echo::submission(number)).await?.output().await?;
            times.push(begin.elapsed());
            if output != number {
                return Err(CliError::unusable(format!("echo of {number} answered {output}")));
            }
        }
        Ok(times)
    }

    /// Exactly these workers, freshly started.
    async fn workers(&mut self, crew: Crew) -> Result<(), CliError> {
        self.cluster.stop(|name| name.starts_with("Worker")).await;
        let specs: Vec<_> = (1..=crew.count).map(|number| crew.spec(number)).collect();
        self.cluster.start_workers(&specs).await
    }

    /// One worker with the slots and the look-ahead asked for.
    fn tuned(&self) -> Crew {
        Crew { count: 1, slots: self.arguments.slots, lookahead: self.arguments.lookahead }
    }

    fn remark(&self, what: &str, run: u32) {
        self.context.output.remark(format_args!("{what}: run {run} of {}", self.arguments.repeats));
    }

    /// Worker and collector.
    fn memory(&self) -> [Option<Memory>; 2] {
        ["Worker 1", "Collector"].map(|name| Memory::of(self.cluster.process_id(name)?))
    }

    fn report_memory(&mut self, idle: [Option<Memory>; 2]) {
        for ((name, idle), after) in
            ["worker", "collector"].into_iter().zip(idle).zip(self.memory())
        {
            let values = [
                ("idle", idle.map(|memory| memory.resident)),
                ("after load", after.map(|memory| memory.resident)),
                ("peak", after.map(|memory| memory.peak)),
            ];
            for (when, value) in values {
                let garenne = value.and_then(|value| Samples::of(vec![value]));
                let what = format!("{name} memory, {when}");
                self.figures.push(Figure::new(&what, Unit::Mebibytes, garenne, None));
            }
        }
    }

    /// Processor time so far: of this process, workers, collector, broker, and the whole machine.
    fn effort(&self) -> [Option<f64>; 5] {
        let of = |name: &str| cpu_seconds(self.cluster.process_id(name)?);
        let workers = ["Worker 1", "Worker 2"].into_iter().filter_map(of).reduce(|a, b| a + b);
        let broker = broker_pid().and_then(cpu_seconds);
        let this = cpu_seconds(std::process::id());
        [this, workers, of("Collector"), broker, machine_seconds()]
    }
}

/// Sums over the runs of one scenario.
#[derive(Default)]
struct Meter {
    runs: f64,
    elapsed: f64,
    spent: [Option<f64>; 5],
}

impl Meter {
    fn add(&mut self, before: &[Option<f64>; 5], after: &[Option<f64>; 5], took: Duration) {
        self.runs += 1.0;
        self.elapsed += took.as_secs_f64();
        for ((sum, before), after) in self.spent.iter_mut().zip(before).zip(after) {
            let spent = before.zip(*after).map(|(before, after)| after - before);
            *sum = spent.map(|spent| sum.unwrap_or(0.0) + spent);
        }
    }

    fn average(self, what: String) -> Effort {
        let spent = self.spent.map(|sum| sum.map(|sum| sum / self.runs));
        let [producer, workers, collector, broker, machine] = spent;
        let ours = [producer, workers, collector, broker].into_iter().flatten().sum::<f64>();
        // Ticks of a hundredth of a second may sum up to a little less than nothing.
        let others = machine.map(|machine| (machine - ours).max(0.0));
        let elapsed = self.elapsed / self.runs;
        Effort { what, elapsed, producer, workers, collector, broker, others }
    }
}

async fn all_confirmed(
    submitted: impl Stream<Item = Result<TaskId, SubmitError>>,
) -> Result<(), SubmitError> {
    let mut submitted = std::pin::pin!(submitted);
    while let Some(id) = submitted.next().await {
        id?;
    }
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "counts of tasks are far below 2^52")]
fn rate(count: u64, took: Duration) -> f64 {
    count as f64 / took.as_secs_f64()
}

/// All times but those of the warm-up, in microseconds, three digits exact.
fn histogram(times: &[Duration]) -> Result<Histogram<u64>, CliError> {
    let odd = |error: &dyn std::fmt::Display| {
        CliError::unusable(format!("a time cannot be counted: {error}"))
    };
    let mut histogram = Histogram::new(3).map_err(|error| odd(&error))?;
    let warm_up = usize::try_from(ROUND_TRIPS_BEFORE).unwrap_or(usize::MAX);
    for time in times.iter().skip(warm_up) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        histogram.record(micros).map_err(|error| odd(&error))?;
    }
    Ok(histogram)
}

#[expect(clippy::cast_precision_loss, reason = "a round trip is far below 2^52 microseconds")]
fn micros_to_millis(micros: u64) -> f64 {
    micros as f64 / 1e3
}
