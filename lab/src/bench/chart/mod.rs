//! The report as one picture: a self-contained SVG page. Pure: a report in, text out.
//!
//! No plotting library: bars, lines and words are all there is, and what is drawn by hand can be read
//! in an editor, on a light and on a dark surface.

mod bars;
mod canvas;
mod lines;

use indicatif::HumanCount;

use super::Scenario;
use super::figure::{Figure, TargetVerdict};
use super::report::Report;
use super::scenarios::size;
use bars::Scale;
use canvas::{Anchor, Canvas};

/// Inner width of a panel.
const WIDTH: f64 = 516.0;
const PADDING: f64 = 20.0;
const GAP: f64 = 24.0;
const COLUMN: f64 = WIDTH + 2.0 * PADDING;
const PAGE: f64 = 2.0 * COLUMN + 3.0 * GAP;

/// The whole page.
pub(super) fn page(report: &Report) -> String {
    let mut page = Canvas::default();
    let head = head(report);
    let mut bottoms = [head.height, head.height];
    let mut placed = vec![];
    for panel in panels(report) {
        // Into the column that is shorter so far.
        let column = usize::from(bottoms[1] < bottoms[0]);
        placed.push((column, bottoms[column], panel));
        let (_, _, panel) = &placed[placed.len() - 1];
        bottoms[column] += panel.height + 2.0 * PADDING + GAP;
    }
    page.height = bottoms[0].max(bottoms[1]);
    page.rect((0.0, 0.0), (PAGE, page.height), "page", 0.0);
    page.place(GAP, 0.0, &head);
    for (column, y, panel) in &placed {
        let x = if *column == 0 { GAP } else { COLUMN + 2.0 * GAP };
        page.rect((x, *y), (COLUMN, panel.height + 2.0 * PADDING), "card", 8.0);
        page.place(x + PADDING, y + PADDING, panel);
    }
    page.document(PAGE, "garenne bench")
}

/// Title, machine, warnings.
fn head(report: &Report) -> Canvas {
    let mut canvas = Canvas::default();
    canvas.text(0.0, 50.0, "h1", Anchor::Start, "garenne bench");
    let mut y = 78.0;
    for warning in report.warnings() {
        canvas.text(0.0, y, "warn", Anchor::Start, warning);
        y += 18.0;
    }
    for fact in report.facts() {
        canvas.text(0.0, y, "soft", Anchor::Start, &fact);
        y += 18.0;
    }
    canvas.height = y + 6.0;
    canvas
}

/// A drawing with a title and a remark, and the line on which a legend belongs.
fn panel(title: &str, note: &str) -> (Canvas, f64) {
    let mut canvas = Canvas::default();
    canvas.text(0.0, 12.0, "h2", Anchor::Start, title);
    canvas.text(0.0, 32.0, "soft", Anchor::Start, note);
    (canvas, 56.0)
}

/// All that have something to show.
fn panels(report: &Report) -> Vec<Canvas> {
    let of = |wanted: &[Scenario]| -> Vec<&Figure> {
        report.figures.iter().filter(|figure| wanted.contains(&figure.scenario)).collect()
    };
    let count = |at: u64| HumanCount(at).to_string();
    let bytes = |at: u64| size(usize::try_from(at).unwrap_or(usize::MAX));
    let raw = "tasks a second, beside lapin alone";
    let mut panels = vec![];
    panels.extend(targets(&report.figures));
    let bars = |title: &str, note: &str, wanted: &[Scenario], scale| {
        let figures = of(wanted);
        (!figures.is_empty()).then(|| bars::figures(title, note, &figures, scale))
    };
    let throughput = [Scenario::Singles, Scenario::Bulk, Scenario::Replies, Scenario::Sleep];
    panels.extend(bars("Tasks with results", raw, &throughput, Scale::Common));
    let note = "confirmed publishes a second, nobody takes them";
    panels.extend(bars("Submissions", note, &[Scenario::Submit], Scale::Common));
    let note = "tasks of 1 ms of processor time a second, beside what the cores can do";
    panels.extend(bars("Busy handlers", note, &[Scenario::Spin], Scale::Common));
    let note = "one task at a time, beside lapin alone or our own median";
    panels.extend(bars("Idle round trip", note, &[Scenario::Latency], Scale::Common));
    let limits = [Scenario::Start, Scenario::Memory];
    panels.extend(bars("Start and memory", "every bar on a scale of its own", &limits, Scale::Own));
    let lines = |title: &str, note: &str, wanted: Scenario, tick: &dyn Fn(u64) -> String| {
        let figures = of(&[wanted]);
        (!figures.is_empty()).then(|| lines::figures(title, note, &figures, tick))
    };
    panels.extend(lines("Size of arguments and of outputs", raw, Scenario::Payload, &bytes));
    let note = "tasks a second, with so many tasks waiting";
    panels.extend(lines("Backlog", note, Scenario::Backlog, &count));
    panels.extend(lines("Worker processes", raw, Scenario::Workers, &count));
    let note = "tasks a second, beside lapin alone with one producer";
    panels.extend(lines("Producers", note, Scenario::Producers, &count));
    let note = "tasks a second, a worker for each queue";
    panels.extend(lines("Queues", note, Scenario::Queues, &count));
    panels.extend(processor_time(report));
    panels
}

/// What was wanted, and whether it is so.
fn targets(figures: &[Figure]) -> Option<Canvas> {
    let wanting: Vec<_> = figures.iter().filter(|figure| figure.target.is_some()).collect();
    let met = wanting.iter().filter(|figure| figure.verdict == Some(TargetVerdict::Met)).count();
    let title = format!("Targets: {met} of {} met", wanting.len());
    let (mut canvas, mut y) = panel(&title, "medians of this run");
    for figure in &wanting {
        let [measured, wanted] = figure.judgement()?;
        let (class, word) = figure.verdict.map_or(("soft", "-"), |v| (v.word(), v.word()));
        canvas.text(0.0, y, "", Anchor::Start, &figure.title);
        canvas.text(290.0, y, "", Anchor::End, &measured);
        canvas.text(440.0, y, "soft", Anchor::End, &wanted);
        canvas.text(WIDTH, y, class, Anchor::End, word);
        canvas.line((0.0, y + 8.0), (WIDTH, y + 8.0), "grid");
        y += 26.0;
    }
    canvas.height = y - 14.0;
    (!wanting.is_empty()).then_some(canvas)
}

/// The bare client's once, beside the first of ours.
fn processor_time(report: &Report) -> Option<Canvas> {
    let first_raw = report.main_efforts().find(|effort| effort.raw).map(|effort| &effort.id);
    let shown = report.main_efforts().filter(|e| !e.raw || Some(&e.id) == first_raw);
    let shown: Vec<_> = shown.collect();
    #[expect(clippy::cast_precision_loss, reason = "a machine has few cores")]
    let cores = report.machine.cores as f64;
    let note = format!("processor time; a full bar is all {cores} cores for all of the run");
    let title = "Who used the cores";
    (!shown.is_empty()).then(|| bars::shares(title, &note, &shown, cores))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::tests::sample;

    #[test]
    fn the_page_shows_all_panels_and_is_sound() {
        let page = page(&sample());
        for title in ["Targets: ", "Tasks with results", "Backlog", "Who used the cores"] {
            assert!(page.contains(title), "{title}: {page}");
        }
        assert!(page.contains("a &lt;b&gt; &amp; &quot;c&quot;") && !page.contains("<b>"));
        assert!(!page.contains("NaN") && !page.contains("inf"), "{page}");
        assert_eq!(page.matches("<g ").count(), page.matches("</g>").count());
    }

    #[test]
    fn without_figures_there_is_a_page_still() {
        let mut report = sample();
        report.figures.clear();
        report.processor_time.clear();
        assert!(page(&report).contains("garenne bench"));
    }
}
