//! Printing: results as text or JSON, tables that fit the terminal, colours where they are wanted.
//!
//! Only results go to standard output; remarks, logs and errors go to standard error. A closed
//! standard output (`| head`) ends the command without a message. All text passes through here,
//! because names, ids and errors may come from foreign clients.

use std::fmt::Display;
use std::io::{ErrorKind, IsTerminal, Write};

use comfy_table::{
    Attribute, Cell, Color, ColumnConstraint, ContentArrangement, Row, Table, presets,
};
use garenne_common::config::{no_color, without_logins};
use garenne_common::printable::{is_printable, neutral};
use serde::Serialize;
use serde_json::json;

use crate::error::{CliError, Exit};

/// The output format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// For programs.
    Json,
}

/// Writes in the chosen format.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    /// The chosen format.
    pub format: Format,
}

impl Output {
    /// Prints a result: as text, or the value as JSON, indented on a terminal and on one line
    /// otherwise.
    pub fn show(
        self,
        value: &impl Serialize,
        text: impl FnOnce(Paint) -> String,
    ) -> Result<(), CliError> {
        match self.format {
            Format::Text => line(text(Paint::for_stdout())),
            Format::Json if std::io::stdout().is_terminal() => {
                put(&printable_json(serde_json::to_string_pretty(value))?)
            }
            Format::Json => json_line(value),
        }
    }

    /// Prints a remark to standard error, in text format only.
    pub fn remark(self, text: impl Display) {
        if self.format == Format::Text {
            note(text);
        }
    }
}

/// Prints one line to standard output.
pub fn line(text: impl Display) -> Result<(), CliError> {
    put(&harmless(&text.to_string()))
}

fn put(line: &str) -> Result<(), CliError> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).map_err(|error| write_failed(&error))
}

/// Prints a value as one line of JSON to standard output, whatever the format.
pub fn json_line(value: &impl Serialize) -> Result<(), CliError> {
    put(&one_line_json(value)?)
}

fn one_line_json(value: &impl Serialize) -> Result<String, CliError> {
    // Payloads are printed as they were written, which may include line breaks between tokens.
    Ok(printable_json(serde_json::to_string(value))?.replace(['\r', '\n'], " "))
}

/// Escapes the control characters that JSON itself leaves as they are; terminals obey some of them.
fn printable_json(text: serde_json::Result<String>) -> Result<String, CliError> {
    let text = text.map_err(|error| not_json(&error))?;
    let unprintable = |c: char| !is_printable(c) && c != '\n';
    let Some(first) = text.find(unprintable) else { return Ok(text) };
    let (shown, rest) = text.split_at(first);
    let rest = rest.chars().map(|c| match c {
        c if unprintable(c) => format!("\\u{:04x}", u32::from(c)),
        c => c.to_string(),
    });
    Ok(shown.to_owned() + &rest.collect::<String>())
}

/// Prints one line to standard error.
pub fn note(text: impl Display) {
    // If standard error is closed, there is nowhere left to report it.
    drop(writeln!(std::io::stderr(), "{}", harmless(&text.to_string())));
}

/// Makes text harmless for a terminal. Colours are kept, and every other control sequence is
/// escaped. Colours in text of foreign clients are kept too, but end with their line.
pub fn harmless(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for line in text.split_inclusive('\n') {
        let mut parts = line.split("\u{1b}[");
        shown.push_str(&neutral(parts.next().unwrap_or_default()));
        let mut coloured = false;
        for part in parts {
            // A colour: digits and semicolons, then `m`. Conceal and inverse are not among those
            // that are kept.
            let code = part.split_once('m').map(|(code, _)| code).filter(|code| is_colour(code));
            shown.push_str(if code.is_some() { "\u{1b}[" } else { "\\u{1b}[" });
            coloured = code.map_or(coloured, |code| code != "0");
            shown.push_str(&neutral(part));
        }
        if coloured && line.ends_with('\n') {
            shown.insert_str(shown.len() - 1, "\u{1b}[0m");
        }
    }
    shown
}

fn is_colour(code: &str) -> bool {
    let mut numbers = code.split(';').map(|number| number.parse::<u8>().ok());
    let first = numbers.next().flatten();
    // Reset, bold, dim, their end, foregrounds; the rest of an extended foreground may follow.
    let kept = matches!(first, Some(0 | 1 | 2 | 22 | 30..=39 | 90..=97));
    kept && code.len() <= 12 && (first == Some(38) || numbers.all(|n| matches!(n, Some(30..=39))))
}

/// Prints an error to standard error, except [`Exit::BrokenPipe`]: the reader has closed standard
/// output on purpose.
pub fn print_error(error: &CliError, format: Format) {
    if error.exit == Exit::BrokenPipe {
        return;
    }
    let text = match format {
        Format::Text => error_as_text(error, Paint::for_stderr()),
        Format::Json => error_as_json(error),
    };
    // If standard error is closed, there is nowhere left to report it.
    drop(writeln!(std::io::stderr(), "{}", harmless(&without_logins(&text))));
}

fn error_as_text(error: &CliError, paint: Paint) -> String {
    let text = format!("{} {}", paint.red("error:"), error.message);
    match &error.help {
        Some(help) => format!("{text}\n {} {help}", paint.cyan("help:")),
        None => text,
    }
}

fn error_as_json(error: &CliError) -> String {
    let mut value = json!({ "error": error.message, "exit_code": error.exit.code() });
    if let Some(help) = &error.help {
        value["help"] = json!(help);
    }
    value.to_string()
}

fn not_json(error: &serde_json::Error) -> CliError {
    CliError::unusable(format!("the result cannot be written as JSON: {error}"))
}

fn write_failed(error: &std::io::Error) -> CliError {
    let message = format!("cannot write to standard output: {error}");
    if error.kind() == ErrorKind::BrokenPipe {
        CliError::unusable(message).exit(Exit::BrokenPipe)
    } else {
        CliError::unusable(message)
    }
}

/// A table without lines, at most as wide as the terminal; in a pipe as wide as its content. The
/// first column, which contains names or ids that people copy, is never wrapped.
pub fn table<const N: usize>(header: [&str; N], paint: Paint) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Dynamic);
    let title = |title| {
        let cell = Cell::new(title);
        if paint.0 { cell.add_attribute(Attribute::Dim) } else { cell }
    };
    table.set_header(header.map(title));
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    keep_whole(&mut table, 0);
    table
}

/// Exempts another column from wrapping: codes, states.
pub fn keep_whole(table: &mut Table, column: usize) {
    if let Some(column) = table.column_mut(column) {
        column.set_constraint(ColumnConstraint::ContentWidth);
    }
}

/// Renders a table. If the terminal is too narrow for the columns that may be wrapped, each row is
/// printed as a block of lines instead.
pub fn rendered(table: &Table) -> String {
    let widths = table.column_max_content_widths();
    let whole = table.column_iter().map(|column| column.constraint().is_some());
    let needed = widths.iter().zip(whole).map(|(width, whole)| {
        let least = if whole { *width } else { READABLE.min(*width) };
        usize::from(least) + 2
    });
    let needed: usize = needed.sum();
    match table.width() {
        Some(width) if needed > usize::from(width) + 2 => blocks(table),
        _ => table.trim_fmt(),
    }
}

/// Minimum width of a wrapped column, in characters.
const READABLE: u16 = 20;

fn blocks(table: &Table) -> String {
    let titles: Vec<_> =
        table.header().into_iter().flat_map(Row::cell_iter).map(Cell::content).collect();
    let block = |row: &Row| {
        let mut cells = row.cell_iter().zip(&titles).map(|(cell, title)| (title, cell.content()));
        let head = cells.next().map(|(_, head)| head).unwrap_or_default();
        let pairs: Vec<_> = cells
            .filter(|(_, text)| !text.is_empty())
            .map(|(title, text)| (title.to_lowercase(), text))
            .collect();
        let pairs = pairs.iter().map(|(title, text)| (title.as_str(), Some(text.clone())));
        let body = facts(&pairs.collect::<Vec<_>>()).replace('\n', "\n  ");
        format!("{head}\n  {body}")
    };
    table.row_iter().map(block).collect::<Vec<_>>().join("\n")
}

/// A cell of a table, coloured if colours are on.
pub fn cell(text: impl Display, colour: Option<Color>, paint: Paint) -> Cell {
    let cell = Cell::new(neutral(&text.to_string()));
    match colour.filter(|_| paint.0) {
        Some(colour) => cell.fg(colour),
        None => cell,
    }
}

/// Aligned `key  value` lines. Keys without a value are omitted.
pub fn facts(pairs: &[(&str, Option<String>)]) -> String {
    let shown = pairs.iter().filter_map(|(key, value)| Some((key, value.as_ref()?)));
    let width = shown.clone().map(|(key, _)| key.len()).max().unwrap_or(0) + 2;
    let indent = format!("\n{}", " ".repeat(width));
    let lines = shown.map(|(key, value)| format!("{key:width$}{}", value.replace('\n', &indent)));
    lines.collect::<Vec<_>>().join("\n")
}

/// Colours; off if the output is not a terminal or `NO_COLOR` is set.
#[derive(Debug, Clone, Copy)]
pub struct Paint(bool);

impl Paint {
    /// For text on standard output.
    pub fn for_stdout() -> Self {
        Self(std::io::stdout().is_terminal() && !no_color())
    }

    /// For text on standard error.
    pub fn for_stderr() -> Self {
        Self(std::io::stderr().is_terminal() && !no_color())
    }

    /// Without colours.
    pub const fn plain() -> Self {
        Self(false)
    }

    /// Whether colours are on.
    pub const fn is_on(self) -> bool {
        self.0
    }

    /// For errors and failures.
    pub fn red(self, text: &str) -> String {
        self.wrap("1;31", text)
    }

    /// For success.
    pub fn green(self, text: &str) -> String {
        self.wrap("32", text)
    }

    /// For warnings and pending states.
    pub fn yellow(self, text: &str) -> String {
        self.wrap("33", text)
    }

    /// For advice.
    pub fn cyan(self, text: &str) -> String {
        self.wrap("36", text)
    }

    /// For secondary information.
    pub fn dim(self, text: &str) -> String {
        self.wrap("2", text)
    }

    fn wrap(self, code: &str, text: &str) -> String {
        if self.0 { format!("\u{1b}[{code}m{text}\u{1b}[0m") } else { text.to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use garenne_common::broker::BrokerError;

    use super::*;

    #[test]
    fn facts_are_aligned_and_omit_keys_without_a_value() {
        let text = facts(&[
            ("id", Some("7".to_owned())),
            ("reason", None),
            ("error", Some("one\ntwo".to_owned())),
        ]);
        assert_eq!(text, "id     7\nerror  one\n       two");
    }

    #[test]
    fn without_colours_text_is_unchanged() {
        assert_eq!(Paint(false).red("x"), "x");
        assert_eq!(Paint(true).green("x"), "\u{1b}[32mx\u{1b}[0m");
    }

    #[test]
    fn colours_are_kept_and_other_control_sequences_are_escaped() {
        let ours = Paint(true).red("error:") + " " + &Paint(true).dim("x");
        assert_eq!(harmless(&ours), ours);
        let table = cell("\u{1b}[2Jx", Some(Color::Red), Paint(true));
        assert_eq!(table.content(), "\\u{1b}[2Jx");
        for evil in ["\u{1b}[2J", "\u{1b}[8m", "\u{1b}]0;t\u{7}", "\u{9b}31m", "\r", "\u{1b}[1;8m"]
        {
            let shown = harmless(evil);
            assert!(!shown.contains(['\u{1b}', '\u{7}', '\u{9b}', '\r']), "{shown:?}");
        }
        assert_eq!(printable_json(serde_json::to_string("\u{9b}x")).unwrap(), "\"\\u009bx\"");
        assert_eq!(harmless("\u{1b}[31mred\nplain"), "\u{1b}[31mred\u{1b}[0m\nplain");
    }

    #[test]
    fn a_narrow_terminal_gets_blocks_instead_of_columns() {
        let mut table = table(["ID", "TASK AND REASON", "ERROR"], Paint::plain());
        keep_whole(&mut table, 1);
        let id = "0192f0c1-8a5b-7c3d-9e4f-0123456789ab";
        table.add_row([format!("{id}\nnow"), "mail.send\nfatal".to_owned(), "x ".repeat(60)]);
        table.set_width(50);
        let narrow = rendered(&table);
        assert!(
            narrow.starts_with(&format!("{id}\nnow\n  task and reason  mail.send\n")),
            "{narrow}"
        );
        assert!(narrow.contains("\n  error            x x x"), "{narrow}");
        table.set_width(100);
        assert!(rendered(&table).starts_with("ID "), "{}", rendered(&table));
    }

    #[test]
    fn a_table_in_a_pipe_is_not_wrapped() {
        let mut table = table(["NAME", "ERROR"], Paint::plain());
        table.force_no_tty().add_row(["a", &"x".repeat(300)]);
        assert_eq!(table.to_string().lines().count(), 2);
    }

    #[test]
    fn help_is_printed_once_on_a_line_of_its_own() {
        let error = CliError::from(BrokerError::Unreachable {
            url: "amqp://h:1/%2f".to_owned(),
            cause: "Connection refused".to_owned(),
        });
        let text = error_as_text(&error, Paint::plain());
        assert_eq!(text.lines().count(), 2, "{text}");
        assert!(
            text.starts_with(
                "error: cannot reach RabbitMQ at amqp://h:1/%2f: Connection refused\n"
            )
        );
        assert_eq!(text.matches("running").count(), 1, "{text}");
    }

    #[test]
    fn a_value_with_line_breaks_is_one_line_of_json() {
        let raw: Box<serde_json::value::RawValue> =
            serde_json::from_str("{\n\"n\": 1.10}").unwrap();
        assert_eq!(one_line_json(&raw).unwrap(), "{ \"n\": 1.10}");
    }

    #[test]
    fn an_error_in_json_format_is_one_object() {
        let text = error_as_json(&CliError::unusable("no \"x\"").help("do y"));
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value, json!({ "error": "no \"x\"", "help": "do y", "exit_code": 2 }));
    }
}
