//! The tables, and how a file of any earlier version becomes one of this version.
//!
//! `PRAGMA user_version` is the number of steps a file has taken, `PRAGMA application_id` says that it
//! is ours at all. A step that was released is never changed; a change of the schema is a new step.

use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, TransactionBehavior};

use super::StoreError;

/// "Gare" in ASCII; shown by `file`.
const APPLICATION_ID: i32 = 0x4761_7265;
/// How long a statement waits for another process before it fails as busy.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// The steps from an empty file to the present schema.
///
/// Times are milliseconds since 1970. `stored_at` is the collector's clock and what retention goes
/// by: the other times are their senders' word. Deletion follows rowids, which ascend with
/// `stored_at`, so no index is paid for at every insert (docs/decisions/0003).
const STEPS: &[&[&str]] =
    &[&[FIRST], &[RESENDS, LEASES, LETTERS, CANCELS], &[IDENTITY], &[FINGERPRINTS]];

const FIRST: &str = "
CREATE TABLE results (
    id          TEXT    NOT NULL PRIMARY KEY,
    name        TEXT    NOT NULL,
    queue       TEXT    NOT NULL,
    batch       TEXT,
    status      TEXT    NOT NULL,
    bincode     INTEGER NOT NULL, -- whether output is bincode; JSON otherwise
    output      BLOB,
    error       TEXT,
    reason      TEXT,
    attempt     INTEGER NOT NULL,
    redelivered INTEGER NOT NULL,
    worker      TEXT    NOT NULL,
    started_at  INTEGER NOT NULL,
    finished_at INTEGER NOT NULL,
    stored_at   INTEGER NOT NULL,
    repeats     INTEGER NOT NULL DEFAULT 0
) STRICT;
-- For the failures that `batch show` lists; successes, the many, do not pay for it.
CREATE INDEX results_failed ON results (batch) WHERE batch IS NOT NULL AND status <> 'succeeded';

CREATE TABLE attempts (
    task      TEXT    NOT NULL,
    attempt   INTEGER NOT NULL,
    name      TEXT    NOT NULL,
    batch     TEXT,
    error     TEXT    NOT NULL,
    next_at   INTEGER NOT NULL,
    worker    TEXT    NOT NULL,
    at        INTEGER NOT NULL,
    stored_at INTEGER NOT NULL,
    PRIMARY KEY (task, attempt)
) STRICT;

CREATE TABLE batches (
    id            TEXT    NOT NULL PRIMARY KEY,
    state         TEXT    NOT NULL,
    total         INTEGER,
    succeeded     INTEGER NOT NULL,
    failed        INTEGER NOT NULL,
    cancelled     INTEGER NOT NULL,
    opened_at     INTEGER NOT NULL,
    deadline      INTEGER NOT NULL,
    announced     INTEGER NOT NULL,
    sealed_at     INTEGER,
    last_ended_at INTEGER,
    finished_at   INTEGER,
    stored_at     INTEGER NOT NULL -- of the last change
) STRICT;
CREATE INDEX batches_open ON batches (deadline) WHERE state = 'open';
CREATE INDEX batches_over ON batches (stored_at) WHERE state IN ('done', 'abandoned');

CREATE TABLE dead_letters (
    id          TEXT    NOT NULL PRIMARY KEY,
    kind        TEXT,
    queue       TEXT    NOT NULL,
    reason      TEXT    NOT NULL,
    error       TEXT    NOT NULL,
    given_up_by TEXT    NOT NULL,
    started_at  INTEGER,
    at          INTEGER NOT NULL,
    redelivered INTEGER NOT NULL,
    late        INTEGER NOT NULL, -- its task did not fail after all; kept, but not listed
    envelope    TEXT    NOT NULL, -- properties and headers as versioned JSON
    body        BLOB    NOT NULL,
    stored_at   INTEGER NOT NULL
) STRICT;
CREATE INDEX dead_letters_listed ON dead_letters (stored_at) WHERE late = 0;

-- AUTOINCREMENT: a number that was confirmed must not be given to a later notice.
CREATE TABLE outbox (
    seq    INTEGER PRIMARY KEY AUTOINCREMENT,
    notice TEXT    NOT NULL
) STRICT;

-- Counted as we go: COUNT(*) over millions of rows would make every query for totals slow.
CREATE TABLE counters (
    name  TEXT    NOT NULL PRIMARY KEY,
    value INTEGER NOT NULL
) STRICT;
INSERT INTO counters VALUES ('results', 0), ('repeats', 0);
";

/// Tasks that go back to the broker; an outbox as that of notices is.
const RESENDS: &str = "
CREATE TABLE resends (
    seq         INTEGER PRIMARY KEY AUTOINCREMENT,
    exchange    TEXT    NOT NULL,
    routing_key TEXT    NOT NULL,
    envelope    TEXT    NOT NULL, -- properties and headers as versioned JSON
    body        BLOB    NOT NULL
) STRICT;
";

/// Tasks that run under a lease: of the held ones the message, of the others only how they stand.
const LEASES: &str = "
CREATE TABLE leases (
    id        TEXT    NOT NULL PRIMARY KEY,
    fence     INTEGER NOT NULL,
    execution TEXT    NOT NULL,
    state     TEXT    NOT NULL,
    worker    TEXT    NOT NULL,
    queue     TEXT    NOT NULL,
    term      INTEGER NOT NULL, -- milliseconds
    envelope  TEXT    NOT NULL,
    body      BLOB    NOT NULL,
    stored_at INTEGER NOT NULL  -- when it was last heard of, by the collector's clock
) STRICT;
CREATE INDEX leases_held ON leases (stored_at) WHERE state = 'held';
";

/// What people ask of dead letters, each by an index in the order of the list. Dead letters are few
/// beside results, so that their many indexes cost little.
const LETTERS: &str = "
ALTER TABLE dead_letters ADD COLUMN batch TEXT;
ALTER TABLE dead_letters ADD COLUMN replay_of TEXT;
ALTER TABLE dead_letters ADD COLUMN replays INTEGER NOT NULL DEFAULT 0;
ALTER TABLE dead_letters ADD COLUMN replayed_as TEXT; -- the task it became; its own id if it was parked
ALTER TABLE dead_letters ADD COLUMN replayed_at INTEGER;
UPDATE dead_letters SET batch = (
    SELECT json_extract(value, '$[1].text') FROM json_each(envelope, '$.headers')
    WHERE json_extract(value, '$[0]') = 'x-garenne-batch'
);
DROP INDEX dead_letters_listed;
CREATE INDEX dead_letters_dead ON dead_letters (at) WHERE late = 0 AND replayed_as IS NULL;
CREATE INDEX dead_letters_reason ON dead_letters (reason, at)
    WHERE late = 0 AND replayed_as IS NULL;
CREATE INDEX dead_letters_kind ON dead_letters (kind, at) WHERE late = 0 AND replayed_as IS NULL;
CREATE INDEX dead_letters_batch ON dead_letters (batch, at) WHERE late = 0 AND replayed_as IS NULL;
CREATE INDEX dead_letters_late ON dead_letters (at) WHERE late = 1 AND replayed_as IS NULL;
CREATE INDEX dead_letters_replayed ON dead_letters (at) WHERE replayed_as IS NOT NULL;
CREATE INDEX dead_letters_replayed_as ON dead_letters (replayed_as)
    WHERE replayed_as IS NOT NULL;
";

/// Cancel requests, and what waits for a handler.
const CANCELS: &str = "
-- AUTOINCREMENT: workers tell by its number that a cancel request is new.
CREATE TABLE cancels (
    seq       INTEGER PRIMARY KEY AUTOINCREMENT,
    batch     INTEGER NOT NULL, -- whether id is a batch's
    id        TEXT    NOT NULL,
    reason    TEXT    NOT NULL,
    stored_at INTEGER NOT NULL,
    UNIQUE (batch, id)
) STRICT;

CREATE TABLE parked (
    id        TEXT    NOT NULL PRIMARY KEY,
    queue     TEXT    NOT NULL,
    name      TEXT    NOT NULL,
    batch     TEXT,
    releases  INTEGER NOT NULL, -- how often it was sent back to its queue
    waiting   INTEGER NOT NULL, -- whether its letter is here and not on its way
    due       INTEGER NOT NULL, -- not sent back before
    stored_at INTEGER NOT NULL
) STRICT;
CREATE INDEX parked_kinds ON parked (queue, name, due) WHERE waiting = 1;
CREATE INDEX parked_batch ON parked (batch) WHERE waiting = 1 AND batch IS NOT NULL;
INSERT INTO parked SELECT id, queue, kind, batch, 0, 1, 0, stored_at FROM dead_letters
    WHERE reason = 'unknown_task' AND late = 0 AND kind IS NOT NULL;
";

/// Which store this is: a UUID, and when the store was made or first opened by a version that asks.
const IDENTITY: &str = "
CREATE TABLE store (
    id         TEXT    NOT NULL PRIMARY KEY,
    created_at INTEGER NOT NULL
) STRICT;
INSERT INTO store VALUES (
    lower(hex(randomblob(4)) || '-' || hex(randomblob(2)) || '-4' || substr(hex(randomblob(2)), 2)
        || '-8' || substr(hex(randomblob(2)), 2) || '-' || hex(randomblob(6))),
    CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)
);
";

/// Fingerprints of tasks whose ids their senders have chosen, as signed 64-bit numbers.
const FINGERPRINTS: &str = "
ALTER TABLE results ADD COLUMN fingerprint INTEGER;
";

/// Opens a file for writing, makes it if it is missing, and brings it to the present version.
pub(super) fn open(path: &Path) -> Result<Connection, StoreError> {
    let open = || {
        let mut connection = connect(path)?;
        prepare(&mut connection, path)?;
        Ok(connection)
    };
    open().map_err(|error: StoreError| error.opening(path))
}

/// Opens a file that [`open`] has prepared, for reading only.
pub(super) fn open_to_read(path: &Path) -> Result<Connection, StoreError> {
    let open = || {
        let connection = connect(path)?;
        connection.pragma_update(None, "query_only", true)?;
        Ok(connection)
    };
    open().map_err(|error: StoreError| error.opening(path))
}

fn connect(path: &Path) -> Result<Connection, StoreError> {
    let connection = Connection::open(path)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(connection)
}

/// The settings are those of docs/decisions/0003. `synchronous=FULL` is no matter of taste: under
/// NORMAL a power failure may undo commits whose messages are already acknowledged.
fn prepare(connection: &mut Connection, path: &Path) -> Result<(), StoreError> {
    check_ours(connection, path)?;
    let mode: String =
        connection.pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get(0))?;
    if mode != "wal" {
        let cause = format!("its file system cannot hold a write-ahead log (mode {mode})");
        return Err(StoreError::Open { path: path.to_owned(), cause });
    }
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "cache_size", -16_000)?;
    connection.pragma_update(None, "wal_autocheckpoint", 4_000)?;
    connection.pragma_update(None, "journal_size_limit", 64 * 1024 * 1024)?;
    migrate(connection, path)
}

/// Before anything is written: the file may be somebody else's.
fn check_ours(connection: &Connection, path: &Path) -> Result<(), StoreError> {
    // In one statement: another collector may be making the tables at this very moment.
    let (id, tables): (i32, u32) = connection.query_row(
        "SELECT application_id, (SELECT COUNT(*) FROM sqlite_schema) FROM pragma_application_id",
        [],
        |row| Ok((row.get(0)?, row.get(1)?)),
    )?;
    if id != APPLICATION_ID && (id != 0 || tables != 0) {
        return Err(StoreError::NotOurs { path: path.to_owned() });
    }
    Ok(())
}

fn migrate(connection: &mut Connection, path: &Path) -> Result<(), StoreError> {
    // Two collectors may start at once: the second waits here and finds the work done.
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let found: u32 = transaction.pragma_query_value(None, "user_version", |row| row.get(0))?;
    let known = u32::try_from(STEPS.len()).unwrap_or(u32::MAX);
    if found > known {
        return Err(StoreError::Newer { path: path.to_owned(), found, known });
    }
    for part in STEPS.iter().skip(usize::try_from(found).unwrap_or(usize::MAX)).copied().flatten() {
        transaction.execute_batch(part)?;
    }
    transaction.pragma_update(None, "application_id", APPLICATION_ID)?;
    transaction.pragma_update(None, "user_version", known)?;
    Ok(transaction.commit()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(path: &Path) -> String {
        open(path).unwrap_err().to_string()
    }

    #[test]
    fn opening_twice_changes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s.sqlite3");
        open(&path).unwrap();
        let again = open(&path).unwrap();
        let version: u32 = again.pragma_query_value(None, "user_version", |r| r.get(0)).unwrap();
        assert_eq!(version, 4);
    }

    #[test]
    fn a_file_of_an_earlier_version_is_brought_up_and_keeps_what_it_holds() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("old.sqlite3");
        let old = Connection::open(&path).unwrap();
        old.execute_batch(FIRST).unwrap();
        old.execute_batch("UPDATE counters SET value = 7 WHERE name = 'results'").unwrap();
        old.execute_batch(
            "INSERT INTO dead_letters (id, queue, reason, error, given_up_by, at, redelivered, late, \
             envelope, body, stored_at) VALUES ('t', 'q', 'fatal', 'e', 'w', 1, 0, 0, \
             '{\"headers\":[[\"x\",{\"int\":1}],[\"x-garenne-batch\",{\"text\":\"b-1\"}]]}', x'', 1)",
        )
        .unwrap();
        for (id, kind) in [("p", "a.b"), ("strange", "a b")] {
            old.execute(
                "INSERT INTO dead_letters VALUES (?1, ?2, 'q', 'unknown_task', 'e', 'w', NULL, 1, 0, 0, \
                 '{\"headers\":[]}', x'', 1)",
                [id, kind],
            )
            .unwrap();
        }
        old.pragma_update(None, "application_id", APPLICATION_ID).unwrap();
        old.pragma_update(None, "user_version", 1).unwrap();
        drop(old);
        let new = open(&path).unwrap();
        let count = |sql: &str| new.query_row(sql, [], |row| row.get::<_, i64>(0)).unwrap();
        assert_eq!(count("SELECT value FROM counters WHERE name = 'results'"), 7);
        assert_eq!(count("SELECT COUNT(*) FROM resends"), 0);
        assert_eq!(count("SELECT COUNT(*) FROM dead_letters WHERE batch = 'b-1'"), 1);
        let kinds = crate::store::parked::kinds(&new, 9).unwrap();
        let names: Vec<_> = kinds.iter().map(|(_, name)| name.as_str()).collect();
        assert_eq!(names, ["a.b"], "what nobody can serve holds up nothing");
    }

    #[test]
    fn a_file_that_is_not_ours_is_refused_and_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("other.sqlite3");
        Connection::open(&path).unwrap().execute_batch("CREATE TABLE theirs (x)").unwrap();
        let before = std::fs::read(&path).unwrap();
        assert!(refusal(&path).contains("not a Garenne store"), "{}", refusal(&path));
        assert_eq!(std::fs::read(&path).unwrap(), before);
    }

    #[test]
    fn a_newer_file_a_damaged_file_and_a_missing_directory_are_refused_in_one_sentence() {
        let directory = tempfile::tempdir().unwrap();
        let newer = directory.path().join("newer.sqlite3");
        open(&newer).unwrap().pragma_update(None, "user_version", 99).unwrap();
        assert!(refusal(&newer).contains("schema version 99"), "{}", refusal(&newer));

        let garbage = directory.path().join("garbage.sqlite3");
        std::fs::write(&garbage, "no database ".repeat(1_000)).unwrap();
        assert!(refusal(&garbage).contains("not a database"), "{}", refusal(&garbage));

        let nowhere = directory.path().join("missing").join("s.sqlite3");
        assert!(refusal(&nowhere).contains("check that its directory exists"));
    }
}
