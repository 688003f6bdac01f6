//! Which dead letters: the filters that all subcommands share, and asking the collector for a page.

use std::collections::HashSet;

use clap::Args;
use garenne_common::wire::{DeadCursor, DeadFilter, DeadPage, LetterState, Query, Response};
use garenne_common::{BatchId, DeadReason, TaskId, Timestamp};
use garenne_producer::Producer;

use crate::context::Context;
use crate::error::CliError;

/// Filters. Everything given must hold.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Which dead letters")]
pub(crate) struct Which {
    /// Only these tasks
    #[arg(value_name = "ID")]
    pub(crate) ids: Vec<TaskId>,
    /// Only tasks of this name; * is any text and ? any character: 'mail.*'
    #[arg(long, value_name = "NAME")]
    pub(crate) task: Option<String>,
    /// Only those that were meant for this queue
    #[arg(long, short, value_name = "QUEUE")]
    pub(crate) queue: Option<String>,
    /// Only those given up for this reason; may be repeated
    #[arg(long, value_name = "REASON", value_delimiter = ',', value_parser = reason)]
    pub(crate) reason: Vec<DeadReason>,
    /// Given up at most so long ago (2h, 3days), or since a day (2026-11-23) or a moment
    /// (2026-11-23T09:00:00Z), both in UTC
    #[arg(long, value_name = "TIME", value_parser = moment)]
    pub(crate) since: Option<Timestamp>,
    /// Given up at least so long ago, or before a moment
    #[arg(long, value_name = "TIME", value_parser = moment)]
    pub(crate) until: Option<Timestamp>,
    /// Only those whose error contains this text, in upper or lower case
    #[arg(long, value_name = "TEXT")]
    pub(crate) error: Option<String>,
    /// Only members of this batch
    #[arg(long, value_name = "ID")]
    pub(crate) batch: Option<BatchId>,
    /// Those whose task has succeeded or was cancelled after all, instead of the others
    #[arg(long)]
    pub(crate) late: bool,
}

impl Which {
    /// Whether nothing narrows it down.
    pub(crate) fn is_everything(&self) -> bool {
        self.filter().is_everything()
    }

    /// Whether it is a list of ids and nothing else.
    pub(crate) fn is_ids_alone(&self) -> bool {
        let rest = DeadFilter { ids: vec![], ..self.filter() };
        !self.ids.is_empty() && rest.is_everything()
    }

    /// How many of the ids are not among the letters that were found, where ids were all that was asked for.
    pub(crate) fn unmatched_ids(&self, found: u64) -> u64 {
        let distinct = self.ids.iter().collect::<HashSet<_>>().len() as u64;
        if self.is_ids_alone() { distinct.saturating_sub(found) } else { 0 }
    }

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

/// One page, whole messages or not; the first one also counts.
pub(crate) async fn page(
    context: &Context,
    producer: &Producer,
    filter: &DeadFilter,
    from: Option<DeadCursor>,
    (limit, whole): (u64, bool),
) -> Result<DeadPage, CliError> {
    let limit = u32::try_from(limit).unwrap_or(u32::MAX);
    let (filter, count) = (filter.clone(), from.is_none());
    let question = Query::DeadList { limit, filter, from, count, whole };
    let answer = context.ask(producer, question).await?;
    let Response::DeadList { letters, total, more_than_total, next } = answer else {
        return Err(CliError::unexpected_answer());
    };
    if count && total.is_none() {
        // It would have ignored the filters, and whatever was asked for would hit all letters.
        return Err(CliError::unusable("this collector is too old to filter dead letters")
            .help("run the garenne-collector of this version"));
    }
    Ok(DeadPage { letters, total, more_than_total, next })
}

/// "1 dead letter", "7 dead letters", "more than 20000 dead letters".
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
        format!("there are: {}", all.join(", "))
    })
}

/// A span is meant from now on backwards; a day begins at midnight, and a moment without a zone is meant, as
/// all moments are shown, in UTC.
fn moment(text: &str) -> Result<Timestamp, String> {
    if let Ok(ago) = humantime::parse_duration(text) {
        let ago = u64::try_from(ago.as_millis()).unwrap_or(u64::MAX);
        return Ok(Timestamp::from_millis(Timestamp::now().as_millis().saturating_sub(ago)));
    }
    let spelt_out = [text.to_owned(), format!("{text}Z"), format!("{text}T00:00:00Z")];
    spelt_out.iter().find_map(|text| text.parse().ok()).ok_or_else(|| {
        "write how long ago (90s, 2h, 3days), a day (2026-11-23) or a moment (2026-11-23T09:00:00Z)"
            .to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_span_is_meant_backwards_and_a_moment_as_it_is() {
        let hour_ago = moment("1h").unwrap();
        let ago = Timestamp::now().since(hour_ago);
        assert!(ago >= Duration::from_hours(1) && ago < Duration::from_mins(61), "{ago:?}");
        assert_eq!(moment("1970-01-01T00:00:01Z"), Ok(Timestamp::from_millis(1_000)));
        let day = moment("1970-01-02T00:00:00Z");
        assert_eq!((moment("1970-01-02"), moment("1970-01-02T00:00:00")), (day.clone(), day));
        assert!(moment("1970-13-02").is_err() && moment("1970").is_err());
        assert!(moment("yesterday").unwrap_err().contains("2h"));
        assert!(moment("5").unwrap_err().contains("2h"));
    }

    #[test]
    fn a_reason_that_is_none_is_answered_with_those_there_are() {
        assert_eq!(reason("timed_out"), Ok(DeadReason::TimedOut));
        assert!(reason("timeout").unwrap_err().contains("timed_out"));
    }

    #[test]
    fn ids_alone_are_told_from_ids_with_filters() {
        let ids = Which { ids: vec![TaskId::new("t").unwrap()], ..Which::default() };
        assert!(ids.is_ids_alone() && !ids.is_everything());
        assert!(!Which { late: true, ..ids }.is_ids_alone());
        assert!(Which::default().is_everything());
    }

    #[test]
    fn an_id_named_twice_is_missed_once() {
        let ids = ["a", "b", "b"].map(|id| TaskId::new(id).unwrap());
        let which = Which { ids: ids.to_vec(), ..Which::default() };
        assert_eq!(
            (which.unmatched_ids(2), which.unmatched_ids(1), which.unmatched_ids(0)),
            (0, 1, 2)
        );
        assert_eq!(
            Which { late: true, ..which }.unmatched_ids(0),
            0,
            "the filter may have left them out"
        );
    }
}
