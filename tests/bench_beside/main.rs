//! Judges what `scripts/bench-beside` has measured: the reports of two builds, run by run, side by side.
//!
//! `bench-judge NAME DIRECTORY` reads `this.RUN.SCENARIO.json` and `that.RUN.SCENARIO.json`, reports of
//! `garenne bench`, and prints a table; with `--missed` only the scenarios of rows below the rule. Exit
//! code 0: the standing speed rule holds in every row; 1: it does not; 2: there is nothing to judge. It
//! measures nothing itself.

mod report;
mod row;
mod table;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::{env, fs, io};

use report::Report;
use row::LEAST;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let (name, directory, only_missed) = match &arguments[..] {
        [name, directory] => (name, directory, false),
        [name, directory, flag] if flag == "--missed" => (name, directory, true),
        _ => return refuse("usage: bench-judge NAME DIRECTORY [--missed]"),
    };
    let reports = |build: &str| {
        let read = read(Path::new(directory), build);
        read.map_err(|error| format!("the reports in {directory} cannot be read: {error}"))
    };
    match (reports("this"), reports("that")) {
        (Ok(this), Ok(that)) if only_missed => missed(&this, &that),
        (Ok(this), Ok(that)) => judge(name, &this, &that),
        (Err(error), _) | (_, Err(error)) => refuse(&error),
    }
}

/// The scenarios with a row that misses, separated by commas.
fn missed(this: &[Report], that: &[Report]) -> ExitCode {
    let rows = row::compare(this, that);
    let missed = rows.iter().filter(|row| !row.holds()).map(|row| row.scenario.as_str());
    let scenarios: BTreeSet<&str> = missed.collect();
    let scenarios: Vec<_> = scenarios.into_iter().collect();
    drop(writeln!(io::stdout(), "{}", scenarios.join(",")));
    ExitCode::SUCCESS
}

fn judge(name: &str, this: &[Report], that: &[Report]) -> ExitCode {
    let rows = row::compare(this, that);
    if rows.is_empty() {
        return refuse("the two builds have no row in common");
    }
    let missed = rows.iter().filter(|row| !row.holds()).count();
    let verdict = if missed == 0 {
        format!("The rule holds: at least {LEAST:.2} x in every one of {} rows.", rows.len())
    } else {
        format!("THE RULE DOES NOT HOLD: below {LEAST:.2} x in {missed} of {} rows.", rows.len())
    };
    let mut text = facts(this, that);
    text.push_str(&table::of(name, &rows));
    text.push_str(&alone("this build", &row::only_in(this, that)));
    text.push_str(&alone(name, &row::only_in(that, this)));
    // Whoever does not read it has its exit code.
    drop(writeln!(io::stdout(), "{text}\n{verdict}"));
    ExitCode::from(u8::from(missed > 0))
}

/// What must be known to believe the figures.
fn facts(this: &[Report], that: &[Report]) -> String {
    let all = || this.iter().chain(that);
    let loads = all().filter_map(|report| report.machine.load_before);
    let load = loads.fold(0.0, f64::max);
    let mut text =
        format!("{} and {} runs; highest load before a run: {load:.2}\n", this.len(), that.len());
    if all().any(|report| report.settings.quick) {
        text.push_str("QUICK RUNS: their figures say little.\n");
    }
    if all().any(|report| report.machine.profile != "release") {
        text.push_str("NOT A RELEASE BUILD: its figures say nothing.\n");
    }
    text + "\n"
}

fn alone(build: &str, titles: &[String]) -> String {
    if titles.is_empty() {
        return String::new();
    }
    format!("\nOnly in {build}, and not compared: {}\n", titles.join("; "))
}

/// The reports of one build, one for each run, in the order of the runs' names.
fn read(directory: &Path, build: &str) -> io::Result<Vec<Report>> {
    let mut paths: Vec<_> = fs::read_dir(directory)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()?;
    paths.sort();
    let mut runs: BTreeMap<String, Report> = BTreeMap::new();
    for path in paths {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let mut parts = name.split('.');
        if parts.next() != Some(build) || !name.ends_with(".json") {
            continue;
        }
        let run = parts.next().unwrap_or_default().to_owned();
        let report: Report = serde_json::from_str(&fs::read_to_string(&path)?)?;
        match runs.entry(run) {
            Entry::Vacant(first) => drop(first.insert(report)),
            Entry::Occupied(mut earlier) => earlier.get_mut().add(report),
        }
    }
    Ok(runs.into_values().collect())
}

fn refuse(why: &str) -> ExitCode {
    drop(writeln!(io::stderr(), "bench-judge: {why}"));
    ExitCode::from(2)
}
