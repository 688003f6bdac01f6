//! The standing speed rule, pure: processor time per task and the ratio to the reference are at least
//! 0.90 times as good as those of the other build, in every row. Where a row has no processor time, the
//! figure itself takes its place.
//!
//! What counts is the median of the quotients of the runs, not the quotient of the medians: the two
//! builds measured a row of a run one after the other, and a machine drifts by more than a tenth from
//! run to run.

use crate::report::{Figure, Report, Unit};

/// How good this build must be, measured by the other one.
pub(crate) const LEAST: f64 = 0.90;

/// One value in both builds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Pair {
    /// The median of the runs.
    pub(crate) this: f64,
    /// The median of the runs.
    pub(crate) that: f64,
    /// How many times as good this build is, in the median of the runs: above 1 is better, whatever is
    /// measured.
    pub(crate) times: f64,
}

/// One figure of the bench in both builds.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    pub(crate) scenario: String,
    pub(crate) title: String,
    pub(crate) unit: Unit,
    pub(crate) figure: Pair,
    /// To the bare client, or what else the bench compares with.
    pub(crate) ratio: Option<Pair>,
    /// Microseconds per task.
    pub(crate) processor: Option<Pair>,
}

impl Row {
    pub(crate) fn holds(&self) -> bool {
        let instead = self.processor.is_none().then_some(self.figure);
        let judged = [self.processor, self.ratio, instead];
        judged.into_iter().flatten().all(|pair| pair.times >= LEAST)
    }
}

/// The rows that both builds have, in the order of this one's.
pub(crate) fn compare(this: &[Report], that: &[Report]) -> Vec<Row> {
    let first = this.first().map_or(&[][..], |report| &report.figures);
    first.iter().filter_map(|figure| row(figure, this, that)).collect()
}

/// The titles of figures that the other build does not have.
pub(crate) fn only_in(these: &[Report], others: &[Report]) -> Vec<String> {
    let has =
        |reports: &[Report], id: &str| reports.iter().any(|report| ours(report, id).is_some());
    let first = these.first().map_or(&[][..], |report| &report.figures);
    let alone = first.iter().filter(|figure| has(these, &figure.id) && !has(others, &figure.id));
    alone.map(|figure| figure.title.clone()).collect()
}

fn row(figure: &Figure, this: &[Report], that: &[Report]) -> Option<Row> {
    let id = &figure.id;
    let more_is_better = figure.unit == Unit::PerSecond;
    let both = |of: &dyn Fn(&Report) -> Option<f64>, more_is_better| {
        pair(&values(this, of), &values(that, of), more_is_better)
    };
    Some(Row {
        scenario: figure.scenario.clone(),
        title: figure.title.clone(),
        unit: figure.unit,
        figure: both(&|report| ours(report, id), more_is_better)?,
        ratio: both(&|report| report.figure(id)?.ratio, more_is_better),
        processor: both(&|report| report.micros(id), false),
    })
}

fn values(reports: &[Report], of: &dyn Fn(&Report) -> Option<f64>) -> Vec<Option<f64>> {
    reports.iter().map(of).collect()
}

fn ours(report: &Report, id: &str) -> Option<f64> {
    Some(report.figure(id)?.garenne.as_ref()?.median)
}

/// `None` without a run in which both have the value.
fn pair(this: &[Option<f64>], that: &[Option<f64>], more_is_better: bool) -> Option<Pair> {
    let runs = this.iter().zip(that).filter_map(|(this, that)| Some(((*this)?, (*that)?)));
    let times = runs.map(|(this, that)| if more_is_better { this / that } else { that / this });
    Some(Pair {
        times: median(times)?,
        this: median(this.iter().copied().flatten())?,
        that: median(that.iter().copied().flatten())?,
    })
}

/// `None` without a value.
fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut all: Vec<f64> = values.collect();
    all.sort_by(f64::total_cmp);
    let middle = all.len() / 2;
    let upper = *all.get(middle)?;
    let is_even = all.len().is_multiple_of(2);
    Some(if is_even { f64::midpoint(all[middle - 1], upper) } else { upper })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A report with one rate, its ratio and its processor time, as far as they are there.
    fn report(rate: f64, ratio: Option<f64>, micros: Option<f64>) -> Report {
        let spent = |seconds| json!({ "client": seconds, "workers": seconds, "collector": null });
        let efforts = micros.map(|micros| {
            let seconds = micros * 1_000.0 / 1e6 / 2.0;
            json!([
                { "id": "singles", "raw": true, "tasks": 1.0, "spent": spent(9.0) },
                { "id": "singles", "raw": false, "tasks": 1_000.0, "spent": spent(seconds) },
            ])
        });
        let report = json!({
            "machine": { "profile": "release", "load_before": 0.1 },
            "settings": { "quick": false },
            "figures": [{ "id": "singles", "scenario": "singles", "title": "singles, stored", "unit": "per_second",
                          "garenne": { "median": rate }, "ratio": ratio, "more": "to come" }],
            "processor_time": efforts.unwrap_or_else(|| json!([])),
        });
        serde_json::from_value(report).expect("a report")
    }

    fn only(this: &[Report], that: &[Report]) -> Row {
        let mut rows = compare(this, that);
        assert_eq!(rows.len(), 1);
        rows.remove(0)
    }

    #[test]
    fn medians_count_and_single_runs_do_not() {
        let this = [500.0, 90.0, 100.0].map(|rate| report(rate, Some(rate / 50.0), Some(10.0)));
        let that = [100.0; 3].map(|rate| report(rate, Some(2.0), Some(10.0)));
        let row = only(&this, &that);
        assert_eq!(row.figure, Pair { this: 100.0, that: 100.0, times: 1.0 });
        assert_eq!(row.ratio.map(|ratio| ratio.this), Some(2.0));
        assert!(row.holds());
    }

    #[test]
    fn a_machine_that_slows_down_meanwhile_slows_both() {
        let this = [96.0, 48.0, 95.0].map(|rate| report(rate, Some(2.0), Some(1_000.0 / rate)));
        let that = [100.0, 50.0, 100.0].map(|rate| report(rate, Some(2.0), Some(1_000.0 / rate)));
        let row = only(&this, &that);
        assert_eq!(row.figure, Pair { this: 95.0, that: 100.0, times: 0.96 });
        assert!(row.holds());
    }

    #[test]
    fn processor_time_and_ratio_each_break_the_rule() {
        let that = [report(100.0, Some(2.0), Some(10.0))];
        // Less processor time is better: 11 for 10 is 0.91 times as good.
        assert!(only(&[report(100.0, Some(1.81), Some(11.0))], &that).holds());
        assert!(!only(&[report(100.0, Some(2.0), Some(11.5))], &that).holds());
        assert!(!only(&[report(100.0, Some(1.7), Some(10.0))], &that).holds());
    }

    #[test]
    fn a_rate_alone_counts_only_where_no_processor_time_is_known() {
        let that = [report(100.0, Some(2.0), Some(10.0))];
        assert!(only(&[report(50.0, Some(2.0), Some(10.0))], &that).holds(), "a slow moment");
        let that = [report(100.0, None, None)];
        assert!(!only(&[report(50.0, None, None)], &that).holds());
        assert!(only(&[report(95.0, None, None)], &that).holds());
    }

    #[test]
    fn more_milliseconds_are_worse() {
        let latency = |millis: f64, ratio: f64| {
            let mut report = report(millis, Some(ratio), None);
            report.figures[0].unit = Unit::Milliseconds;
            report
        };
        assert!(only(&[latency(1.0, 1.1)], &[latency(2.0, 1.2)]).holds());
        assert!(!only(&[latency(2.0, 1.2)], &[latency(2.0, 1.0)]).holds());
    }

    #[test]
    fn what_only_one_build_has_is_not_compared() {
        let mut this = report(100.0, None, None);
        this.figures[0].id = "new".to_owned();
        let that = report(100.0, None, None);
        assert!(compare(std::slice::from_ref(&this), std::slice::from_ref(&that)).is_empty());
        assert_eq!(only_in(&[this], &[that]), ["singles, stored"]);
    }
}
