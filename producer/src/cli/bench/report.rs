//! The figures of a run, and how they look: tables for people, Markdown, JSON.

use indicatif::HumanCount;
use serde::Serialize;

use super::usage::Machine;
use crate::cli::output::{Paint, cell, table};

/// What a debug build has to say of itself.
pub(super) const DEBUG_WARNING: &str =
    "THIS IS A DEBUG BUILD: its figures say nothing. Build with --release.";

/// All that one run measured.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) machine: Machine,
    pub(super) settings: Settings,
    pub(super) figures: Vec<Figure>,
    pub(super) processor_time: Vec<Effort>,
}

/// What was asked for.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Settings {
    pub(super) tasks: u64,
    pub(super) repeats: u32,
    pub(super) worker_slots: usize,
    pub(super) worker_lookahead: usize,
    pub(super) publish_window: usize,
    pub(super) raw_publish_window: usize,
    pub(super) raw_prefetch: u16,
    pub(super) raw_ack_every: u64,
    pub(super) raw_body_bytes: usize,
}

/// One measured quantity, with the bare client's where it has one.
#[derive(Debug, Serialize)]
pub(super) struct Figure {
    pub(super) what: String,
    pub(super) unit: Unit,
    pub(super) garenne: Option<Samples>,
    pub(super) raw: Option<Samples>,
    /// Ours over the bare client's, run by run: neighbours in time share the machine's moods, so the
    /// median of their ratios is steadier than the ratio of two medians.
    pub(super) ratio: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Unit {
    PerSecond,
    Milliseconds,
    Mebibytes,
}

/// The values of all runs.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Samples {
    pub(super) median: f64,
    pub(super) lowest: f64,
    pub(super) highest: f64,
    pub(super) all: Vec<f64>,
}

/// Processor time of one run, in seconds, averaged over the runs.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Effort {
    pub(super) what: String,
    pub(super) elapsed: f64,
    /// This process: the producer, or both ends of the bare client.
    pub(super) producer: Option<f64>,
    pub(super) workers: Option<f64>,
    pub(super) collector: Option<f64>,
    pub(super) broker: Option<f64>,
    /// Everything else on the machine, which a fair measurement has little of. Holds the broker where
    /// that is not known.
    pub(super) others: Option<f64>,
}

impl Samples {
    /// `None` without a value.
    pub(super) fn of(mut all: Vec<f64>) -> Option<Self> {
        let in_order = all.clone();
        all.sort_by(f64::total_cmp);
        let (lowest, highest) = (*all.first()?, *all.last()?);
        let middle = all.len() / 2;
        let median = if all.len().is_multiple_of(2) {
            f64::midpoint(all[middle - 1], all[middle])
        } else {
            all[middle]
        };
        Some(Self { median, lowest, highest, all: in_order })
    }
}

impl Figure {
    pub(super) fn new(
        what: &str,
        unit: Unit,
        garenne: Option<Samples>,
        raw: Option<Samples>,
    ) -> Self {
        let ratio = garenne.as_ref().zip(raw.as_ref()).and_then(|(ours, raw)| {
            let ratios = ours.all.iter().zip(&raw.all).map(|(ours, raw)| ours / raw);
            Samples::of(ratios.collect())
        });
        let ratio = ratio.map(|ratios| ratios.median);
        Self { what: what.to_owned(), unit, garenne, raw, ratio }
    }
}

impl Unit {
    fn show(self, value: f64) -> String {
        match self {
            Self::PerSecond => format!("{}/s", rounded(value)),
            Self::Milliseconds if value < 10.0 => format!("{value:.2} ms"),
            Self::Milliseconds => format!("{value:.0} ms"),
            Self::Mebibytes => format!("{value:.1} MiB"),
        }
    }

    fn bare(self, value: f64) -> String {
        match self {
            Self::PerSecond => rounded(value),
            Self::Milliseconds if value < 10.0 => format!("{value:.2}"),
            Self::Milliseconds => format!("{value:.0}"),
            Self::Mebibytes => format!("{value:.1}"),
        }
    }
}

/// Three digits: a fourth would claim more than a run can know.
fn rounded(value: f64) -> String {
    let mut step = 1.0;
    while value / step >= 1_000.0 {
        step *= 10.0;
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "rates are positive and far below 2^64"
    )]
    let value = ((value / step).round() * step) as u64;
    HumanCount(value).to_string()
}

const FIGURES: [&str; 5] = ["SCENARIO", "GARENNE", "SPREAD", "RAW LAPIN", "RATIO"];
const EFFORTS: [&str; 7] =
    ["CPU SECONDS", "ELAPSED", "CLIENT", "WORKERS", "COLLECTOR", "BROKER", "OTHERS"];

impl Report {
    /// Tables that fit 80 columns.
    pub(super) fn as_text(&self, paint: Paint) -> String {
        let warning = self.machine.is_debug_build().then(|| paint.red(DEBUG_WARNING));
        let mut parts: Vec<_> = warning.into_iter().collect();
        parts.push(self.facts().join("\n"));
        parts.push(grid(FIGURES, self.figure_rows(), paint));
        if !self.processor_time.is_empty() {
            parts.push(grid(EFFORTS, self.effort_rows(), paint));
        }
        parts.push(NOTES.join("\n"));
        parts.join("\n\n")
    }

    /// The same for a document.
    pub(super) fn as_markdown(&self) -> String {
        let mut parts = vec!["# garenne bench".to_owned()];
        parts.extend(self.machine.is_debug_build().then(|| format!("**{DEBUG_WARNING}**")));
        parts.push(
            self.facts().iter().map(|fact| format!("* {fact}")).collect::<Vec<_>>().join("\n"),
        );
        parts.push(markdown(FIGURES, self.figure_rows()));
        if !self.processor_time.is_empty() {
            parts.push(markdown(EFFORTS, self.effort_rows()));
        }
        parts.push(NOTES.join("\n"));
        parts.join("\n\n") + "\n"
    }

    fn facts(&self) -> Vec<String> {
        let (machine, settings) = (&self.machine, &self.settings);
        let unknown = || "unknown".to_owned();
        let text = |text: &Option<String>| text.clone().unwrap_or_else(unknown);
        let gibibytes =
            machine.memory_mebibytes.map_or_else(unknown, |m| format!("{:.0} GiB", m / 1024.0));
        let load = machine.load_before.map_or_else(unknown, |load| format!("{load:.2}"));
        vec![
            format!(
                "{}, Garenne {} ({} build), RabbitMQ {}",
                machine.date,
                machine.garenne,
                machine.profile,
                text(&machine.rabbitmq)
            ),
            format!("{} cores ({}), {gibibytes}", machine.cores, text(&machine.processor)),
            format!(
                "{}, Linux {}; load before: {load}",
                text(&machine.system),
                text(&machine.kernel)
            ),
            format!(
                "{} tasks a run, {} runs; a worker has {} slots and fetches {} ahead",
                HumanCount(settings.tasks),
                settings.repeats,
                settings.worker_slots,
                settings.worker_lookahead
            ),
            format!(
                "windows of unconfirmed publishes: {} (Garenne), {} (raw)",
                settings.publish_window, settings.raw_publish_window
            ),
        ]
    }

    fn figure_rows(&self) -> Vec<[String; 5]> {
        let shown = |samples: &Option<Samples>, unit: Unit| {
            samples.as_ref().map_or_else(dash, |samples| unit.show(samples.median))
        };
        let row = |figure: &Figure| {
            let unit = figure.unit;
            let spread = figure.garenne.as_ref().filter(|ours| ours.all.len() > 1);
            let spread = spread.map_or_else(dash, |ours| {
                format!("{} to {}", unit.bare(ours.lowest), unit.bare(ours.highest))
            });
            let ratio = figure.ratio.map_or_else(dash, |ratio| format!("{ratio:.2}"));
            [
                figure.what.clone(),
                shown(&figure.garenne, unit),
                spread,
                shown(&figure.raw, unit),
                ratio,
            ]
        };
        self.figures.iter().map(row).collect()
    }

    fn effort_rows(&self) -> Vec<[String; 7]> {
        let seconds = |value: Option<f64>| value.map_or_else(dash, |value| format!("{value:.1}"));
        let row = |effort: &Effort| {
            let Effort { what, elapsed, producer, workers, collector, broker, others } = effort;
            let parts = [*producer, *workers, *collector, *broker, *others].map(seconds);
            let [client, workers, collector, broker, others] = parts;
            let elapsed = seconds(Some(*elapsed));
            [what.clone(), elapsed, client, workers, collector, broker, others]
        };
        self.processor_time.iter().map(row).collect()
    }
}

const NOTES: [&str; 5] = [
    "RATIO: Garenne over raw, run by run; above 1: rates are better, times worse.",
    "Raw lapin: a message a task and one a result, confirmed, through quorum queues;",
    "it decodes, stores and reports nothing. CLIENT of a raw run is all of its ends.",
    "As shipped: with the default slots and look-ahead, over a fifth of the tasks.",
    "OTHERS: what else the machine did; the less, the more a figure is worth.",
];

fn dash() -> String {
    "-".to_owned()
}

fn grid<const N: usize>(header: [&str; N], rows: Vec<[String; N]>, paint: Paint) -> String {
    let mut grid = table(header, paint);
    for row in rows {
        grid.add_row(row.map(|text| cell(text, None, paint)));
    }
    grid.trim_fmt()
}

fn markdown<const N: usize>(header: [&str; N], rows: Vec<[String; N]>) -> String {
    let line = |cells: &[String]| format!("| {} |", cells.join(" | "));
    let head = [line(&header.map(str::to_lowercase)), line(&header.map(|_| "---".to_owned()))];
    let rows = rows.into_iter().map(|row| line(&row));
    head.into_iter().chain(rows).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_lies_between() {
        assert_eq!(Samples::of(vec![3.0, 1.0, 2.0]).unwrap().median.to_string(), "2");
        assert_eq!(Samples::of(vec![4.0, 1.0, 2.0, 3.0]).unwrap().median.to_string(), "2.5");
        assert!(Samples::of(vec![]).is_none());
    }

    #[test]
    fn figures_have_three_digits() {
        assert_eq!(Unit::PerSecond.show(12_345.6), "12,300/s");
        assert_eq!(Unit::PerSecond.show(999.4), "999/s");
        assert_eq!(Unit::Milliseconds.show(1.234), "1.23 ms");
    }

    #[test]
    fn the_tables_fit_80_columns() {
        let sample = |value| Samples::of(vec![value, value * 1.04, value * 0.96]);
        let report = Report {
            machine: Machine::describe(),
            settings: Settings {
                tasks: 100_000,
                repeats: 3,
                worker_slots: 64,
                worker_lookahead: 436,
                publish_window: 512,
                raw_publish_window: 1_000,
                raw_prefetch: 500,
                raw_ack_every: 50,
                raw_body_bytes: 100,
            },
            figures: vec![Figure::new(
                "tasks, 1 worker as shipped",
                Unit::PerSecond,
                sample(123_456.0),
                sample(123_456.0),
            )],
            processor_time: vec![Effort {
                what: "tasks, 1 worker as shipped".to_owned(),
                elapsed: 123.4,
                producer: Some(12.3),
                workers: None,
                collector: Some(1.0),
                broker: Some(99.9),
                others: Some(0.1),
            }],
        };
        let text = report.as_text(Paint::plain());
        assert!(text.starts_with(DEBUG_WARNING), "{text}");
        assert!(text.lines().skip(3).all(|line| line.chars().count() <= 80), "{text}");
        assert!(report.as_markdown().contains("| scenario |"));
    }
}
