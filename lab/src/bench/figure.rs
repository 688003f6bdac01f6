//! Figures: what was measured, beside what, and whether that is good enough.

use indicatif::HumanCount;
use serde::Serialize;

use super::Scenario;

/// One measured quantity, beside a reference of the same run where it has one.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Figure {
    /// Its name for programs; it stays the same from version to version.
    pub(super) id: String,
    pub(super) scenario: Scenario,
    pub(super) title: String,
    pub(super) unit: FigureUnit,
    pub(super) garenne: Option<Samples>,
    pub(super) reference: Option<Reference>,
    /// Ours over the reference's, run by run: neighbours in time share the machine's moods, so the
    /// median of their ratios is steadier than the ratio of two medians.
    pub(super) ratio: Option<f64>,
    pub(super) target: Option<Target>,
    pub(super) verdict: Option<TargetVerdict>,
    /// Where it lies on a line of several figures.
    pub(super) point: Option<Point>,
}

/// What a figure is compared with.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Reference {
    pub(super) what: &'static str,
    pub(super) samples: Samples,
}

/// The usual reference: the bare client.
pub(super) const RAW: &str = "raw lapin";

#[derive(Debug, Clone, Serialize)]
pub(super) struct Point {
    pub(super) line: &'static str,
    /// Bytes, tasks, workers or producers, as the scenario says.
    pub(super) at: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum FigureUnit {
    PerSecond,
    Milliseconds,
    Mebibytes,
}

/// What a figure should be: goals of the project, not promises to anybody.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Target {
    pub(super) of: Measure,
    pub(super) bound: Bound,
    pub(super) value: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Measure {
    /// Of the ratio.
    Ratio,
    /// Of our median.
    Median,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Bound {
    AtLeast,
    AtMost,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum TargetVerdict {
    Met,
    Missed,
}

/// The values of all runs.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Samples {
    pub(super) median: f64,
    pub(super) lowest: f64,
    pub(super) highest: f64,
    pub(super) all: Vec<f64>,
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
    /// A figure of ours alone.
    pub(super) fn new(
        scenario: Scenario,
        id: impl Into<String>,
        title: impl Into<String>,
        unit: FigureUnit,
        garenne: Option<Samples>,
    ) -> Self {
        Self {
            id: id.into(),
            scenario,
            title: title.into(),
            unit,
            garenne,
            reference: None,
            ratio: None,
            target: None,
            verdict: None,
            point: None,
        }
    }

    /// Beside these.
    pub(super) fn beside(mut self, what: &'static str, samples: Option<Samples>) -> Self {
        self.ratio = self.garenne.as_ref().zip(samples.as_ref()).and_then(|(ours, other)| {
            let ratios = ours.all.iter().zip(&other.all).map(|(ours, other)| ours / other);
            Samples::of(ratios.collect()).map(|ratios| ratios.median)
        });
        self.reference = samples.map(|samples| Reference { what, samples });
        self.judged()
    }

    /// With a target.
    pub(super) fn wanting(mut self, target: Option<Target>) -> Self {
        self.target = target;
        self.judged()
    }

    /// On a line.
    pub(super) fn at(mut self, line: &'static str, at: u64) -> Self {
        self.point = Some(Point { line, at });
        self
    }

    fn judged(mut self) -> Self {
        self.verdict = self.target.and_then(|target| target.judge(self.measured(target.of)?));
        self
    }

    fn measured(&self, measure: Measure) -> Option<f64> {
        match measure {
            Measure::Ratio => self.ratio,
            Measure::Median => self.garenne.as_ref().map(|ours| ours.median),
        }
    }

    /// Where on the scale of the figure itself the target lies.
    pub(super) fn mark(&self) -> Option<f64> {
        let target = self.target?;
        match target.of {
            Measure::Ratio => Some(target.value * self.reference.as_ref()?.samples.median),
            Measure::Median => Some(target.value),
        }
    }

    /// What the target looks at, and the target, in words.
    pub(super) fn judgement(&self) -> Option<[String; 2]> {
        let target = self.target?;
        let show = |value: f64| match target.of {
            Measure::Ratio => format!("{value:.2} x"),
            Measure::Median => self.unit.show(value),
        };
        let measured = self.measured(target.of).map_or_else(|| "-".to_owned(), show);
        let bound = match target.bound {
            Bound::AtLeast => "at least",
            Bound::AtMost => "at most",
        };
        Some([measured, format!("{bound} {}", show(target.value))])
    }
}

impl Target {
    /// At least so many times the reference.
    pub(super) const fn times(value: f64) -> Self {
        Self { of: Measure::Ratio, bound: Bound::AtLeast, value }
    }

    /// At most so many times the reference.
    pub(super) const fn at_most_times(value: f64) -> Self {
        Self { of: Measure::Ratio, bound: Bound::AtMost, value }
    }

    /// At least so much.
    pub(super) const fn at_least(value: f64) -> Self {
        Self { of: Measure::Median, bound: Bound::AtLeast, value }
    }

    /// At most so much.
    pub(super) const fn at_most(value: f64) -> Self {
        Self { of: Measure::Median, bound: Bound::AtMost, value }
    }

    fn judge(self, measured: f64) -> Option<TargetVerdict> {
        let met = match self.bound {
            Bound::AtLeast => measured >= self.value,
            Bound::AtMost => measured <= self.value,
        };
        measured.is_finite().then_some(if met { TargetVerdict::Met } else { TargetVerdict::Missed })
    }
}

impl TargetVerdict {
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Met => "met",
            Self::Missed => "missed",
        }
    }
}

impl FigureUnit {
    /// With its unit.
    pub(super) fn show(self, value: f64) -> String {
        match self {
            Self::PerSecond => format!("{}/s", rounded(value)),
            Self::Milliseconds => format!("{} ms", self.bare(value)),
            Self::Mebibytes => format!("{} MiB", self.bare(value)),
        }
    }

    /// Without.
    pub(super) fn bare(self, value: f64) -> String {
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
        assert_eq!(FigureUnit::PerSecond.show(12_345.6), "12,300/s");
        assert_eq!(FigureUnit::PerSecond.show(999.4), "999/s");
        assert_eq!(FigureUnit::Milliseconds.show(1.234), "1.23 ms");
    }

    #[test]
    fn a_target_looks_at_the_ratio_or_at_the_figure() {
        let figure = |target| {
            Figure::new(
                Scenario::Singles,
                "x",
                "x",
                FigureUnit::PerSecond,
                Samples::of(vec![300.0]),
            )
            .wanting(Some(target))
            .beside(RAW, Samples::of(vec![100.0]))
        };
        for (target, verdict) in [
            (Target::times(3.0), TargetVerdict::Met),
            (Target::times(3.1), TargetVerdict::Missed),
            (Target::at_most_times(2.9), TargetVerdict::Missed),
            (Target::at_least(300.0), TargetVerdict::Met),
            (Target::at_most(299.0), TargetVerdict::Missed),
        ] {
            assert_eq!(figure(target).verdict, Some(verdict), "{target:?}");
        }
        assert_eq!(figure(Target::times(2.0)).mark(), Some(200.0));
        let words = figure(Target::times(2.0)).judgement().unwrap();
        assert_eq!(words, ["3.00 x", "at least 2.00 x"]);
    }

    #[test]
    fn a_target_without_a_measurement_has_no_verdict() {
        let figure = Figure::new(Scenario::Memory, "x", "x", FigureUnit::Mebibytes, None);
        assert_eq!(figure.wanting(Some(Target::at_most(20.0))).verdict, None);
    }
}
