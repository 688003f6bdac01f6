//! What can go wrong with a store, in sentences that say what to do.

use std::path::PathBuf;

use rusqlite::ErrorCode;

/// A failure of the store: nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The file cannot be opened or made.
    #[error(
        "cannot open the store {path}: {cause}; check that its directory exists and is writable"
    )]
    Open {
        /// Which file.
        path: PathBuf,
        /// What SQLite says.
        cause: String,
    },
    /// The file is another program's database.
    #[error(
        "{path} is a SQLite database, but not a Garenne store; give another file as collector.store"
    )]
    NotOurs {
        /// Which file.
        path: PathBuf,
    },
    /// The file was written by a later version.
    #[error(
        "the store {path} has schema version {found}, and this collector knows versions up to {known}; \
         run a newer garenne-collector or give another file as collector.store"
    )]
    Newer {
        /// Which file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// Our version.
        known: u32,
    },
    /// The file is damaged, or no database at all.
    #[error(
        "the store is damaged or not a database ({0}); restore a copy or give another file as collector.store"
    )]
    Corrupt(String),
    /// The file system is full.
    #[error("the disk of the store is full; free some space, the collector goes on by itself")]
    Full,
    /// Another process holds the store.
    #[error("the store is locked by another process ({0}); the collector tries again by itself")]
    Busy(String),
    /// The disk failed, or the file is gone or may not be written.
    #[error(
        "the store cannot be read or written ({0}); check the disk and the permissions of the file"
    )]
    Io(String),
    /// The path names another file than the one that is open, or none.
    #[error(
        "the store {path} was deleted, moved or replaced while it was open; nothing is stored or \
         acknowledged until the same file is back, or the collector is restarted"
    )]
    Replaced {
        /// Which file.
        path: PathBuf,
    },
    /// A record does not read as it was written.
    #[error("a record in the store cannot be read ({0})")]
    Unreadable(String),
    /// Anything else that SQLite says.
    #[error("the store failed: {0}")]
    Other(String),
    /// The store's thread has ended.
    #[error("the store was closed by this process")]
    Closed,
}

impl StoreError {
    /// The same failure, said of a file that is being opened.
    pub(super) fn opening(self, path: &std::path::Path) -> Self {
        match self {
            Self::Io(cause) | Self::Other(cause) => Self::Open { path: path.to_owned(), cause },
            Self::Corrupt(cause) => Self::Corrupt(format!("{}: {cause}", path.display())),
            Self::Open { .. }
            | Self::NotOurs { .. }
            | Self::Newer { .. }
            | Self::Full
            | Self::Busy(_)
            | Self::Replaced { .. }
            | Self::Unreadable(_)
            | Self::Closed => self,
        }
    }
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        let text = error.to_string();
        let Some(code) = error.sqlite_error_code() else {
            return Self::Unreadable(text);
        };
        if code == ErrorCode::DiskFull {
            Self::Full
        } else if matches!(code, ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) {
            Self::Busy(text)
        } else if matches!(code, ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) {
            Self::Corrupt(text)
        } else if matches!(
            code,
            ErrorCode::SystemIoFailure
                | ErrorCode::CannotOpen
                | ErrorCode::ReadOnly
                | ErrorCode::PermissionDenied
        ) {
            Self::Io(text)
        } else {
            Self::Other(text)
        }
    }
}
