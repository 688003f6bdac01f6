//! Dead letters page by page: filters, and the walk along an index that answers them.
//!
//! An answer must not keep the others waiting, however many letters there are. So a page follows one
//! index, whose order is the order of the list, tests the rest of the filter row by row, and stops
//! after [`LOOKS`] rows; whoever asked goes on from there.

use garenne_common::BatchId;
use garenne_common::wire::{DeadCursor, DeadFilter, DeadPage, DeadSummary, LetterState};
use rusqlite::types::Value;
use rusqlite::{Connection, OptionalExtension, Row, params, params_from_iter};

use super::ledger::{from_time, reason, time, to_count};
use super::letters::{COLUMNS, IS_DEAD, SHOWN_BODY_BYTES, state_of, summary};
use super::{DeadQuery, StoreError};

/// Rows that one query reads.
const LOOKS: usize = 20_000;
/// A list shows small bodies only: a thousand large ones would not fit into one answer.
const LISTED_BODY_BYTES: u32 = 4 * 1024;
/// Maximum size of a page, in bytes.
const PAGE_BYTES: usize = 4 * 1024 * 1024;

const IS_LATE: &str = "late = 1 AND replayed_as IS NULL";
const IS_REPLAYED: &str = "replayed_as IS NOT NULL";

pub(super) fn page(connection: &Connection, query: &DeadQuery) -> Result<DeadPage, StoreError> {
    if query.filter.ids.is_empty() {
        Scan::new(connection, query)?.run()
    } else {
        named(connection, query)
    }
}

/// Letters by their ids; whatever became of them, unless the filter asks for one of the other piles.
fn named(connection: &Connection, query: &DeadQuery) -> Result<DeadPage, StoreError> {
    let filter = &query.filter;
    let state = filter.state;
    let mut found = vec![];
    for id in &filter.ids {
        let mut select = connection.prepare_cached(&format!(
            "SELECT {CANDIDATE}, late, replayed_as IS NOT NULL FROM dead_letters WHERE id = ?1"
        ))?;
        let place = select.query_row([id.as_str()], |row| {
            let letter_state = state_of(row.get(7)?, row.get(8)?);
            let wanted = state == LetterState::Dead || state == letter_state;
            Ok((wanted && fits(filter, row)?)
                .then_some((to_count(row.get(1)?), row.get::<_, i64>(0)?)))
        });
        found.extend(place.optional()?.flatten());
    }
    found.sort_unstable_by(|a, b| b.cmp(a));
    found.dedup();
    let total = found.len() as u64;
    let newest = u64::MAX;
    let after = |(at, row): &(u64, i64)| {
        query.from.is_none_or(|from| (*at, to_count(*row)) < (from.at, from.row))
    };
    found.retain(after);
    let mut page = Page::new(query.limit);
    for (at, row) in found {
        if page.is_full() {
            page.next = page.last;
            break;
        }
        page.take(connection, DeadCursor { at, row: to_count(row), newest }, query.whole)?;
    }
    let total = query.count.then_some(total);
    Ok(DeadPage { letters: page.letters, total, more_than_total: false, next: page.next })
}

/// What it takes to tell whether a letter fits; [`fits`] reads the row.
const CANDIDATE: &str = "rowid, at, kind, queue, reason, error, batch";

/// One walk along an index.
struct Scan<'a> {
    connection: &'a Connection,
    query: &'a DeadQuery,
    condition: String,
    values: Vec<Value>,
    index: &'static str,
    /// Whether the index answers the whole filter.
    covered: bool,
    newest: i64,
}

impl<'a> Scan<'a> {
    fn new(connection: &'a Connection, query: &'a DeadQuery) -> Result<Self, StoreError> {
        let filter = &query.filter;
        let newest = match query.from {
            Some(from) => i64::try_from(from.newest).unwrap_or(i64::MAX),
            None => connection
                .query_row("SELECT MAX(rowid) FROM dead_letters", [], |row| row.get(0))
                .map(|newest: Option<i64>| newest.unwrap_or(0))?,
        };
        let exact = filter.name.as_deref().filter(|name| !is_pattern(name));
        let (index, equals, value) = match (filter.state, &filter.batch, exact, &filter.reasons[..])
        {
            (LetterState::Late, ..) => ("dead_letters_late", IS_LATE, None),
            (LetterState::Replayed, ..) => ("dead_letters_replayed", IS_REPLAYED, None),
            (LetterState::Dead, Some(batch), ..) => {
                ("dead_letters_batch", "batch = ?1", Some(batch.to_string()))
            }
            (LetterState::Dead, None, Some(name), _) => {
                ("dead_letters_kind", "kind = ?1", Some(name.to_owned()))
            }
            (LetterState::Dead, None, None, [reason]) => {
                ("dead_letters_reason", "reason = ?1", Some(reason.as_str().to_owned()))
            }
            (LetterState::Dead, None, None, _) => ("dead_letters_dead", IS_DEAD, None),
        };
        let given = [
            filter.batch.is_some(),
            filter.name.is_some(),
            !filter.reasons.is_empty(),
            filter.queue.is_some(),
            filter.error.is_some(),
        ];
        let asked = given.iter().filter(|given| **given).count();
        let covered = asked == usize::from(value.is_some());
        let condition = match value {
            Some(_) => format!("{IS_DEAD} AND {equals}"),
            None => format!("{equals} AND ?1 IS NULL"),
        };
        let values = vec![value.map_or(Value::Null, Value::Text)];
        let mut scan = Self { connection, query, condition, values, index, covered, newest };
        scan.bound_time();
        Ok(scan)
    }

    /// `?2` and `?3` bound the time, `?4` the rows.
    fn bound_time(&mut self) {
        let filter = &self.query.filter;
        let since = filter.since.map_or(i64::MIN, from_time);
        let until = filter.until.map_or(i64::MAX, |until| from_time(until).saturating_sub(1));
        self.condition.push_str(" AND at >= ?2 AND at <= ?3 AND rowid <= ?4");
        self.values.extend([since.into(), until.into(), self.newest.into()]);
    }

    fn run(self) -> Result<DeadPage, StoreError> {
        let counted = if self.query.count && self.covered { Some(self.count()?) } else { None };
        let mut page = Page::new(self.query.limit);
        let (mut matches, mut looks, mut finished) = (0, 0, false);
        let sql = format!(
            "SELECT {CANDIDATE} FROM dead_letters INDEXED BY {} WHERE {} \
             AND (at < ?5 OR rowid < ?6) ORDER BY at DESC, rowid DESC",
            self.index, self.condition
        );
        let signed = |number| i64::try_from(number).unwrap_or(i64::MAX);
        let (at, row) = match self.query.from {
            Some(from) => (signed(from.at), signed(from.row)),
            None => (i64::MAX, i64::MAX),
        };
        let mut values = self.values.clone();
        if let Value::Integer(until) = &mut values[2] {
            // One bound, which the index can start from.
            *until = at.min(*until);
        }
        values.extend([at.into(), row.into()]);
        let mut select = self.connection.prepare_cached(&sql)?;
        let mut rows = select.query(params_from_iter(values))?;
        let keeps_counting = self.query.count && counted.is_none();
        loop {
            let Some(row) = rows.next()? else {
                finished = true;
                break;
            };
            looks += 1;
            let (row_id, at): (i64, i64) = (row.get(0)?, row.get(1)?);
            let here = DeadCursor {
                at: to_count(at),
                row: to_count(row_id),
                newest: to_count(self.newest),
            };
            if fits(&self.query.filter, row)? {
                matches += 1;
                if !page.is_full() {
                    page.take(self.connection, here, self.query.whole)?;
                } else if page.next.is_none() {
                    page.next = page.last;
                }
            }
            if !page.is_full() {
                page.last = Some(here);
            }
            let enough = page.next.is_some() && !keeps_counting;
            if enough || looks >= LOOKS {
                break;
            }
        }
        if !finished && page.next.is_none() {
            page.next = page.last;
        }
        let total = self.query.count.then_some(counted.unwrap_or(matches));
        let more_than_total = self.query.count && counted.is_none() && !finished;
        Ok(DeadPage { letters: page.letters, total, more_than_total, next: page.next })
    }

    fn count(&self) -> Result<u64, StoreError> {
        let sql = format!(
            "SELECT COUNT(*) FROM dead_letters INDEXED BY {} WHERE {}",
            self.index, self.condition
        );
        let mut select = self.connection.prepare_cached(&sql)?;
        let count = select.query_row(params_from_iter(&self.values), |row| row.get(0))?;
        Ok(to_count(count))
    }
}

/// A page while it fills.
struct Page {
    letters: Vec<DeadSummary>,
    limit: usize,
    bytes: usize,
    /// The last row that this page has dealt with.
    last: Option<DeadCursor>,
    next: Option<DeadCursor>,
}

impl Page {
    fn new(limit: usize) -> Self {
        Self { letters: vec![], limit, bytes: 0, last: None, next: None }
    }

    fn is_full(&self) -> bool {
        self.letters.len() >= self.limit || self.bytes >= PAGE_BYTES
    }

    fn take(
        &mut self,
        connection: &Connection,
        here: DeadCursor,
        whole: bool,
    ) -> Result<(), StoreError> {
        let sql = format!("SELECT {COLUMNS} FROM dead_letters WHERE rowid = ?2");
        let mut select = connection.prepare_cached(&sql)?;
        let most = if whole { SHOWN_BODY_BYTES } else { LISTED_BODY_BYTES };
        let row = i64::try_from(here.row).unwrap_or(i64::MAX);
        let (letter, bytes) = select.query_row(params![most, row], |row| {
            let text = |column| row.get_ref(column)?.as_str().map(str::len).map_err(Into::into);
            let body = row.get_ref(8)?.as_blob_or_null()?.map_or(0, room_in_json);
            let envelope: Result<usize, rusqlite::Error> = if whole { text(16) } else { Ok(0) };
            Ok((summary(row, whole)?, 500 + text(4)? + envelope? + body))
        })?;
        self.bytes += bytes;
        self.letters.push(letter);
        self.last = Some(here);
        Ok(())
    }
}

/// How many bytes a body takes as text in JSON, or in base64: a control character becomes six.
fn room_in_json(body: &[u8]) -> usize {
    let room = |byte: &u8| match byte {
        b'"' | b'\\' => 2,
        0..0x20 => 6,
        _ => 1,
    };
    body.iter().map(room).sum::<usize>().max(body.len() * 4 / 3)
}

/// Whether a row of [`CANDIDATE`] passes everything but time and state.
fn fits(filter: &DeadFilter, row: &Row<'_>) -> rusqlite::Result<bool> {
    let is = |column, wanted: Option<&str>| -> rusqlite::Result<bool> {
        let Some(wanted) = wanted else { return Ok(true) };
        Ok(row.get_ref(column)?.as_str_or_null()? == Some(wanted))
    };
    if !is(3, filter.queue.as_deref())? || !is(6, filter.batch.as_ref().map(BatchId::as_str))? {
        return Ok(false);
    }
    if !filter.ids.is_empty() {
        let at = time(row, 1)?;
        if filter.since.is_some_and(|since| at < since)
            || filter.until.is_some_and(|until| at >= until)
        {
            return Ok(false);
        }
    }
    if let Some(pattern) = &filter.name
        && !row.get_ref(2)?.as_str_or_null()?.is_some_and(|name| matches(pattern, name))
    {
        return Ok(false);
    }
    if !filter.reasons.is_empty() && !filter.reasons.contains(&reason(row, 4)?) {
        return Ok(false);
    }
    let Some(wanted) = &filter.error else { return Ok(true) };
    Ok(contains(row.get_ref(5)?.as_str()?, wanted))
}

fn is_pattern(name: &str) -> bool {
    name.contains(['*', '?'])
}

/// `*` is any text, `?` any character. Linear but for the stars, which it tries greedily once each.
fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) =
        (pattern.chars().collect(), name.chars().collect());
    let (mut p, mut n, mut star) = (0, 0, None);
    while n < name.len() {
        if p < pattern.len() && pattern[p] == '*' {
            star = Some((p, n));
            p += 1;
        } else if p < pattern.len() && (pattern[p] == '?' || pattern[p] == name[n]) {
            p += 1;
            n += 1;
        } else if let Some((place, taken)) = star {
            star = Some((place, taken + 1));
            p = place + 1;
            n = taken + 1;
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|c| *c == '*')
}

fn contains(text: &str, wanted: &str) -> bool {
    let (text, wanted) = (text.as_bytes(), wanted.as_bytes());
    wanted.is_empty() || text.windows(wanted.len()).any(|part| part.eq_ignore_ascii_case(wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_as_a_shell_would() {
        for (pattern, name, expected) in [
            ("a.b", "a.b", true),
            ("a.b", "a.bc", false),
            ("a.*", "a.", true),
            ("*.b", "a.b", true),
            ("a*c*e", "abcde", true),
            ("a*c*e", "abcdf", false),
            ("?.b", "é.b", true),
            ("?", "", false),
            ("*", "", true),
            ("**a", "a", true),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn errors_are_searched_whatever_their_case() {
        assert!(contains("Connection REFUSED by x", "refused"));
        assert!(contains("é", "") && !contains("", "x"));
    }
}
