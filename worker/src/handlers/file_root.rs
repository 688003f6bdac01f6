//! The directory whose files tasks may read (`worker.file_root`). Without one they read no files.
//!
//! The sender of a task chooses the path. A path never leads out of the directory: not by `..`, not by a
//! symbolic link, and not by a link that is created while the file is being opened.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path, PathBuf};

use nix::fcntl::OFlag;

use crate::run::outcome::{TaskError, is_shortage};

/// Opens files for tasks.
#[derive(Debug, Clone, Default)]
pub(crate) struct FileRoot(Option<PathBuf>);

impl FileRoot {
    pub(crate) fn new(root: Option<PathBuf>) -> Self {
        Self(root)
    }

    /// Opens a regular file below the root; relative paths start there. Failures are not retried, except
    /// for lack of resources.
    pub(crate) fn open(&self, path: &str) -> Result<File, TaskError> {
        let fatal = |error| refused(path, &error);
        let Some(root) = &self.0 else {
            return Err(TaskError::fatal(
                "this worker reads no files for tasks; set worker.file_root (or --file-root) to the \
                 directory whose files tasks may read",
            ));
        };
        let outside = || TaskError::fatal(format!("{path}: not below worker.file_root"));
        if Path::new(path).components().any(|part| part == Component::ParentDir) {
            return Err(outside());
        }
        let missing = |error| refused(&format!("worker.file_root {}", root.display()), &error);
        let real_root = root.canonicalize().map_err(missing)?;
        // Joining an absolute path replaces the root.
        let named = root.join(path);
        if !named.starts_with(root) && !named.starts_with(&real_root) {
            return Err(outside());
        }
        let real = named.canonicalize().map_err(fatal)?;
        if !real.starts_with(&real_root) {
            return Err(outside());
        }
        let file = open_without_blocking(&real).map_err(fatal)?;
        if !path_of(&file, &real).map_err(fatal)?.starts_with(&real_root) {
            return Err(outside());
        }
        if !file.metadata().map_err(fatal)?.is_file() {
            return Err(TaskError::fatal(format!("{path}: not a regular file")));
        }
        Ok(file)
    }
}

/// A lack of file descriptors is not the fault of the task.
fn refused(path: &str, error: &std::io::Error) -> TaskError {
    let message = format!("{path}: {error}");
    if is_shortage(error) {
        TaskError::out_of_resources(message)
    } else {
        TaskError::fatal(message)
    }
}

/// Does not block on a pipe, and does not make a terminal the controlling one.
fn open_without_blocking(path: &Path) -> std::io::Result<File> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    File::options().read(true).custom_flags(flags.bits()).open(path)
}

/// The real path of an open file: a directory of the path may have been replaced by a link.
fn path_of(file: &File, opened: &Path) -> std::io::Result<PathBuf> {
    if cfg!(target_os = "linux") {
        std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))
    } else {
        opened.canonicalize()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::fs::symlink;

    fn refusal(root: &FileRoot, path: &str) -> String {
        let error = root.open(path).unwrap_err();
        assert_eq!(error.retryable(), crate::Retryable::Never);
        format!("{error:?}")
    }

    #[test]
    fn only_regular_files_below_the_root_are_opened() {
        let place = tempfile::tempdir().unwrap();
        let (root, outside) = (place.path().join("root"), place.path().join("secret"));
        std::fs::create_dir_all(root.join("deep")).unwrap();
        std::fs::write(&outside, "secret").unwrap();
        std::fs::write(root.join("deep/file"), "text").unwrap();
        symlink(&outside, root.join("leak")).unwrap();
        symlink("..", root.join("up")).unwrap();
        symlink("deep/file", root.join("inside")).unwrap();
        nix::unistd::mkfifo(&root.join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let files = FileRoot::new(Some(root.clone()));
        for path in ["deep/file", "inside", root.join("deep/file").to_str().unwrap()] {
            let mut text = String::new();
            files.open(path).unwrap().read_to_string(&mut text).unwrap();
            assert_eq!(text, "text", "{path}");
        }
        let outside = outside.to_str().unwrap();
        let sibling = format!("{}-2/x", root.display());
        for path in [
            outside,
            "/etc/passwd",
            "../secret",
            "deep/../../secret",
            "leak",
            "up/secret",
            &sibling,
        ] {
            assert!(refusal(&files, path).contains("not below worker.file_root"), "{path}");
        }
        assert!(refusal(&files, "pipe").contains("not a regular file"));
        assert!(refusal(&files, "deep").contains("not a regular file"));
        assert!(refusal(&files, "missing").contains("missing"));
    }

    #[test]
    fn without_a_root_no_file_is_opened() {
        assert!(refusal(&FileRoot::default(), "/etc/hostname").contains("worker.file_root"));
    }
}
