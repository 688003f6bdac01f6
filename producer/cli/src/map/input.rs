//! The lines that become tasks: read one after the other, never all at once.
//!
//! A file is read twice, the first time only to check it, so that a mistake in its last line is found
//! before anything is submitted. Standard input passes once.

use std::path::{Path, PathBuf};

use garenne_common::wire::MAX_BODY_BYTES;
use serde_json::json;
use serde_json::value::{RawValue, to_raw_value};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};
use tokio::sync::mpsc;

use crate::arguments;
use crate::error::CliError;

/// What arrives from [`Lines::feed`].
pub(crate) type Receiver = mpsc::Receiver<Result<Line, CliError>>;

/// How many lines may be read ahead: the capacity of its channel, and so the most that are submitted
/// together.
pub(crate) const AHEAD: usize = 500;

/// What programs of Windows put before text.
const BYTE_ORDER_MARK: char = '\u{feff}';

/// Where lines come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Source {
    Stdin,
    File(PathBuf),
}

impl Source {
    /// No file or `-` is standard input.
    pub(crate) fn new(file: Option<PathBuf>) -> Self {
        match file {
            Some(file) if file != Path::new("-") => Self::File(file),
            Some(_) | None => Self::Stdin,
        }
    }

    /// Checks a file that can be read twice and counts its tasks; `None` for what can be read once only.
    pub(crate) async fn check(&self, shape: &Shape) -> Result<Option<u64>, CliError> {
        let Self::File(path) = self else { return Ok(None) };
        let info = tokio::fs::metadata(path).await.map_err(|error| unreadable(path, &error))?;
        if !info.is_file() {
            return Ok(None);
        }
        let mut lines = self.open(shape.clone()).await?;
        let mut count = 0;
        while lines.next().await?.is_some() {
            count += 1;
        }
        Ok(Some(count))
    }

    /// Starts reading.
    pub(crate) async fn open(&self, shape: Shape) -> Result<Lines, CliError> {
        let (name, reader): (_, Box<dyn AsyncRead + Send + Unpin>) = match self {
            Self::Stdin => ("standard input".to_owned(), Box::new(tokio::io::stdin())),
            Self::File(path) => {
                let file = tokio::fs::File::open(path).await;
                let file = file.map_err(|error| unreadable(path, &error))?;
                (path.display().to_string(), Box::new(file))
            }
        };
        Ok(Lines { name, shape, reader: BufReader::with_capacity(64 * 1024, reader), number: 0 })
    }
}

fn unreadable(path: &Path, error: &std::io::Error) -> CliError {
    CliError::unusable(format!("cannot read {}: {error}", path.display()))
}

/// What a line is, and where it ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Shape {
    /// The arguments are an object with the line as text under this key; without, the line is the
    /// arguments as JSON.
    pub(crate) key: Option<String>,
    /// A line ends with a zero byte, as `find -print0` writes them, and may hold anything else.
    pub(crate) null: bool,
}

impl Shape {
    fn end(&self) -> u8 {
        if self.null { b'\0' } else { b'\n' }
    }

    /// The arguments that a line means; `None` for an empty one.
    ///
    /// What is not text, or hardly meant as it stands, is refused and never altered.
    fn parse(&self, line: &[u8]) -> Result<Option<Box<RawValue>>, String> {
        let line = line.strip_suffix(&[self.end()]).unwrap_or(line);
        let text = std::str::from_utf8(line)
            .map_err(|error| format!("is not UTF-8 at byte {}", error.valid_up_to() + 1))?;
        if text.starts_with(BYTE_ORDER_MARK) && !self.null {
            return Err(
                "begins with a byte order mark, which is no part of it; remove it".to_owned()
            );
        }
        let Some(key) = &self.key else {
            if text.trim().is_empty() {
                return Ok(None);
            }
            let json = arguments::check(text.trim_end_matches('\r'));
            return json.map(Some).map_err(|problem| format!("is not JSON: {problem}"));
        };
        if text.is_empty() {
            return Ok(None);
        }
        if text.ends_with('\r') && !self.null {
            return Err(
                "ends with a carriage return; convert a file from Windows (`tr -d '\\r'`), \
                        or use --null for names that end so"
                    .to_owned(),
            );
        }
        let args = to_raw_value(&json!({ key.as_str(): text }));
        args.map(Some).map_err(|error| error.to_string())
    }
}

/// One line that is a task.
#[derive(Debug)]
pub(crate) struct Line {
    /// Its number in the input, from 1, empty lines counted.
    pub(crate) number: u64,
    /// The task's arguments.
    pub(crate) args: Box<RawValue>,
}

/// Reads lines.
pub(crate) struct Lines {
    name: String,
    shape: Shape,
    reader: BufReader<Box<dyn AsyncRead + Send + Unpin>>,
    number: u64,
}

impl Lines {
    /// The next line that is not blank; an error names the line.
    pub(crate) async fn next(&mut self) -> Result<Option<Line>, CliError> {
        let mut line = vec![];
        loop {
            line.clear();
            // A line without an end must not fill the memory.
            let mut limited = (&mut self.reader).take(MAX_BODY_BYTES as u64 + 2);
            let read = limited.read_until(self.shape.end(), &mut line).await;
            let read = read.map_err(|error| {
                CliError::unusable(format!("cannot read {}: {error}", self.name))
            })?;
            if read == 0 {
                return Ok(None);
            }
            self.number += 1;
            if line.len() > MAX_BODY_BYTES + 1 {
                let most = MAX_BODY_BYTES / (1024 * 1024);
                return Err(
                    self.bad(&format!("is longer than {most} MiB, the most a task may have"))
                );
            }
            match self.shape.parse(&line) {
                Ok(None) => {}
                Ok(Some(args)) => return Ok(Some(Line { number: self.number, args })),
                Err(problem) => return Err(self.bad(&problem)),
            }
        }
    }

    fn bad(&self, problem: &str) -> CliError {
        let error = CliError::unusable(format!("line {} of {} {problem}", self.number, self.name));
        if self.shape.key.is_none() {
            return error.help(
                "each line must be one JSON value; --arg NAME takes lines of plain text instead",
            );
        }
        error
    }

    /// Reads into a channel until the end, the first bad line, or until nobody listens.
    pub(crate) async fn feed(mut self, to: mpsc::Sender<Result<Line, CliError>>) {
        loop {
            let (item, last) = match self.next().await {
                Ok(Some(line)) => (Ok(line), false),
                Ok(None) => return,
                Err(error) => (Err(error), true),
            };
            if to.send(item).await.is_err() || last {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(shape: Shape, text: &[u8]) -> Lines {
        let reader: Box<dyn AsyncRead + Send + Unpin> =
            Box::new(std::io::Cursor::new(text.to_vec()));
        Lines { name: "test".to_owned(), shape, reader: BufReader::new(reader), number: 0 }
    }

    fn json() -> Shape {
        Shape { key: None, null: false }
    }

    fn text(null: bool) -> Shape {
        Shape { key: Some("path".to_owned()), null }
    }

    #[test]
    fn a_json_line_stays_as_it_was_written() {
        let args = json().parse(b"{\"n\": 1.10}\r\n").unwrap().unwrap();
        assert_eq!(args.get(), "{\"n\": 1.10}");
        assert!(json().parse(b"  \r\n").unwrap().is_none());
    }

    #[test]
    fn a_plain_line_becomes_an_argument_or_is_refused_and_never_changed() {
        let args =
            |line: &[u8]| text(false).parse(line).map(|args| args.map(|a| a.get().to_owned()));
        let path = |path: &str| Ok(Some(json!({ "path": path }).to_string()));
        assert_eq!(args(b"a \"b\"\t{\n"), path("a \"b\"\t{"));
        assert_eq!(args(b"  \n"), path("  "), "a name may be blank");
        assert_eq!(args(b" a \n"), path(" a "));
        assert_eq!(args(b"\n"), Ok(None));
        assert!(args(b"\xff\n").unwrap_err().contains("byte 1"));
        assert!(args(b"a\r\n").unwrap_err().contains("carriage return"));
        assert!(args("\u{feff}a\n".as_bytes()).unwrap_err().contains("byte order mark"));
        assert!(json().parse("\u{feff}1\n".as_bytes()).unwrap_err().contains("byte order mark"));
    }

    #[tokio::test]
    async fn a_zero_byte_ends_a_name_that_may_hold_anything_else() {
        let mut lines = lines(text(true), b"a\nb\0c\r\0\xef\xbb\xbfd\0 ");
        let mut names = vec![];
        while let Some(line) = lines.next().await.unwrap() {
            let args: serde_json::Value = serde_json::from_str(line.args.get()).unwrap();
            names.push(args["path"].as_str().unwrap().to_owned());
        }
        assert_eq!(names, ["a\nb", "c\r", "\u{feff}d", " "]);
    }

    #[tokio::test]
    async fn blank_lines_are_skipped_and_counted() {
        let mut lines = lines(json(), b"\n1\n\n2");
        let mut numbers = vec![];
        while let Some(line) = lines.next().await.unwrap() {
            numbers.push((line.number, line.args.get().to_owned()));
        }
        assert_eq!(numbers, [(2, "1".to_owned()), (4, "2".to_owned())]);
    }

    #[tokio::test]
    async fn a_bad_line_is_named() {
        let mut lines = lines(json(), b"1\n\n{oops}\n");
        lines.next().await.unwrap();
        let error = lines.next().await.unwrap_err();
        assert!(error.message.starts_with("line 3 of test is not JSON: "), "{error:?}");
        assert!(error.help.unwrap().contains("--arg"));
    }

    #[tokio::test]
    async fn a_line_without_an_end_is_refused() {
        let mut lines = lines(text(false), &vec![b'a'; MAX_BODY_BYTES + 10]);
        assert!(lines.next().await.unwrap_err().message.contains("16 MiB"));
    }
}
