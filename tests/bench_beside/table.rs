//! The rows as a table of text.

use crate::report::Unit;
use crate::row::{Pair, Row};

/// All rows under a header in which the other build has this name.
pub(crate) fn of(name: &str, rows: &[Row]) -> String {
    let header = ["ROW", "THIS", name, "x", "RATIO", name, "x", "CPU/TASK", name, "x", "HOLDS"];
    let header = header.map(str::to_owned);
    let lines: Vec<_> = [header].into_iter().chain(rows.iter().map(cells)).collect();
    let widths = lines.iter().fold([0; 11], |mut widths, line| {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = (*width).max(cell.chars().count());
        }
        widths
    });
    let padded = lines.iter().map(|line| {
        let cells = line.iter().zip(widths).enumerate().map(|(place, (cell, width))| match place {
            0 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        });
        cells.collect::<Vec<_>>().join("  ") + "\n"
    });
    padded.collect()
}

fn cells(row: &Row) -> [String; 11] {
    let figure = |value: f64| match row.unit {
        Unit::PerSecond => format!("{value:.0}/s"),
        Unit::Milliseconds => format!("{value:.2} ms"),
        Unit::Mebibytes => format!("{value:.1} MiB"),
    };
    let [this, that, times] = three(Some(row.figure), figure);
    let [ratio, other_ratio, ratio_times] = three(row.ratio, |value| format!("{value:.2}"));
    let [cpu, other_cpu, cpu_times] = three(row.processor, |value| format!("{value:.1} \u{b5}s"));
    let holds = if row.holds() { "yes" } else { "NO" }.to_owned();
    let title = row.title.clone();
    [title, this, that, times, ratio, other_ratio, ratio_times, cpu, other_cpu, cpu_times, holds]
}

fn three(pair: Option<Pair>, show: impl Fn(f64) -> String) -> [String; 3] {
    let Some(Pair { this, that, times }) = pair else { return ["-", "-", "-"].map(str::to_owned) };
    [show(this), show(that), format!("{times:.2}")]
}
