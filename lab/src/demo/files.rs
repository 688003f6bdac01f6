//! Files for part 2, and what the system's own `sha256sum` and `wc` say of them.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use garenne_cli::error::CliError;

/// Trees that most machines have, the interesting ones first.
const CANDIDATES: [&str; 5] = ["/usr/include", "/usr/share/doc", "/usr/share", "/usr/lib", "/usr"];
/// A tree with fewer files is not chosen unless asked for.
const ENOUGH: usize = 2_000;
/// How many files one `sha256sum` or `wc` gets: far below the system's limit for arguments.
const FILES_PER_COMMAND: usize = 500;

/// The files of a tree.
pub(super) struct Tree {
    pub(super) root: PathBuf,
    /// Their paths: UTF-8 without control characters, since a path travels as JSON and is printed by
    /// `sha256sum` line by line.
    pub(super) files: Vec<String>,
    pub(super) bytes: u64,
}

impl Tree {
    /// The tree below `dir`, or the first candidate with enough files; at most `limit` files.
    pub(super) fn choose(dir: Option<&Path>, limit: usize) -> Result<Self, CliError> {
        if let Some(dir) = dir {
            // Workers take absolute paths only as the root of files.
            let dir = &dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
            let tree = Self::read(dir, limit);
            let help = "name a directory with readable files: --dir DIR";
            return if tree.files.is_empty() {
                let problem = format!("{} holds no regular readable file", dir.display());
                Err(CliError::unusable(problem).help(help))
            } else {
                Ok(tree)
            };
        }
        let mut trees = CANDIDATES.iter().map(|dir| Self::read(Path::new(dir), limit));
        let large = trees.find(|tree| tree.files.len() >= ENOUGH.min(limit));
        large.ok_or_else(|| {
            CliError::unusable(format!("no usual directory here holds {ENOUGH} files"))
                .help("name one: --dir DIR")
        })
    }

    fn read(root: &Path, limit: usize) -> Self {
        let mut tree = Self { root: root.to_owned(), files: vec![], bytes: 0 };
        tree.add(root, limit);
        tree
    }

    /// Depth first in the order of names, so that the same machine gives the same files.
    fn add(&mut self, dir: &Path, limit: usize) {
        let Ok(entries) = std::fs::read_dir(dir) else { return };
        let mut paths: Vec<_> = entries.filter_map(Result::ok).collect();
        paths.sort_by_key(std::fs::DirEntry::file_name);
        for entry in paths {
            if self.files.len() >= limit {
                return;
            }
            let Ok(kind) = entry.file_type() else { continue };
            let path = entry.path();
            // Links are left out: they lead elsewhere, or in circles.
            if kind.is_dir() {
                self.add(&path, limit);
            } else if kind.is_file()
                && let Some(text) = path.to_str().filter(|text| !text.chars().any(char::is_control))
                && let Ok(size) = File::open(&path).and_then(|file| file.metadata())
            {
                self.files.push(text.to_owned());
                self.bytes += size.len();
            }
        }
    }
}

/// The digests of these files, in order, by `sha256sum`.
pub(super) fn sha256sum(files: &[String]) -> Result<Vec<String>, CliError> {
    // `--zero` leaves backslashes in names alone.
    let records = command(files, "sha256sum", &["--zero", "--"], '\0')?;
    Ok(records.into_iter().map(|record| record.chars().take(64).collect()).collect())
}

/// How many words these files have, in order, by `wc` in the C locale.
pub(super) fn count_words(files: &[String]) -> Result<Vec<u64>, CliError> {
    let records = command(files, "wc", &["-w", "--"], '\n')?;
    let count = |line: &String| line.split_whitespace().next().and_then(|word| word.parse().ok());
    let unreadable = |line: &String| CliError::unusable(format!("wc printed {line:?}"));
    records.iter().map(|line| count(line).ok_or_else(|| unreadable(line))).collect()
}

/// Whether `wc` and `text.count_words` must agree on a file: only printable ASCII and white space.
///
/// `text.count_words` ends words at ASCII white space alone; `wc` also looks at what is printable in
/// its locale, and versions differ in that.
pub(super) fn is_plain_text(path: &str) -> bool {
    let (mut file, mut buffer) = match File::open(path) {
        Ok(file) => (file, vec![0; 64 * 1024]),
        Err(_) => return false,
    };
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return true,
            Ok(count)
                if buffer[..count].iter().all(|byte| matches!(byte, 0x20..=0x7e | 0x09..=0x0d)) => {
            }
            Ok(_) | Err(_) => return false,
        }
    }
}

/// Runs a program over the files, some hundred at a time, and splits what it prints: one record each.
fn command(
    files: &[String],
    program: &str,
    options: &[&str],
    end: char,
) -> Result<Vec<String>, CliError> {
    let failed =
        |why: String| CliError::unusable(format!("{program} could not check the files: {why}"));
    let mut records = Vec::with_capacity(files.len());
    for chunk in files.chunks(FILES_PER_COMMAND) {
        let mut command = Command::new(program);
        let command = command.args(options).args(chunk).env("LC_ALL", "C").stdin(Stdio::null());
        let output = command.output().map_err(|error| failed(error.to_string()))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(failed(said.lines().next().unwrap_or("it failed").to_owned()));
        }
        let text = String::from_utf8_lossy(&output.stdout);
        let before = records.len();
        // The last record of several files is a total for `wc`, nothing for `sha256sum`.
        records.extend(text.split_terminator(end).take(chunk.len()).map(str::to_owned));
        if records.len() - before != chunk.len() {
            return Err(failed("it printed too little".to_owned()));
        }
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("sub")).unwrap();
        std::fs::write(dir.path().join("a"), "one two\n").unwrap();
        std::fs::write(dir.path().join("sub/b\\c"), "drei f\u{fc}nf").unwrap();
        std::fs::write(dir.path().join("line\nbreak"), "x").unwrap();
        std::os::unix::fs::symlink("a", dir.path().join("link")).unwrap();
        dir
    }

    #[test]
    fn links_and_odd_names_are_left_out() {
        let dir = tree();
        let found = Tree::choose(Some(dir.path()), 10).unwrap();
        let names: Vec<_> =
            found.files.iter().map(|path| &path[path.rfind('/').unwrap()..]).collect();
        assert_eq!(names, ["/a", "/b\\c"]);
        assert_eq!(Tree::choose(Some(dir.path()), 1).unwrap().files.len(), 1);
    }

    #[test]
    fn the_systems_programs_answer_file_by_file() {
        let dir = tree();
        let files = Tree::choose(Some(dir.path()), 10).unwrap().files;
        let digests = sha256sum(&files).unwrap();
        assert!(digests.iter().all(|digest| digest.len() == 64), "{digests:?}");
        assert_eq!(count_words(&files).unwrap()[0], 2);
        assert_eq!(count_words(&files[..1]).unwrap(), [2]);
    }

    #[test]
    fn only_ascii_text_is_plain() {
        let dir = tree();
        let files = Tree::choose(Some(dir.path()), 10).unwrap().files;
        assert!(is_plain_text(&files[0]));
        assert!(!is_plain_text(&files[1]));
    }
}
