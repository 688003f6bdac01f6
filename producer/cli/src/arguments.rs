//! The JSON that a task gets: from the command line, a file or standard input.
//!
//! It is checked here and otherwise left as it was written, so that no number loses digits on its way.

use std::io::Read;

use garenne_common::TaskName;
use serde_json::value::RawValue;

use super::error::CliError;

/// How much of broken JSON a message shows.
const SHOWN: usize = 40;

/// Reads `JSON`, `@FILE` or `-`; nothing given means `{}`, which suits a task whose arguments all have
/// defaults.
pub(crate) fn read(task: &TaskName, given: Option<&str>) -> Result<Box<RawValue>, CliError> {
    read_given(given.unwrap_or("{}"), || {
        format!(
            "quote them for the shell: garenne submit {task} '{{\"key\":\"value\"}}'; or - for standard \
             input, @FILE for a file"
        )
    })
}

/// Reads `JSON`, `@FILE` or `-`; `help` says how to write them.
pub(crate) fn read_given(
    given: &str,
    help: impl FnOnce() -> String,
) -> Result<Box<RawValue>, CliError> {
    let text = match given {
        "-" => read_stdin()?,
        text => match text.strip_prefix('@') {
            Some(file) => read_file(file)?,
            None => text.to_owned(),
        },
    };
    check(&text).map_err(|problem| {
        CliError::unusable(format!("the arguments are not JSON: {problem}")).help(help())
    })
}

fn read_stdin() -> Result<String, CliError> {
    let mut text = String::new();
    std::io::stdin()
        .read_to_string(&mut text)
        .map_err(|error| CliError::unusable(format!("cannot read standard input: {error}")))?;
    Ok(text)
}

fn read_file(file: &str) -> Result<String, CliError> {
    std::fs::read_to_string(file)
        .map_err(|error| CliError::unusable(format!("cannot read {file}: {error}")))
}

/// One JSON value, as written; or what is wrong with it, and where.
pub(crate) fn check(text: &str) -> Result<Box<RawValue>, String> {
    // `from_str` on the text itself: the error's position is then a position in what was given.
    serde_json::from_str::<Box<RawValue>>(text).map_err(|error| {
        let what = error.to_string();
        let what = what.split(" at line ").next().unwrap_or_default();
        match near(text, error.line(), error.column()) {
            Some(near) if error.line() > 1 => {
                format!("{what} at line {}, column {}, near {near}", error.line(), error.column())
            }
            Some(near) => format!("{what} at column {}, near {near}", error.column()),
            None => format!("{what} ({} characters were given)", text.chars().count()),
        }
    })
}

/// The text around a position, where there is any.
fn near(text: &str, line: usize, column: usize) -> Option<String> {
    let line = text.lines().nth(line.checked_sub(1)?)?;
    // serde_json counts bytes from 1; a position inside a character moves to its start.
    let mut at = column.saturating_sub(1).min(line.len());
    while !line.is_char_boundary(at) {
        at -= 1;
    }
    let before: String = line[..at].chars().rev().take(SHOWN / 2).collect();
    let before: String = before.chars().rev().collect();
    let after: String = line[at..].chars().take(SHOWN / 2).collect();
    let near = format!("{before}{after}");
    // The text may come from a file with anything in it; a terminal gets no control characters.
    let near: String = near.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    (!near.trim().is_empty()).then(|| format!("`{}`", near.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_stays_as_it_was_written() {
        let text = r#"{"b":1.0000000000000000001, "a":12345678901234567890123}"#;
        assert_eq!(check(text).unwrap().get(), text);
    }

    #[test]
    fn a_mistake_is_shown_with_its_place() {
        let problem = check("{text: \"a b\"}").unwrap_err();
        assert!(problem.contains("column 2"), "{problem}");
        assert!(problem.contains("{text: "), "{problem}");
        let problem = check("{\n  \"a\": 1,\n  \"b\": x\n}").unwrap_err();
        assert!(problem.contains("line 3"), "{problem}");
    }

    #[test]
    fn nothing_and_half_of_it_are_mistakes_too() {
        assert!(check("").unwrap_err().contains("0 characters"));
        assert!(check("{\"a\":").unwrap_err().contains("EOF"));
        assert!(check("{} {}").is_err());
    }

    #[test]
    fn no_text_makes_it_panic_or_reaches_the_terminal_raw() {
        for text in ["é", "{\"é\u{1b}[31m", "\u{0}", "{\"a\":\"\u{7}é\"}", "ééééééé{", "\n\n\n{"]
        {
            let problem = check(text).unwrap_err();
            assert!(!problem.chars().any(char::is_control), "{problem:?}");
        }
    }

    #[test]
    fn the_default_is_an_empty_object() {
        let task = TaskName::new("a.b").unwrap();
        assert_eq!(read(&task, None).unwrap().get(), "{}");
    }
}
