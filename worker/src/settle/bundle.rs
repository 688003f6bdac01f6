//! A bundle of results that fills until it is sent.

use std::collections::HashMap;
use std::sync::Arc;

use garenne_common::wire::{self, Report};

use super::order::Claim;

pub(super) const MAX_REPORTS: usize = 500;
const MAX_BYTES: usize = 1024 * 1024;

/// Reports for the collector, whose deliveries they settle, and replies that leave with them.
#[derive(Debug, Default)]
pub(super) struct Bundle {
    pub(super) claims: Vec<Claim>,
    pub(super) reports: Vec<Report>,
    pub(super) replies: HashMap<Arc<str>, Vec<Reported>>,
    bytes: usize,
}

/// What a reply says.
#[derive(Debug)]
pub(super) enum Reported {
    /// The same as one of the bundle's reports, by its place.
    Same(usize),
    /// Something that the collector is not told, or not here.
    Other(Report),
}

impl Bundle {
    pub(super) fn add(&mut self, report: Report) {
        self.bytes += wire::report::weight(&report);
        self.reports.push(report);
    }

    /// Adds a report that somebody besides the collector hears, too.
    pub(super) fn add_with_reply(&mut self, to: Arc<str>, report: Report) {
        self.replies.entry(to).or_default().push(Reported::Same(self.reports.len()));
        self.add(report);
    }

    /// Adds what only a sender hears.
    pub(super) fn add_reply(&mut self, to: Arc<str>, report: Report) {
        self.replies.entry(to).or_default().push(Reported::Other(report));
    }

    pub(super) fn is_full(&self) -> bool {
        self.reports.len() >= MAX_REPORTS || self.bytes >= MAX_BYTES
    }

    pub(super) fn is_empty(&self) -> bool {
        self.reports.is_empty() && self.replies.is_empty()
    }
}

/// Whether these replies say just what the collector hears, so that one message does for both.
pub(super) fn are_the_same(replies: &[Reported], reports: &[Report]) -> bool {
    let same = |(place, reply): (usize, &Reported)| match reply {
        Reported::Same(of) => *of == place,
        Reported::Other(_) => false,
    };
    replies.len() == reports.len() && replies.iter().enumerate().all(same)
}

/// What these replies say.
pub(super) fn spelt_out(replies: Vec<Reported>, reports: &[Report]) -> Vec<Report> {
    let report = |reply| match reply {
        Reported::Same(place) => reports.get(place).cloned(),
        Reported::Other(report) => Some(report),
    };
    replies.into_iter().filter_map(report).collect()
}

/// Cuts reports into bundles of a bounded size; a report that is larger alone goes alone.
pub(super) fn parts(reports: &[Report]) -> impl Iterator<Item = &[Report]> {
    let mut rest = reports;
    std::iter::from_fn(move || {
        let mut bytes = 0;
        let fits = rest.iter().take_while(|report| {
            bytes += wire::report::weight(report);
            bytes <= MAX_BYTES
        });
        let count = fits.count().clamp(1, MAX_REPORTS).min(rest.len());
        let (part, after) = rest.split_at(count);
        rest = after;
        (!part.is_empty()).then_some(part)
    })
}
