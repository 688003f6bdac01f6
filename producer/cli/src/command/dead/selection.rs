//! Which dead letters: the filters that all subcommands share, and queries for pages of matching
//! letters.

use std::collections::HashSet;

use clap::Args;
use garenne_common::wire::{DeadCursor, DeadFilter, DeadPage, LetterState, Query, Response};
use garenne_common::{BatchId, DeadReason, TaskId, Timestamp};
use garenne_producer::Producer;

use crate::context::Context;
use crate::error::CliError;

/// Filters. A letter must match all that are given.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Which dead letters")]
pub(crate) struct Selection {
    /// Only these tasks
    #[arg(value_name = "ID")]
    pub(crate) ids: Vec<TaskId>,
    /// Only tasks of this name; * matches any text and ? any character: 'mail.*'
    #[arg(long, value_name = "NAME")]
    pub(crate) task: Option<String>,
    /// Only tasks for this queue
    #[arg(long, short, value_name = "QUEUE")]
    pub(crate) queue: Option<String>,
    /// Only letters with this reason; may be repeated
    #[arg(long, value_name = "REASON", value_delimiter = ',', value_parser = reason)]
    pub(crate) reason: Vec<DeadReason>,
    /// Failed at most this long ago (2h, 3days), or since a day (2026-11-23) or a time
    /// (2026-11-23T09:00:00Z), in UTC
    #[arg(long, value_name = "TIME", value_parser = past_time)]
    pub(crate) since: Option<Timestamp>,
    /// Failed at least this long ago, or before a day or time
    #[arg(long, value_name = "TIME", value_parser = past_time)]
    pub(crate) until: Option<Timestamp>,
    /// Only letters whose error contains this text; case is ignored
    #[arg(long, value_name = "TEXT")]
    pub(crate) error: Option<String>,
    /// Only members of this batch
    #[arg(long, value_name = "ID")]
    pub(crate) batch: Option<BatchId>,
    /// Instead of the others, letters of tasks that have succeeded or were cancelled after all
    #[arg(long)]
    pub(crate) late: bool,
}

impl Selection {
    /// Whether it matches all dead letters.
    pub(crate) fn is_everything(&self) -> bool {
        self.filter().is_everything()
    }

    /// Whether it consists of ids only.
    pub(crate) fn is_ids_only(&self) -> bool {
        let rest = DeadFilter { ids: vec![], ..self.filter() };
        !self.ids.is_empty() && rest.is_everything()
    }

    /// The number of ids without a letter, given the number of letters `found`; 0 if there are
    /// filters as well.
    pub(crate) fn unmatched_ids(&self, found: u64) -> u64 {
        let distinct = self.ids.iter().collect::<HashSet<_>>().len() as u64;
        if self.is_ids_only() { distinct.saturating_sub(found) } else { 0 }
    }

    /// The filter of a query.
    pub(crate) fn filter(&self) -> DeadFilter {
        DeadFilter {
            ids: self.ids.clone(),
            name: self.task.clone(),
            queue: self.queue.clone(),
            reasons: self.reason.clone(),
            since: self.since,
            until: self.until,
            error: self.error.clone(),
            batch: self.batch.clone(),
            state: if self.late { LetterState::Late } else { LetterState::Dead },
        }
    }
}

/// What [`page`] fetches.
pub(super) struct PageRequest<'a> {
    pub(super) filter: &'a DeadFilter,
    /// Where the page before ended; `None` for the first page.
    pub(super) from: Option<DeadCursor>,
    /// The most letters.
    pub(super) limit: u64,
    /// Whether to include complete messages.
    pub(super) whole: bool,
}

/// Fetches a page of letters. The first page also counts all matches.
pub(super) async fn page(
    context: &Context,
    producer: &Producer,
    request: PageRequest<'_>,
) -> Result<DeadPage, CliError> {
    let PageRequest { filter, from, limit, whole } = request;
    let limit = u32::try_from(limit).unwrap_or(u32::MAX);
    let (filter, count) = (filter.clone(), from.is_none());
    let query = Query::DeadList { limit, filter, from, count, whole };
    let response = context.query(producer, query).await?;
    let Response::DeadList { letters, total, more_than_total, next } = response else {
        return Err(CliError::unexpected_response());
    };
    if count && total.is_none() {
        // Such a collector ignores filters, so the command would affect all letters.
        return Err(CliError::unusable("this collector is too old to filter dead letters")
            .help("run the garenne-collector of this version"));
    }
    Ok(DeadPage { letters, total, more_than_total, next })
}

/// The total of a page: "1 dead letter", "7 dead letters", "more than 20000 dead letters".
pub(crate) fn how_many(page: &DeadPage) -> String {
    let total = page.total.unwrap_or_default();
    let more = if page.more_than_total { "more than " } else { "" };
    format!("{more}{}", letters(total))
}

/// "1 dead letter", "7 dead letters".
pub(crate) fn letters(count: u64) -> String {
    if count == 1 { "1 dead letter".to_owned() } else { format!("{count} dead letters") }
}

fn reason(text: &str) -> Result<DeadReason, String> {
    DeadReason::from_code(text).ok_or_else(|| {
        let all: Vec<_> = DeadReason::ALL.into_iter().map(DeadReason::as_str).collect();
        format!("valid reasons: {}", all.join(", "))
    })
}

/// Parses a time in the past. A duration is counted back from now; a day begins at midnight; a time
/// without a zone is in UTC, like all times that are printed.
fn past_time(text: &str) -> Result<Timestamp, String> {
    if let Ok(ago) = humantime::parse_duration(text) {
        let ago = u64::try_from(ago.as_millis()).unwrap_or(u64::MAX);
        return Ok(Timestamp::from_millis(Timestamp::now().as_millis().saturating_sub(ago)));
    }
    let complete = [text.to_owned(), format!("{text}Z"), format!("{text}T00:00:00Z")];
    complete.iter().find_map(|text| text.parse().ok()).ok_or_else(|| {
        "write how long ago (90s, 2h, 3days), a day (2026-11-23) or a time (2026-11-23T09:00:00Z)"
            .to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_duration_counts_back_from_now_and_a_time_is_absolute() {
        let hour_ago = past_time("1h").unwrap();
        let ago = Timestamp::now().since(hour_ago);
        assert!(ago >= Duration::from_hours(1) && ago < Duration::from_mins(61), "{ago:?}");
        assert_eq!(past_time("1970-01-01T00:00:01Z"), Ok(Timestamp::from_millis(1_000)));
        let day = past_time("1970-01-02T00:00:00Z");
        assert_eq!((past_time("1970-01-02"), past_time("1970-01-02T00:00:00")), (day.clone(), day));
        assert!(past_time("1970-13-02").is_err() && past_time("1970").is_err());
        assert!(past_time("yesterday").unwrap_err().contains("2h"));
        assert!(past_time("5").unwrap_err().contains("2h"));
    }

    #[test]
    fn an_unknown_reason_is_refused_with_the_valid_ones() {
        assert_eq!(reason("timed_out"), Ok(DeadReason::TimedOut));
        assert!(reason("timeout").unwrap_err().contains("timed_out"));
    }

    #[test]
    fn ids_only_is_distinguished_from_ids_with_filters() {
        let ids = Selection { ids: vec![TaskId::new("t").unwrap()], ..Selection::default() };
        assert!(ids.is_ids_only() && !ids.is_everything());
        assert!(!Selection { late: true, ..ids }.is_ids_only());
        assert!(Selection::default().is_everything());
    }

    #[test]
    fn an_id_that_is_given_twice_is_unmatched_once() {
        let ids = ["a", "b", "b"].map(|id| TaskId::new(id).unwrap());
        let selection = Selection { ids: ids.to_vec(), ..Selection::default() };
        assert_eq!(
            (selection.unmatched_ids(2), selection.unmatched_ids(1), selection.unmatched_ids(0)),
            (0, 1, 2)
        );
        assert_eq!(
            Selection { late: true, ..selection }.unmatched_ids(0),
            0,
            "the filter may have left them out"
        );
    }
}
