//! A bundle of reports that is filled until it is published.

use std::collections::HashMap;
use std::sync::Arc;

use garenne_common::wire::{self, Report};

use super::settlement::Subject;

pub(super) const MAX_REPORTS: usize = 500;
const MAX_BYTES: usize = 1024 * 1024;

/// Reports for the collector, what their confirm settles, and the replies that are sent with them.
#[derive(Debug, Default)]
pub(super) struct ReportBundle {
    pub(super) subjects: Vec<Subject>,
    pub(super) reports: Vec<Report>,
    pub(super) replies: HashMap<Arc<str>, Vec<ReplyEntry>>,
    bytes: usize,
}

/// One report of a reply.
#[derive(Debug)]
pub(super) enum ReplyEntry {
    /// The report of the bundle with this index.
    Shared(usize),
    /// A report that is not in the bundle.
    Own(Report),
}

impl ReportBundle {
    pub(super) fn add(&mut self, report: Report) {
        self.bytes += wire::report::weight(&report);
        self.reports.push(report);
    }

    /// Adds a report that is also a reply.
    pub(super) fn add_with_reply(&mut self, to: Arc<str>, report: Report) {
        self.replies.entry(to).or_default().push(ReplyEntry::Shared(self.reports.len()));
        self.add(report);
    }

    /// Adds a report that is only a reply.
    pub(super) fn add_reply(&mut self, to: Arc<str>, report: Report) {
        self.replies.entry(to).or_default().push(ReplyEntry::Own(report));
    }

    pub(super) fn is_full(&self) -> bool {
        self.reports.len() >= MAX_REPORTS || self.bytes >= MAX_BYTES
    }

    pub(super) fn is_empty(&self) -> bool {
        self.reports.is_empty() && self.replies.is_empty()
    }
}

/// Whether these replies equal the reports of the bundle, so that both can share one message.
pub(super) fn equal_the_bundle(replies: &[ReplyEntry], reports: &[Report]) -> bool {
    let shared = |(index, reply): (usize, &ReplyEntry)| match reply {
        ReplyEntry::Shared(of) => *of == index,
        ReplyEntry::Own(_) => false,
    };
    replies.len() == reports.len() && replies.iter().enumerate().all(shared)
}

/// The reports of these replies.
pub(super) fn reports_of(replies: Vec<ReplyEntry>, reports: &[Report]) -> Vec<Report> {
    let report = |reply| match reply {
        ReplyEntry::Shared(index) => reports.get(index).cloned(),
        ReplyEntry::Own(report) => Some(report),
    };
    replies.into_iter().filter_map(report).collect()
}

/// Splits reports into parts of bounded size. A larger report is a part of its own.
pub(super) fn split_by_size(reports: &[Report]) -> impl Iterator<Item = &[Report]> {
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
