//! Escapes log lines: one event is one line, without control characters.
//!
//! Senders choose task names, error texts and queue names. Every log line passes through here, so
//! call sites need not escape anything. The formatter of tracing-subscriber escapes some control
//! characters, but no line breaks, carriage returns and characters that change the direction of
//! writing.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{self, Write};

use tracing_subscriber::fmt::MakeWriter;

use crate::config::LogFormat;
use crate::printable::is_printable;

/// Makes writers that escape lines.
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

/// A writer that escapes lines. Every write must be a whole line.
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
        // All of it or an error, since a part of an escaped line has no length in the original.
        self.to.write_all(escaped(line, self.format).as_bytes())?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// The line with its unprintable characters escaped, except the last line feed and the colours of
/// the formatter.
fn escaped(line: &[u8], format: LogFormat) -> Cow<'_, str> {
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
            escape(c, format, &mut shown);
        }
    }
    shown.push_str(&line[text.len()..]);
    Cow::Owned(shown)
}

/// Escapes a character. In JSON it is part of a string, where the escape has the same meaning.
fn escape(c: char, format: LogFormat, to: &mut String) {
    match (format, c) {
        (LogFormat::Human, '\n') => to.push_str("\\n"),
        (LogFormat::Human, '\r') => to.push_str("\\r"),
        (LogFormat::Human, c) => to.extend(c.escape_unicode()),
        (LogFormat::Json, c) => {
            // Writing to a string does not fail.
            let written = write!(to, "\\u{:04x}", u32::from(c));
            debug_assert!(written.is_ok());
        }
    }
}

/// Whether the text behind an ESC sets a colour. Only the formatter writes such sequences: it
/// escapes every ESC in fields and messages.
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
        escaped(line.as_bytes(), LogFormat::Human).into_owned()
    }

    #[test]
    fn an_event_is_one_line_without_control_characters() {
        assert_eq!(human("\u{1b}[2mtime\u{1b}[0m été\n"), "\u{1b}[2mtime\u{1b}[0m été\n");
        assert_eq!(human("a\nINFO forged\n"), "a\\nINFO forged\n");
        assert_eq!(human("a\r\u{1b}[2J\u{9b}1m\u{202e}b\n"), "a\\r\\u{1b}[2J\\u{9b}1m\\u{202e}b\n");
    }

    #[test]
    fn json_stays_valid_and_keeps_its_value() {
        let line = serde_json::json!({ "error": "a\u{9b}2J\u{202e}\u{7f}é" }).to_string() + "\n";
        let shown = escaped(line.as_bytes(), LogFormat::Json);
        assert!(shown.trim_end().chars().all(is_printable), "{shown}");
        let (shown, line): (serde_json::Value, serde_json::Value) =
            (serde_json::from_str(&shown).unwrap(), serde_json::from_str(&line).unwrap());
        assert_eq!(shown, line);
    }

    #[test]
    fn the_formatter_escapes_colours_in_fields_and_messages() {
        use parking_lot::Mutex;
        use std::sync::Arc;
        #[derive(Clone, Default)]
        struct Buffer(Arc<Mutex<Vec<u8>>>);
        impl Write for Buffer {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.lock().extend(bytes);
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
        let line = String::from_utf8(buffer.0.lock().clone()).unwrap();
        assert!(!line.contains("\u{1b}[31m") && !line.contains("\u{1b}[8m"), "{line:?}");
        assert_eq!(line.matches('\n').count(), 1, "{line:?}");
    }
}
