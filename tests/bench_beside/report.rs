//! What is read of a report of `garenne bench --output json`; other fields may come and go.

use serde::Deserialize;

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Report {
    pub(crate) machine: Machine,
    pub(crate) settings: Settings,
    pub(crate) figures: Vec<Figure>,
    #[serde(default)]
    pub(crate) processor_time: Vec<Effort>,
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Machine {
    pub(crate) profile: String,
    pub(crate) load_before: Option<f64>,
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Settings {
    pub(crate) quick: bool,
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Figure {
    /// The same in every version.
    pub(crate) id: String,
    pub(crate) scenario: String,
    pub(crate) title: String,
    pub(crate) unit: Unit,
    pub(crate) garenne: Option<Samples>,
    /// Ours over the reference's of the same run.
    pub(crate) ratio: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Unit {
    PerSecond,
    Milliseconds,
    Mebibytes,
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Samples {
    pub(crate) median: f64,
}

/// Processor time of one run.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Effort {
    /// The figure that it belongs to.
    pub(crate) id: String,
    /// Whether it is the bare client's.
    pub(crate) raw: bool,
    pub(crate) tasks: f64,
    pub(crate) spent: Spent,
}

/// In seconds, as far as it is known.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Spent {
    pub(crate) client: Option<f64>,
    pub(crate) workers: Option<f64>,
    pub(crate) collector: Option<f64>,
    pub(crate) broker: Option<f64>,
}

impl Spent {
    /// What everybody spent that belongs to it.
    pub(crate) fn all(&self) -> f64 {
        let parts = [self.client, self.workers, self.collector, self.broker];
        parts.into_iter().flatten().sum()
    }
}

impl Report {
    /// Another part of the same run.
    pub(crate) fn add(&mut self, part: Self) {
        let loads = [self.machine.load_before, part.machine.load_before];
        self.machine.load_before = loads.into_iter().flatten().reduce(f64::max);
        if part.machine.profile != "release" {
            self.machine.profile = part.machine.profile;
        }
        self.settings.quick |= part.settings.quick;
        self.figures.extend(part.figures);
        self.processor_time.extend(part.processor_time);
    }

    pub(crate) fn figure(&self, id: &str) -> Option<&Figure> {
        self.figures.iter().find(|figure| figure.id == id)
    }

    /// Microseconds of processor time per task, of everybody that belongs to it.
    pub(crate) fn micros(&self, id: &str) -> Option<f64> {
        let ours = self.processor_time.iter().find(|effort| effort.id == id && !effort.raw)?;
        let micros = 1e6 * ours.spent.all() / ours.tasks;
        // Nothing is measured in less than a tick of the clock.
        (micros.is_finite() && micros > 0.0).then_some(micros)
    }
}
