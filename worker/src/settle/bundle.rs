//! A bundle of results that fills until it is sent.

use std::collections::HashMap;

use garenne_common::wire::{self, Report};

use super::core::Claim;

pub(super) const MAX_REPORTS: usize = 500;
const MAX_BYTES: usize = 1024 * 1024;

/// Reports for the collector, whose deliveries they settle, and replies that leave with them.
#[derive(Debug, Default)]
pub(super) struct Bundle {
    pub(super) claims: Vec<Claim>,
    pub(super) reports: Vec<Report>,
    pub(super) replies: HashMap<String, Vec<Report>>,
    bytes: usize,
}

impl Bundle {
    pub(super) fn add(&mut self, report: Report) {
        self.bytes += wire::report::weight(&report);
        self.reports.push(report);
    }

    pub(super) fn is_full(&self) -> bool {
        self.reports.len() >= MAX_REPORTS || self.bytes >= MAX_BYTES
    }

    pub(super) fn is_empty(&self) -> bool {
        self.reports.is_empty() && self.replies.is_empty()
    }
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
