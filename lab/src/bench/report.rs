//! What a run of the command found, and how it looks: tables for people, Markdown, JSON. The picture is
//! in [`chart`](super::chart).

use garenne_cli::output::{Paint, cell, rendered, table};
use indicatif::HumanCount;
use serde::Serialize;

use super::figure::{Figure, FigureUnit, Samples};
use super::meter::Effort;
use super::usage::Machine;

/// What a debug build has to say of itself.
pub(super) const DEBUG_WARNING: &str =
    "THIS IS A DEBUG BUILD: its figures say nothing. Build with --release.";
/// What a quick run has to say of itself.
const QUICK_WARNING: &str = "A QUICK RUN: everything once and briefly. Its figures say little.";

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
    pub(super) quick: bool,
    /// About how long a run lasts.
    pub(super) seconds: f64,
    /// How many tasks a run has, if that was asked for instead.
    pub(super) tasks: Option<u64>,
    pub(super) repeats: u32,
    pub(super) worker_concurrency: usize,
    pub(super) worker_prefetch: usize,
    pub(super) publish_window: usize,
    pub(super) raw_publish_window: usize,
    pub(super) raw_prefetch: u16,
    pub(super) raw_ack_every: u64,
    pub(super) raw_body_bytes: usize,
}

const FIGURES: [&str; 5] = ["SCENARIO", "GARENNE", "SPREAD", "REFERENCE", "RATIO"];
const TARGETS: [&str; 4] = ["TARGET", "MEASURED", "WANTED", "VERDICT"];
const EFFORTS: [&str; 7] =
    ["SHARE OF CORES", "SECONDS", "CLIENT", "WORKERS", "COLLECTOR", "BROKER", "OTHERS"];
const COSTS: [&str; 7] =
    ["\u{b5}s of CPU a task", "tasks", "client", "workers", "collector", "broker", "others"];

impl Report {
    /// Tables that fit 80 columns.
    pub(super) fn as_text(&self, paint: Paint) -> String {
        let mut parts: Vec<_> = self.warnings().iter().map(|text| paint.red(text)).collect();
        parts.push(self.facts().join("\n"));
        parts.push(grid(FIGURES, self.figure_rows(), paint));
        if !self.target_rows().is_empty() {
            parts.push(grid(TARGETS, self.target_rows(), paint));
        }
        if self.main_efforts().next().is_some() {
            parts.push(grid(EFFORTS, self.effort_rows(), paint));
        }
        parts.push(NOTES.join("\n"));
        parts.join("\n\n")
    }

    /// The same for a document, and more digits of the processor time.
    pub(super) fn as_markdown(&self) -> String {
        let mut parts = vec!["# garenne bench".to_owned()];
        parts.extend(self.warnings().iter().map(|text| format!("**{text}**")));
        parts.push("![The figures as charts](report.svg)".to_owned());
        let facts = self.facts();
        parts.push(facts.iter().map(|fact| format!("* {fact}")).collect::<Vec<_>>().join("\n"));
        parts.push(markdown(FIGURES, self.figure_rows()));
        if !self.target_rows().is_empty() {
            parts.push(markdown(TARGETS, self.target_rows()));
        }
        if self.main_efforts().next().is_some() {
            parts.push(markdown(EFFORTS, self.effort_rows()));
            parts.push(markdown(COSTS, self.cost_rows()));
        }
        parts.push(NOTES.join("\n"));
        parts.join("\n\n") + "\n"
    }

    /// Why the figures are worth less than they look.
    pub(super) fn warnings(&self) -> Vec<&'static str> {
        let debug = self.machine.is_debug_build().then_some(DEBUG_WARNING);
        let quick = self.settings.quick.then_some(QUICK_WARNING);
        debug.into_iter().chain(quick).collect()
    }

    /// Where, when and how it was measured.
    pub(super) fn facts(&self) -> Vec<String> {
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
                "{}, {} runs; workers run {} tasks at a time and prefetch {}",
                self.length(),
                settings.repeats,
                settings.worker_concurrency,
                settings.worker_prefetch
            ),
            format!(
                "windows of unconfirmed publishes: {} (Garenne), {} (raw)",
                settings.publish_window, settings.raw_publish_window
            ),
        ]
    }

    fn length(&self) -> String {
        match self.settings.tasks {
            Some(tasks) => format!("{} tasks a run", HumanCount(tasks)),
            None => format!("a run lasts about {} s", self.settings.seconds),
        }
    }

    fn figure_rows(&self) -> Vec<[String; 5]> {
        let shown = |samples: Option<&Samples>, unit: FigureUnit| {
            samples.map_or_else(dash, |s| unit.show(s.median))
        };
        let row = |figure: &Figure| {
            let unit = figure.unit;
            let spread = figure.garenne.as_ref().filter(|ours| ours.all.len() > 1);
            let spread = spread.map_or_else(dash, |ours| {
                format!("{} to {}", unit.bare(ours.lowest), unit.bare(ours.highest))
            });
            let ratio = figure.ratio.map_or_else(dash, |ratio| format!("{ratio:.2}"));
            let reference = figure.reference.as_ref().map(|reference| &reference.samples);
            let ours = shown(figure.garenne.as_ref(), unit);
            [figure.title.clone(), ours, spread, shown(reference, unit), ratio]
        };
        self.figures.iter().map(row).collect()
    }

    fn target_rows(&self) -> Vec<[String; 4]> {
        let row = |figure: &Figure| {
            let [measured, wanted] = figure.judgement()?;
            let verdict = figure.verdict.map_or_else(dash, |verdict| verdict.word().to_owned());
            Some([figure.title.clone(), measured, wanted, verdict])
        };
        self.figures.iter().filter_map(row).collect()
    }

    fn effort_rows(&self) -> Vec<[String; 7]> {
        #[expect(clippy::cast_precision_loss, reason = "a machine has few cores")]
        let cores = self.machine.cores as f64;
        let row = |effort: &Effort| {
            let share = |seconds: f64| format!("{:.0} %", 100.0 * seconds / effort.elapsed / cores);
            effort_row(effort, format!("{:.1}", effort.elapsed), share)
        };
        self.main_efforts().map(row).collect()
    }

    fn cost_rows(&self) -> Vec<[String; 7]> {
        let row = |effort: &Effort| {
            let micros = |seconds: f64| format!("{:.1}", 1e6 * seconds / effort.tasks);
            effort_row(effort, format!("{:.0}", effort.tasks), micros)
        };
        self.main_efforts().map(row).collect()
    }

    /// Those of figures that are no point on a line: every size that was tried would be too much.
    pub(super) fn main_efforts(&self) -> impl Iterator<Item = &Effort> {
        let point = |id: &str| self.figures.iter().any(|f| f.id == id && f.point.is_some());
        self.processor_time.iter().filter(move |effort| !point(&effort.id))
    }
}

/// A row of what each part spent.
fn effort_row(effort: &Effort, second: String, show: impl Fn(f64) -> String) -> [String; 7] {
    let title = if effort.raw { "  the same, raw".to_owned() } else { effort.title.clone() };
    let [client, workers, collector, broker, others] =
        effort.spent.parts().map(|part| part.map_or_else(dash, &show));
    [title, second, client, workers, collector, broker, others]
}

const NOTES: [&str; 6] = [
    "REFERENCE: lapin alone: a message a task and one a result, confirmed, through",
    "quorum queues; it decodes, stores and reports nothing. In `backlog` the empty",
    "queue, in `queues` one queue, in `spin` what the cores can do.",
    "RATIO: Garenne over reference, run by run; above 1: rates better, times worse.",
    "CLIENT of a raw run is all of its ends. OTHERS: what else the machine did; the",
    "less, the more a figure is worth.",
];

fn dash() -> String {
    "-".to_owned()
}

fn grid<const N: usize>(header: [&str; N], rows: Vec<[String; N]>, paint: Paint) -> String {
    let mut grid = table(header, paint);
    for row in rows {
        grid.add_row(row.map(|text| cell(text, None, paint)));
    }
    rendered(&grid)
}

fn markdown<const N: usize>(header: [&str; N], rows: Vec<[String; N]>) -> String {
    let line = |cells: &[String]| format!("| {} |", cells.join(" | "));
    let head = [line(&header.map(str::to_lowercase)), line(&header.map(|_| "---".to_owned()))];
    let rows = rows.into_iter().map(|row| line(&row));
    head.into_iter().chain(rows).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::bench::Scenario;
    use crate::bench::figure::{RAW, Target};
    use crate::bench::meter::Spent;

    /// A report with the longest texts that occur, and some that would break a picture.
    pub(in super::super) fn sample() -> Report {
        let samples = |value: f64| Samples::of(vec![value, value * 1.04, value * 0.96]);
        let figure = |scenario, title: &str, unit, ours, reference, target| {
            Figure::new(scenario, title.replace(' ', "."), title, unit, samples(ours))
                .wanting(target)
                .beside(RAW, samples(reference))
        };
        let rates = |scenario, title: &str| {
            let target = Some(Target::times(1.6));
            figure(scenario, title, FigureUnit::PerSecond, 123_456.0, 87_654.0, target)
        };
        let mut figures = vec![
            rates(Scenario::Singles, "singles, worker as shipped"),
            rates(Scenario::Replies, "bulk to producer, no store"),
            figure(Scenario::Latency, "a <b> & \"c\"", FigureUnit::Milliseconds, 1.5, 1.2, None),
        ];
        let memory = Figure::new(
            Scenario::Memory,
            "memory",
            "worker, 10,000 in flight",
            FigureUnit::Mebibytes,
            samples(17.0),
        );
        figures.push(memory.wanting(Some(Target::at_most(20.0))));
        for (number, at) in [0_u64, 100_000, 1_000_000].into_iter().enumerate() {
            let title = format!("singles apart before {at}");
            for line in ["apart", "singles", "bulk"] {
                figures.push(rates(Scenario::Backlog, &title).at(line, at));
            }
            let workers = 1 << number;
            figures.push(rates(Scenario::Workers, "workers").at("singles", workers));
        }
        let spent = Spent { client: Some(12.3), broker: Some(99.9), ..Spent::default() };
        let effort = |raw| Effort {
            id: "singles".to_owned(),
            title: "singles, worker as shipped".to_owned(),
            raw,
            tasks: 1_234_567.0,
            elapsed: 123.4,
            spent,
        };
        Report {
            machine: Machine::describe(),
            settings: Settings {
                quick: false,
                seconds: 3.0,
                tasks: None,
                repeats: 3,
                worker_concurrency: 64,
                worker_prefetch: 1000,
                publish_window: 512,
                raw_publish_window: 1_000,
                raw_prefetch: 500,
                raw_ack_every: 50,
                raw_body_bytes: 100,
            },
            figures,
            processor_time: vec![effort(false), effort(true)],
        }
    }

    #[test]
    fn the_tables_fit_80_columns() {
        let text = sample().as_text(Paint::plain());
        assert_eq!(text.starts_with(DEBUG_WARNING), cfg!(debug_assertions), "{text}");
        assert!(text.lines().skip(3).all(|line| line.chars().count() <= 80), "{text}");
    }

    #[test]
    fn the_document_has_all_tables() {
        let text = sample().as_markdown();
        for table in ["| scenario |", "| target |", "| share of cores |", "s of cpu a task |"] {
            assert!(text.contains(table), "{table}: {text}");
        }
    }
}
