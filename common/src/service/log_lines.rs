//! Log lines as they reach a terminal or a file: one event is one line, and nothing in it is obeyed.
//!
//! Task names, error texts and queue names are chosen by senders. Everything that is logged passes here,
//! so no call site needs to think of it. The formatter of tracing-subscriber escapes some control
//! characters by itself; line breaks, carriage returns and characters that turn the direction of
//! writing it leaves as they are.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{self, Write};

use tracing_subscriber::fmt::MakeWriter;

use crate::config::LogFormat;
use crate::printable::is_printable;

/// Makes writers whose lines are harmless.
pub(crate) struct HarmlessLines<M> {
    writers: M,
    format: LogFormat,
}

impl<M> HarmlessLines<M> {
    pub(crate) fn new(writers: M, format: LogFormat) -> Self {
        Self { writers, format }
    }
}

impl<'w, M: MakeWriter<'w>> MakeWriter<'w> for HarmlessLines<M> {
    type Writer = LogLines<M::Writer>;

    fn make_writer(&'w self) -> Self::Writer {
        LogLines::new(self.writers.make_writer(), self.format)
    }

    fn make_writer_for(&'w self, meta: &tracing::Metadata<'_>) -> Self::Writer {
        LogLines::new(self.writers.make_writer_for(meta), self.format)
    }
}

/// A writer of whole lines that makes each harmless.
pub(crate) struct LogLines<W> {
    to: W,
    format: LogFormat,
}

impl<W: Write> LogLines<W> {
    pub(crate) fn new(to: W, format: LogFormat) -> Self {
        Self { to, format }
    }
}

impl<W: Write> Write for LogLines<W> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        // All of it or an error: half of an escaped line says nothing about how much was taken.
        self.to.write_all(harmless(line, self.format).as_bytes())?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// The line with every character spelled out that does not show as itself, but for its last line break
/// and our own colours.
fn harmless(line: &[u8], format: LogFormat) -> Cow<'_, str> {
    let line = String::from_utf8_lossy(line);
    let text = line.strip_suffix('\n').unwrap_or(&line);
    if text.chars().all(|c| is_printable(c) || c == '\t') {
        return line;
    }
    let mut shown = String::with_capacity(line.len() + 16);
    for (place, c) in text.char_indices() {
        if is_printable(c) || c == '\t' || (c == '\u{1b}' && is_colour(&text[place + 1..])) {
            shown.push(c);
        } else {
            spell_out(c, format, &mut shown);
        }
    }
    shown.push_str(&line[text.len()..]);
    Cow::Owned(shown)
}

/// In JSON such a character can only stand in a string, where this spelling means the same.
fn spell_out(c: char, format: LogFormat, to: &mut String) {
    match (format, c) {
        (LogFormat::Human, '\n') => to.push_str("\\n"),
        (LogFormat::Human, '\r') => to.push_str("\\r"),
        (LogFormat::Human, c) => to.extend(c.escape_unicode()),
        (LogFormat::Json, c) => {
            // Writing into a string does not fail.
            let written = write!(to, "\\u{:04x}", u32::from(c));
            debug_assert!(written.is_ok());
        }
    }
}

/// Whether what follows an ESC sets a colour, as the formatter does; in fields it escapes the ESC.
fn is_colour(rest: &str) -> bool {
    let code = rest.strip_prefix('[').and_then(|rest| rest.split_once('m'));
    code.is_some_and(|(code, _)| {
        code.len() <= 12 && code.bytes().all(|byte| byte.is_ascii_digit() || byte == b';')
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn human(line: &str) -> String {
        harmless(line.as_bytes(), LogFormat::Human).into_owned()
    }

    #[test]
    fn an_event_is_one_line_and_moves_no_cursor() {
        assert_eq!(human("\u{1b}[2mtime\u{1b}[0m été\n"), "\u{1b}[2mtime\u{1b}[0m été\n");
        assert_eq!(human("a\nINFO forged\n"), "a\\nINFO forged\n");
        assert_eq!(human("a\r\u{1b}[2J\u{9b}1m\u{202e}b\n"), "a\\r\\u{1b}[2J\\u{9b}1m\\u{202e}b\n");
    }

    #[test]
    fn json_stays_json_and_means_the_same() {
        let line = serde_json::json!({ "error": "a\u{9b}2J\u{202e}\u{7f}é" }).to_string() + "\n";
        let shown = harmless(line.as_bytes(), LogFormat::Json);
        assert!(shown.trim_end().chars().all(is_printable), "{shown}");
        let (shown, line): (serde_json::Value, serde_json::Value) =
            (serde_json::from_str(&shown).unwrap(), serde_json::from_str(&line).unwrap());
        assert_eq!(shown, line);
    }

    #[test]
    fn the_formatter_itself_escapes_what_begins_a_colour() {
        use std::sync::{Arc, Mutex};
        #[derive(Clone, Default)]
        struct Buffer(Arc<Mutex<Vec<u8>>>);
        impl Write for Buffer {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.lock().unwrap().extend(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let buffer = Buffer::default();
        let writer = buffer.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_ansi(true)
            .with_writer(move || LogLines::new(writer.clone(), LogFormat::Human))
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            tracing::warn!(field = "x\u{1b}[31mred", "y\u{1b}[8mhidden\nforged");
        });
        let line = String::from_utf8(buffer.0.lock().unwrap().clone()).unwrap();
        assert!(!line.contains("\u{1b}[31m") && !line.contains("\u{1b}[8m"), "{line:?}");
        assert_eq!(line.matches('\n').count(), 1, "{line:?}");
    }
}
