//! Charts of bars: ours above its reference with a mark where the target lies; and shares of a whole.

use super::canvas::{Anchor, Canvas};
use super::{WIDTH, panel};
use crate::bench::figure::Figure;
use crate::bench::meter::Effort;

const BAR: f64 = 9.0;
/// From the end of a row to the first line of the next.
const ROW_GAP: f64 = 22.0;

/// Which bars share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scale {
    /// All of them.
    Common,
    /// Each has its own, because their units differ; the target is at the same place for all.
    Own,
}

/// One row a figure.
pub(super) fn figures(title: &str, note: &str, figures: &[&Figure], scale: Scale) -> Canvas {
    let (mut canvas, mut y) = panel(title, note);
    let mut legend = vec![("f0", "Garenne")];
    if figures.iter().any(|figure| figure.reference.is_some()) {
        legend.push(("f2", "reference"));
    }
    canvas.legend(y, &legend);
    if figures.iter().any(|figure| figure.target.is_some()) {
        canvas.line((WIDTH - 50.0, y - 10.0), (WIDTH - 50.0, y + 2.0), "mark");
        canvas.text(WIDTH, y, "soft", Anchor::End, "target");
    }
    y += 26.0;
    let common = figures.iter().map(|figure| reach(figure)).fold(0.0, f64::max);
    for figure in figures {
        let most = match scale {
            Scale::Common => common,
            Scale::Own => reach(figure),
        };
        y = row(&mut canvas, y, figure, most);
    }
    canvas.height = y - ROW_GAP;
    canvas
}

/// The largest value that a row shows.
fn reach(figure: &Figure) -> f64 {
    let ours = figure.garenne.as_ref().map(|samples| samples.median);
    let other = figure.reference.as_ref().map(|reference| reference.samples.median);
    [ours, other, figure.mark()].into_iter().flatten().fold(0.0, f64::max) * 1.02
}

/// Draws a row, and says where the next one begins.
fn row(canvas: &mut Canvas, top: f64, figure: &Figure, most: f64) -> f64 {
    canvas.text(0.0, top, "", Anchor::Start, &figure.title);
    canvas.text(WIDTH, top, "soft", Anchor::End, &values(figure));
    let long = |value: f64| (WIDTH * value / most.max(f64::MIN_POSITIVE)).clamp(1.0, WIDTH);
    let mut y = top + 7.0;
    let begin = y;
    if let Some(ours) = &figure.garenne {
        canvas.rect((0.0, y), (long(ours.median), BAR), "f0", 2.0);
        y += BAR + 2.0;
    }
    if let Some(reference) = &figure.reference {
        canvas.rect((0.0, y), (long(reference.samples.median), BAR), "f2", 2.0);
        y += BAR + 2.0;
    }
    if let Some(mark) = figure.mark() {
        canvas.line((long(mark), begin - 2.0), (long(mark), y), "mark");
    }
    y + ROW_GAP
}

/// `21,400/s beside 24,300/s · 0.88 x`.
fn values(figure: &Figure) -> String {
    let unit = figure.unit;
    let ours = figure.garenne.as_ref().map(|samples| unit.show(samples.median));
    let other = figure.reference.as_ref().map(|reference| unit.show(reference.samples.median));
    let both: Vec<_> = ours.into_iter().chain(other).collect();
    let ratio = figure.ratio.map(|ratio| format!(" \u{b7} {ratio:.2} x")).unwrap_or_default();
    both.join(" beside ") + &ratio
}

/// Who used the cores: one bar an effort, as long as all cores for all of the time.
pub(super) fn shares(title: &str, note: &str, efforts: &[&Effort], cores: f64) -> Canvas {
    const CLASSES: [&str; 5] = ["f0", "f1", "f4", "f3", "f2"];
    let names = ["client", "workers", "collector", "broker", "others"];
    let (mut canvas, mut y) = panel(title, note);
    let legend: Vec<_> = CLASSES.into_iter().zip(names).collect();
    canvas.legend(y, &legend);
    y += 26.0;
    for effort in efforts {
        let title =
            if effort.raw { format!("{}: raw lapin", effort.title) } else { effort.title.clone() };
        canvas.text(0.0, y, "", Anchor::Start, &title);
        canvas.text(WIDTH, y, "soft", Anchor::End, &format!("{:.1} s a run", effort.elapsed));
        y += 7.0;
        canvas.rect((0.0, y), (WIDTH, BAR + 3.0), "track", 2.0);
        let mut x = 0.0;
        for (class, spent) in CLASSES.into_iter().zip(effort.spent.parts()) {
            let share = spent.unwrap_or(0.0) / (effort.elapsed * cores).max(f64::MIN_POSITIVE);
            // Clocks of two kinds: the shares may sum up to a little more than all.
            let long = (WIDTH * share).min(WIDTH - x);
            if long > 0.5 {
                canvas.rect((x, y), (long, BAR + 3.0), class, 0.0);
                x += long;
            }
        }
        y += BAR + 3.0 + ROW_GAP;
    }
    canvas.height = y - ROW_GAP;
    canvas
}
