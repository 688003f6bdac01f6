//! The input of `garenne map`: lines are read one after the other and never all at once.
//!
//! A file is read twice, the first time only to check it, so that an error in its last line is
//! found before anything is submitted. Standard input can be read only once.

use std::path::{Path, PathBuf};

use garenne_common::wire::MAX_BODY_BYTES;
use serde_json::json;
use serde_json::value::{RawValue, to_raw_value};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};
use tokio::sync::mpsc;

use crate::error::CliError;
use crate::json_input;

/// Receives the lines that [`LineReader::feed`] reads.
pub(crate) type LineReceiver = mpsc::Receiver<Result<NumberedLine, CliError>>;

/// Capacity of the channel of lines: how many are read ahead, and the most that are submitted
/// together.
pub(crate) const AHEAD: usize = 500;

/// Some Windows programs put it at the start of a text file.
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

    /// Checks all lines of a regular file and counts its tasks; `None` for input that can be read
    /// only once. Fails at the first invalid line.
    pub(crate) async fn check(&self, format: &LineFormat) -> Result<Option<u64>, CliError> {
        let Self::File(path) = self else { return Ok(None) };
        let info = tokio::fs::metadata(path).await.map_err(|error| unreadable(path, &error))?;
        if !info.is_file() {
            return Ok(None);
        }
        let mut lines = self.open(format.clone()).await?;
        let mut count = 0;
        while lines.next().await?.is_some() {
            count += 1;
        }
        Ok(Some(count))
    }

    /// Opens the input.
    pub(crate) async fn open(&self, format: LineFormat) -> Result<LineReader, CliError> {
        let (name, reader): (_, Box<dyn AsyncRead + Send + Unpin>) = match self {
            Self::Stdin => ("standard input".to_owned(), Box::new(tokio::io::stdin())),
            Self::File(path) => {
                let file = tokio::fs::File::open(path).await;
                let file = file.map_err(|error| unreadable(path, &error))?;
                (path.display().to_string(), Box::new(file))
            }
        };
        let reader = BufReader::with_capacity(64 * 1024, reader);
        Ok(LineReader { name, format, reader, number: 0 })
    }
}

fn unreadable(path: &Path, error: &std::io::Error) -> CliError {
    CliError::unusable(format!("cannot read {}: {error}", path.display()))
}

/// How a line becomes arguments, and where it ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LineFormat {
    /// With a key the arguments are an object with the line as text under this key; without one the
    /// line is JSON and is the arguments.
    pub(crate) key: Option<String>,
    /// Lines end with a zero byte, as `find -print0` writes them, and may contain anything else.
    pub(crate) null: bool,
}

impl LineFormat {
    fn end(&self) -> u8 {
        if self.null { b'\0' } else { b'\n' }
    }

    /// The arguments of a line; `None` for an empty one.
    ///
    /// Text that is not UTF-8, or hardly intended as it is, is an error and never changed.
    fn parse(&self, line: &[u8]) -> Result<Option<Box<RawValue>>, String> {
        let line = line.strip_suffix(&[self.end()]).unwrap_or(line);
        let text = std::str::from_utf8(line)
            .map_err(|error| format!("is not UTF-8 at byte {}", error.valid_up_to() + 1))?;
        if text.starts_with(BYTE_ORDER_MARK) && !self.null {
            return Err("begins with a byte order mark; remove it".to_owned());
        }
        let Some(key) = &self.key else {
            if text.trim().is_empty() {
                return Ok(None);
            }
            let json = json_input::check(text.trim_end_matches('\r'));
            return json.map(Some).map_err(|problem| format!("is not JSON: {problem}"));
        };
        if text.is_empty() {
            return Ok(None);
        }
        if text.ends_with('\r') && !self.null {
            return Err(
                "ends with a carriage return; convert a file from Windows (`tr -d '\\r'`), \
                        or use --null for text that ends with one"
                    .to_owned(),
            );
        }
        let args = to_raw_value(&json!({ key.as_str(): text }));
        args.map(Some).map_err(|error| error.to_string())
    }
}

/// A line that is a task.
#[derive(Debug)]
pub(crate) struct NumberedLine {
    /// Its number in the input, from 1, including empty lines.
    pub(crate) number: u64,
    /// The task's arguments.
    pub(crate) args: Box<RawValue>,
}

/// Reads lines.
pub(crate) struct LineReader {
    /// The name of the input in error messages.
    name: String,
    format: LineFormat,
    reader: BufReader<Box<dyn AsyncRead + Send + Unpin>>,
    number: u64,
}

impl LineReader {
    /// The next line that is not empty. An error names the line.
    pub(crate) async fn next(&mut self) -> Result<Option<NumberedLine>, CliError> {
        let mut line = vec![];
        loop {
            line.clear();
            // Limited, so that a line without an end does not fill the memory.
            let mut limited = (&mut self.reader).take(MAX_BODY_BYTES as u64 + 2);
            let read = limited.read_until(self.format.end(), &mut line).await;
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
                    self.invalid(&format!("is longer than {most} MiB, the maximum of a task"))
                );
            }
            match self.format.parse(&line) {
                Ok(None) => {}
                Ok(Some(args)) => return Ok(Some(NumberedLine { number: self.number, args })),
                Err(problem) => return Err(self.invalid(&problem)),
            }
        }
    }

    fn invalid(&self, problem: &str) -> CliError {
        let error = CliError::unusable(format!("line {} of {} {problem}", self.number, self.name));
        if self.format.key.is_none() {
            return error.help(
                "each line must be one JSON value; --arg NAME reads lines of plain text instead",
            );
        }
        error
    }

    /// Reads lines into a channel until the end, the first invalid line, or until the receiver is
    /// gone.
    pub(crate) async fn feed(mut self, to: mpsc::Sender<Result<NumberedLine, CliError>>) {
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

    fn lines(format: LineFormat, text: &[u8]) -> LineReader {
        let reader: Box<dyn AsyncRead + Send + Unpin> =
            Box::new(std::io::Cursor::new(text.to_vec()));
        LineReader { name: "test".to_owned(), format, reader: BufReader::new(reader), number: 0 }
    }

    fn json() -> LineFormat {
        LineFormat { key: None, null: false }
    }

    fn text(null: bool) -> LineFormat {
        LineFormat { key: Some("path".to_owned()), null }
    }

    #[test]
    fn a_json_line_is_kept_as_it_was_written() {
        let args = json().parse(b"{\"n\": 1.10}\r\n").unwrap().unwrap();
        assert_eq!(args.get(), "{\"n\": 1.10}");
        assert!(json().parse(b"  \r\n").unwrap().is_none());
    }

    #[test]
    fn a_plain_line_becomes_an_argument_unchanged_or_is_refused() {
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
    async fn lines_that_end_with_a_zero_byte_may_contain_anything_else() {
        let mut lines = lines(text(true), b"a\nb\0c\r\0\xef\xbb\xbfd\0 ");
        let mut names = vec![];
        while let Some(line) = lines.next().await.unwrap() {
            let args: serde_json::Value = serde_json::from_str(line.args.get()).unwrap();
            names.push(args["path"].as_str().unwrap().to_owned());
        }
        assert_eq!(names, ["a\nb", "c\r", "\u{feff}d", " "]);
    }

    #[tokio::test]
    async fn empty_lines_are_skipped_but_counted() {
        let mut lines = lines(json(), b"\n1\n\n2");
        let mut numbers = vec![];
        while let Some(line) = lines.next().await.unwrap() {
            numbers.push((line.number, line.args.get().to_owned()));
        }
        assert_eq!(numbers, [(2, "1".to_owned()), (4, "2".to_owned())]);
    }

    #[tokio::test]
    async fn the_error_of_an_invalid_line_names_it() {
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
