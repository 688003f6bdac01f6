//! The large runs: too long for every commit, and the source of the figures in the documentation.
//!
//! They are compiled with the feature `soak` only (`make soak`), so that a run without them counts no
//! test as passed that did not run. Each prints its figures as one line that begins with `figure`.
//! `GARENNE_SOAK_PERCENT` makes all of them smaller, to try them out.

mod alarm;
mod collector;
mod delays;
mod hostile;
mod poison;
mod random_configurations;
mod sigterm;

/// A size of a run: `full`, or the share of it that `GARENNE_SOAK_PERCENT` asks for.
pub(crate) fn size(full: usize) -> usize {
    let percent = std::env::var("GARENNE_SOAK_PERCENT").ok();
    let percent = percent.map_or(100, |text| text.parse().expect("a number of percent"));
    (full * percent / 100).max(1)
}

/// Prints what a run has measured.
#[expect(clippy::print_stdout, reason = "the figures are what the run is for")]
pub(crate) fn figure(run: &str, values: &[(&str, String)]) {
    let values: Vec<_> = values.iter().map(|(name, value)| format!("{name}={value}")).collect();
    println!("figure {run}: {}", values.join(" "));
}
