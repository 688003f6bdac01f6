//! Checks that the open files are still the ones at the path of the store.
//!
//! A file that is deleted, moved or replaced stays open and takes every commit, which nobody will ever read.
//! SQLite does not notice, so each transaction checks it. The write-ahead log contains the latest commits, and
//! the shared memory coordinates several collectors, so all three files are checked.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::StoreError;

/// The files of an open store, each with its device and inode.
#[derive(Debug, Clone)]
pub(super) struct StoreFiles {
    path: PathBuf,
    files: Vec<(PathBuf, Identity)>,
}

type Identity = (u64, u64);

impl StoreFiles {
    /// Records the files at a path. The store must be open, so that SQLite has created all of them.
    pub(super) fn of(path: &Path) -> Result<Self, StoreError> {
        let gone = || StoreError::Replaced { path: path.to_owned() };
        // SQLite follows links and creates the other files beside the target. The given path is checked too:
        // the next collector follows a link that has been changed.
        let real = fs::canonicalize(path).map_err(|_| gone())?;
        let beside = |suffix: &str| {
            let mut name = OsString::from(&real);
            name.push(suffix);
            PathBuf::from(name)
        };
        let absolute = std::path::absolute(path).map_err(|_| gone())?;
        let files = [absolute, beside("-wal"), beside("-shm")];
        let files = files.into_iter().map(|file| identity(&file).map(|identity| (file, identity)));
        let files = files.collect::<Option<Vec<_>>>().ok_or_else(gone)?;
        Ok(Self { path: path.to_owned(), files })
    }

    /// Fails if one of the files has been replaced or is missing.
    pub(super) fn check(&self) -> Result<(), StoreError> {
        let same = |(file, noted): &(PathBuf, Identity)| identity(file) == Some(*noted);
        if self.files.iter().all(same) {
            return Ok(());
        }
        Err(StoreError::Replaced { path: self.path.clone() })
    }
}

fn identity(file: &Path) -> Option<Identity> {
    fs::metadata(file).ok().map(|found| (found.dev(), found.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deleted_replaced_and_relinked_files_are_detected() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        for name in ["real", "real-wal", "real-shm", "other"] {
            fs::write(at(name), "").unwrap();
        }
        std::os::unix::fs::symlink(at("real"), at("link")).unwrap();
        let place = StoreFiles::of(&at("link")).unwrap();
        assert_eq!(place.check(), Ok(()));
        for name in ["real", "real-wal", "real-shm"] {
            fs::rename(at(name), at("away")).unwrap();
            assert!(place.check().is_err(), "{name} is gone");
            fs::write(at(name), "").unwrap();
            assert!(place.check().is_err(), "{name} is another file");
            fs::rename(at("away"), at(name)).unwrap();
            assert_eq!(place.check(), Ok(()), "{name} is back");
        }
        fs::remove_file(at("link")).unwrap();
        std::os::unix::fs::symlink(at("other"), at("link")).unwrap();
        assert!(place.check().is_err());
    }
}
