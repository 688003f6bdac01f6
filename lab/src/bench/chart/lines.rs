//! Charts of lines: figures over a size, with the bare client beside them.

use super::canvas::{Anchor, Canvas};
use super::{WIDTH, panel};
use crate::bench::figure::{Figure, FigureUnit, RAW};

const LEFT: f64 = 64.0;
const HEIGHT: f64 = 190.0;
/// Steps of the grid.
const STEPS: u32 = 4;

/// Values by their place on the line.
struct ChartLine {
    name: &'static str,
    values: Vec<(u64, f64)>,
}

/// A line for each name, evenly spaced: sizes grow by factors. `tick` says what a place is called.
pub(super) fn figures(
    title: &str,
    note: &str,
    figures: &[&Figure],
    tick: impl Fn(u64) -> String,
) -> Canvas {
    let lines = lines(figures);
    let mut places: Vec<_> = lines.iter().flat_map(|line| &line.values).map(|v| v.0).collect();
    places.sort_unstable();
    places.dedup();
    let values = lines.iter().flat_map(|line| &line.values);
    let most = round_up(values.map(|v| v.1).fold(0.0, f64::max));
    let unit = figures.first().map_or(FigureUnit::PerSecond, |figure| figure.unit);

    let (mut canvas, y) = panel(title, note);
    let classes = |line: &ChartLine| match line.name {
        RAW => ("f2", "l2"),
        "bulk" => ("f1", "l1"),
        "apart" => ("f3", "l3"),
        _ => ("f0", "l0"),
    };
    let legend: Vec<_> = lines.iter().map(|line| (classes(line).0, line.name)).collect();
    canvas.legend(y, &legend);
    let top = y + 20.0;
    grid(&mut canvas, top, most, unit);
    let (step, margin) = (spacing(places.len()), 28.0);
    let x_of = |place: u64| {
        let before = places.iter().filter(|other| **other < place).map(|_| step).sum::<f64>();
        LEFT + margin + before
    };
    for place in &places {
        let below = top + HEIGHT + 20.0;
        canvas.text(x_of(*place), below, "soft", Anchor::Middle, &tick(*place));
    }
    for line in lines.iter().rev() {
        let (fill, stroke) = classes(line);
        let at = |(place, value): &(u64, f64)| (x_of(*place), top + HEIGHT * (1.0 - value / most));
        canvas.path(&line.values.iter().map(at).collect::<Vec<_>>(), stroke);
        for value in &line.values {
            let tip = format!("{}, {}: {}", line.name, tick(value.0), unit.show(value.1));
            canvas.dot(at(value), fill, &tip);
        }
    }
    canvas.height = top + HEIGHT + 32.0;
    canvas
}

/// Ours by name, and the bare client's last: measured beside the first of ours.
fn lines(figures: &[&Figure]) -> Vec<ChartLine> {
    let mut lines: Vec<ChartLine> = vec![];
    let mut raw = ChartLine { name: RAW, values: vec![] };
    for figure in figures {
        let Some(point) = &figure.point else { continue };
        if let Some(ours) = &figure.garenne {
            let value = (point.at, ours.median);
            match lines.iter_mut().find(|line| line.name == point.line) {
                Some(line) => line.values.push(value),
                None => lines.push(ChartLine { name: point.line, values: vec![value] }),
            }
        }
        let known = raw.values.iter().any(|(at, _)| *at == point.at);
        if let Some(reference) = figure.reference.as_ref().filter(|r| r.what == RAW && !known) {
            raw.values.push((point.at, reference.samples.median));
        }
    }
    lines.extend(Some(raw).filter(|raw| !raw.values.is_empty()));
    for line in &mut lines {
        line.values.sort_by_key(|value| value.0);
    }
    lines
}

fn grid(canvas: &mut Canvas, top: f64, most: f64, unit: FigureUnit) {
    for step in 0..=STEPS {
        let share = f64::from(step) / f64::from(STEPS);
        let y = top + HEIGHT * (1.0 - share);
        canvas.line((LEFT, y), (WIDTH, y), "grid");
        let value = most * share;
        canvas.text(LEFT - 8.0, y + 4.0, "soft", Anchor::End, &unit.bare(value));
    }
}

fn spacing(places: usize) -> f64 {
    let gaps = u32::try_from(places.saturating_sub(1)).unwrap_or(u32::MAX);
    (WIDTH - LEFT - 56.0) / f64::from(gaps.max(1))
}

/// A little more than `value`, so that every step of the grid is a round number.
fn round_up(value: f64) -> f64 {
    let mut unit = 1.0;
    while unit * 40.0 < value {
        unit *= 10.0;
    }
    [4.0, 8.0, 12.0, 20.0, 40.0]
        .map(|n| n * unit)
        .into_iter()
        .find(|most| *most >= value)
        .unwrap_or(40.0 * unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_ends_at_a_round_number_above() {
        for (value, most) in [(0.0, 4.0), (9.0, 12.0), (21_400.0, 40_000.0), (17_000.0, 20_000.0)] {
            assert!((round_up(value) - most).abs() < 1e-9, "{value}: {}", round_up(value));
        }
    }
}
