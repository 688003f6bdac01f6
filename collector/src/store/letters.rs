//! Dead letters as they are read: filters, pages, whole messages. Nothing here writes.
//!
//! An answer must not keep the others waiting, however many letters there are. So a page follows one
//! index, whose order is the order of the list, tests the rest of the filter row by row, and stops
//! after [`LOOKS`] rows; whoever asked goes on from there.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use garenne_common::wire::{
    DeadCursor, DeadFilter, DeadLetter, DeadPage, DeadSummary, LetterMessage, LetterState,
};
use garenne_common::{BatchId, DeadReason, TaskId, Timestamp};
use rusqlite::types::Value;
use rusqlite::{Connection, OptionalExtension, Row, params, params_from_iter};

use super::ledger::{from_time, maybe_time, parsed, reason, time, to_count};
use super::{DeadQuery, ReplayLinks, StoreError, open_envelope};

/// Rows that one question looks at.
const LOOKS: usize = 20_000;
/// A list shows small bodies only: a thousand large ones would not fit into one answer.
const LISTED_BODY_BYTES: u32 = 4 * 1024;
/// One letter alone may show more; and no body above it is part of a whole message.
pub(super) const SHOWN_BODY_BYTES: u32 = 1024 * 1024;
/// A page ends behind so many bytes.
const PAGE_BYTES: usize = 4 * 1024 * 1024;

/// `?1` is the largest body to read; [`summary`] reads the row.
const COLUMNS: &str = "id, kind, queue, reason, error, given_up_by, at, LENGTH(body), \
     CASE WHEN LENGTH(body) <= ?1 THEN body END, late, started_at, batch, replay_of, replays, \
     replayed_as, replayed_at, envelope";

/// The pile that needs a look; the partial indexes have the same words.
pub(super) const IS_DEAD: &str = "late = 0 AND replayed_as IS NULL";
const IS_LATE: &str = "late = 1 AND replayed_as IS NULL";
const IS_REPLAYED: &str = "replayed_as IS NOT NULL";

pub(super) fn page(connection: &Connection, query: &DeadQuery) -> Result<DeadPage, StoreError> {
    if query.filter.ids.is_empty() {
        Scan::new(connection, query)?.run()
    } else {
        named(connection, query)
    }
}

/// One letter with its message, whatever became of it.
pub(super) fn one(connection: &Connection, id: &TaskId) -> Result<Option<DeadSummary>, StoreError> {
    let sql = format!("SELECT {COLUMNS} FROM dead_letters WHERE id = ?2");
    let mut select = connection.prepare_cached(&sql)?;
    let read = |row: &Row<'_>| summary(row, true);
    let mut letter = select.query_row(params![SHOWN_BODY_BYTES, id.as_str()], read).optional()?;
    if let Some(letter) = &mut letter {
        let text = letter.message.as_ref().and_then(|message| message.body_text.as_deref());
        letter.args = text.and_then(|text| serde_json::from_str(text).ok());
    }
    Ok(letter)
}

/// The task's letter, if it is parked: its name is unknown and nobody has sent it again.
pub(super) fn parked(
    connection: &Connection,
    id: &TaskId,
) -> Result<Option<(DeadSummary, Timestamp)>, StoreError> {
    let sql = format!(
        "SELECT {COLUMNS}, stored_at FROM dead_letters WHERE id = ?2 AND {IS_DEAD} AND reason = ?3"
    );
    let mut select = connection.prepare_cached(&sql)?;
    let unknown = DeadReason::UnknownTask.as_str();
    let parked = select.query_row(params![SHOWN_BODY_BYTES, id.as_str(), unknown], |row| {
        Ok((summary(row, false)?, time(row, 17)?))
    });
    Ok(parked.optional()?)
}

/// A letter as it was when it was given up, and what became of it since.
pub(super) struct Stored {
    pub(super) letter: DeadLetter,
    pub(super) late: bool,
    pub(super) replayed_as: Option<TaskId>,
}

pub(super) fn stored(connection: &Connection, id: &TaskId) -> Result<Option<Stored>, StoreError> {
    let mut select = connection.prepare_cached(
        "SELECT envelope, body, queue, reason, error, given_up_by, started_at, at, redelivered, \
         late, replayed_as FROM dead_letters WHERE id = ?1",
    )?;
    let stored = select.query_row([id.as_str()], |row| {
        let body: Vec<u8> = row.get(1)?;
        let message = parsed(row, 0, |envelope| open_envelope(envelope, body.clone().into()))?;
        let letter = DeadLetter {
            message,
            id: id.clone(),
            queue: row.get(2)?,
            reason: reason(row, 3)?,
            error: row.get(4)?,
            by: row.get(5)?,
            started_at: maybe_time(row, 6)?,
            at: time(row, 7)?,
            redelivered: row.get(8)?,
        };
        Ok(Stored { letter, late: row.get(9)?, replayed_as: maybe_id(row, 10)? })
    });
    Ok(stored.optional()?)
}

/// A piece of a body, in base64.
pub(super) fn body(connection: &Connection, id: &TaskId, from: u64) -> Result<String, StoreError> {
    let mut select = connection
        .prepare_cached("SELECT SUBSTR(body, ?2 + 1, ?3) FROM dead_letters WHERE id = ?1")?;
    let from = i64::try_from(from).unwrap_or(i64::MAX - 1);
    // A multiple of three, so that pieces can be strung together as text too.
    let length = 3 * SHOWN_BODY_BYTES;
    let piece: Option<Vec<u8>> =
        select.query_row(params![id.as_str(), from, length], |row| row.get(0)).optional()?;
    Ok(BASE64.encode(piece.unwrap_or_default()))
}

/// What a task was replayed as, and what it is a replay of.
pub(super) fn links(connection: &Connection, id: &TaskId) -> Result<ReplayLinks, StoreError> {
    let find = |sql: &str| -> Result<Option<TaskId>, StoreError> {
        let mut select = connection.prepare_cached(sql)?;
        Ok(select.query_row([id.as_str()], |row| maybe_id(row, 0)).optional()?.flatten())
    };
    Ok(ReplayLinks {
        replayed_as: find("SELECT replayed_as FROM dead_letters WHERE id = ?1")?
            .filter(|new| new != id),
        replay_of: find(
            "SELECT id FROM dead_letters WHERE replayed_as IS NOT NULL AND replayed_as = ?1 \
             AND id <> ?1",
        )?,
    })
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
            let body = row.get_ref(8)?.as_blob_or_null()?.map_or(0, <[u8]>::len);
            let envelope: Result<usize, rusqlite::Error> = if whole { text(16) } else { Ok(0) };
            Ok((summary(row, whole)?, 500 + text(4)? + envelope? + 2 * body))
        })?;
        self.bytes += bytes;
        self.letters.push(letter);
        self.last = Some(here);
        Ok(())
    }
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

fn state_of(late: bool, replayed: bool) -> LetterState {
    match (replayed, late) {
        (true, _) => LetterState::Replayed,
        (false, true) => LetterState::Late,
        (false, false) => LetterState::Dead,
    }
}

/// A row of [`COLUMNS`].
fn summary(row: &Row<'_>, whole: bool) -> rusqlite::Result<DeadSummary> {
    let body: Option<Vec<u8>> = row.get(8)?;
    let message = if whole {
        Some(Box::new(parsed(row, 16, |envelope| whole_message(envelope, body.clone()))?))
    } else {
        None
    };
    let replayed_as = maybe_id(row, 14)?;
    let batch: Option<String> = row.get(11)?;
    Ok(DeadSummary {
        id: parsed(row, 0, TaskId::new)?,
        name: row.get(1)?,
        queue: row.get(2)?,
        reason: reason(row, 3)?,
        error: row.get(4)?,
        by: row.get(5)?,
        at: time(row, 6)?,
        body_bytes: to_count(row.get(7)?),
        args: body.filter(|_| !whole).and_then(|body| serde_json::from_slice(&body).ok()),
        batch: batch.and_then(|batch| BatchId::new(&batch).ok()),
        state: state_of(row.get(9)?, replayed_as.is_some()),
        started_at: maybe_time(row, 10)?,
        replay_of: maybe_id(row, 12)?,
        replays: row.get(13)?,
        replayed_as,
        replayed_at: maybe_time(row, 15)?,
        message,
    })
}

fn whole_message(
    envelope: &str,
    body: Option<Vec<u8>>,
) -> Result<LetterMessage, super::EnvelopeError> {
    let mut shown = LetterMessage::without_body(&open_envelope(envelope, bytes::Bytes::new())?);
    if let Some(body) = body {
        match String::from_utf8(body) {
            Ok(text) => shown.body_text = Some(text),
            Err(error) => shown.body_base64 = Some(BASE64.encode(error.as_bytes())),
        }
    }
    Ok(shown)
}

fn maybe_id(row: &Row<'_>, column: usize) -> rusqlite::Result<Option<TaskId>> {
    let text: Option<String> = row.get(column)?;
    text.map(|_| parsed(row, column, TaskId::new)).transpose()
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
