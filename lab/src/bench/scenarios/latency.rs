//! How long one task takes on an idle system, and how long a worker takes to start.

use std::time::{Duration, Instant};

use garenne_cli::error::CliError;
use hdrhistogram::Histogram;
use tokio::time::sleep;

use crate::bench::Scenario;
use crate::bench::figure::{Figure, FigureUnit, RAW, Samples, Target};
use crate::bench::load::{echo, round_trip};
use crate::bench::stage::Bench;

/// Between two round trips on an idle system: what the one before leaves to do is done by then (its
/// acknowledgements, the collector's commits), and does not share disk and cores with the next one.
const PAUSE: Duration = Duration::from_millis(10);

/// How a run of the bare client or of ours went.
#[derive(Default)]
struct Quantiles {
    p50: Vec<f64>,
    p99: Vec<f64>,
}

impl Bench<'_> {
    /// One task at a time; the quantiles of each run, and their medians over the runs. First with
    /// pauses, then one right after the other.
    pub(in super::super) async fn latency(&mut self) -> Result<(), CliError> {
        self.workers(self.tuned(1)).await?;
        let (ours, raw) = self.round_trips("idle round trips", PAUSE).await?;
        self.report_latency(ours, raw);
        let (ours, raw) = self.round_trips("round trips in a row", Duration::ZERO).await?;
        let [ours, raw] = [ours.p50, raw.p50].map(Samples::of);
        let title = "round trips in a row, p50";
        let figure =
            Figure::new(Scenario::Latency, "latency.row", title, FigureUnit::Milliseconds, ours);
        self.figures.push(figure.beside(RAW, raw));
        Ok(())
    }

    async fn round_trips(
        &self,
        what: &str,
        pause: Duration,
    ) -> Result<(Quantiles, Quantiles), CliError> {
        let (mut ours, mut raw) = (Quantiles::default(), Quantiles::default());
        let (before, counted) = (self.extent.round_trips_before, self.extent.round_trips);
        let warm_up = usize::try_from(before).unwrap_or(usize::MAX);
        for run in 1..=self.extent.repeats {
            self.remark(what, run);
            let times = self.raw.round_trips(before + counted, pause).await?;
            raw.add(times.iter().skip(warm_up))?;
            let mut times = vec![];
            for number in 0..before + counted {
                times.push(round_trip(&self.producer, number).await?);
                if !pause.is_zero() {
                    sleep(pause).await;
                }
            }
            ours.add(times.iter().skip(warm_up))?;
        }
        Ok((ours, raw))
    }

    fn report_latency(&mut self, ours: Quantiles, raw: Quantiles) {
        let [p50, p99, raw_p50, raw_p99] = [ours.p50, ours.p99, raw.p50, raw.p99].map(Samples::of);
        let figure = |id: &str, title: &str, ours: &Option<Samples>| {
            Figure::new(Scenario::Latency, id, title, FigureUnit::Milliseconds, ours.clone())
        };
        self.figures.extend([
            figure("latency.p50", "idle round trip, p50", &p50)
                .wanting(Some(Target::at_most_times(1.3)))
                .beside(RAW, raw_p50),
            figure("latency.p99", "idle round trip, p99", &p99).beside(RAW, raw_p99),
            figure("latency.tail", "p99 beside own p50", &p99)
                .wanting(Some(Target::at_most_times(3.0)))
                .beside("own p50", p50),
        ]);
    }

    /// From the start of a worker process to the output of a task that waits for it.
    pub(in super::super) async fn start_up(&mut self) -> Result<(), CliError> {
        let mut times = vec![];
        for run in 1..=self.extent.repeats {
            self.remark("worker starts", run);
            for _ in 0..self.extent.starts {
                self.no_workers().await?;
                let waiting = self.producer.submit(echo(1)).await?;
                let begin = Instant::now();
                self.cluster.spawn_worker(&self.tuned(1).spec(1))?;
                waiting.output().await?;
                times.push(begin.elapsed().as_secs_f64() * 1e3);
            }
        }
        let title = "worker start to first result";
        let figure = Figure::new(
            Scenario::Start,
            "start",
            title,
            FigureUnit::Milliseconds,
            Samples::of(times),
        );
        self.figures.push(figure.wanting(Some(Target::at_most(100.0))));
        Ok(())
    }
}

impl Quantiles {
    fn add<'t>(&mut self, times: impl Iterator<Item = &'t Duration>) -> Result<(), CliError> {
        let histogram = histogram(times)?;
        self.p50.push(millis(histogram.value_at_quantile(0.5)));
        self.p99.push(millis(histogram.value_at_quantile(0.99)));
        Ok(())
    }
}

/// In microseconds, three digits exact.
fn histogram<'t>(times: impl Iterator<Item = &'t Duration>) -> Result<Histogram<u64>, CliError> {
    let odd = |error: &dyn std::fmt::Display| {
        CliError::unusable(format!("a time cannot be counted: {error}"))
    };
    let mut histogram = Histogram::new(3).map_err(|error| odd(&error))?;
    for time in times {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        histogram.record(micros).map_err(|error| odd(&error))?;
    }
    Ok(histogram)
}

#[expect(clippy::cast_precision_loss, reason = "a round trip is far below 2^52 microseconds")]
fn millis(micros: u64) -> f64 {
    micros as f64 / 1e3
}
