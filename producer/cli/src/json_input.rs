//! Arguments of a task as JSON: from the command line, a file or standard input.
//!
//! The text is checked and otherwise left as it was written, so that no number loses digits.

use std::io::Read;

use garenne_common::TaskName;
use serde_json::value::RawValue;

use crate::error::CliError;

/// Characters of invalid JSON in an error message.
const SHOWN: usize = 40;

/// Reads `JSON`, `@FILE` or `-`. The default is `{}`, for tasks whose arguments are all optional.
pub(crate) fn read(task: &TaskName, given: Option<&str>) -> Result<Box<RawValue>, CliError> {
    read_given(given.unwrap_or("{}"), || {
        format!(
            "quote them for the shell: garenne submit {task} '{{\"key\":\"value\"}}'; - reads \
             standard input, @FILE a file"
        )
    })
}

/// Reads `JSON`, `@FILE` or `-`; `help` is the advice for text that is not JSON.
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

/// Checks that the text is one JSON value and returns it as written, or what is wrong with it and
/// where.
pub(crate) fn check(text: &str) -> Result<Box<RawValue>, String> {
    // Parsed from the text itself, so that the position in an error is a position in the input.
    serde_json::from_str::<Box<RawValue>>(text).map_err(|error| {
        let what = error.to_string();
        let what = what.split(" at line ").next().unwrap_or_default();
        match near(text, error.line(), error.column()) {
            Some(near) if error.line() > 1 => {
                format!("{what} at line {}, column {}, near {near}", error.line(), error.column())
            }
            Some(near) => format!("{what} at column {}, near {near}", error.column()),
            None => format!("{what} (the input has {} characters)", text.chars().count()),
        }
    })
}

/// The text around a position, if there is any.
fn near(text: &str, line: usize, column: usize) -> Option<String> {
    let line = text.lines().nth(line.checked_sub(1)?)?;
    // serde_json counts bytes from 1. A position inside a character moves to its start.
    let mut at = column.saturating_sub(1).min(line.len());
    while !line.is_char_boundary(at) {
        at -= 1;
    }
    let before: String = line[..at].chars().rev().take(SHOWN / 2).collect();
    let before: String = before.chars().rev().collect();
    let after: String = line[at..].chars().take(SHOWN / 2).collect();
    let near = format!("{before}{after}");
    // The text may contain control characters, which must not reach the terminal.
    let near: String = near.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    (!near.trim().is_empty()).then(|| format!("`{}`", near.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_kept_as_it_was_written() {
        let text = r#"{"b":1.0000000000000000001, "a":12345678901234567890123}"#;
        assert_eq!(check(text).unwrap().get(), text);
    }

    #[test]
    fn an_error_names_the_position_and_quotes_the_text() {
        let problem = check("{text: \"a b\"}").unwrap_err();
        assert!(problem.contains("column 2"), "{problem}");
        assert!(problem.contains("{text: "), "{problem}");
        let problem = check("{\n  \"a\": 1,\n  \"b\": x\n}").unwrap_err();
        assert!(problem.contains("line 3"), "{problem}");
    }

    #[test]
    fn empty_and_incomplete_json_is_refused() {
        assert!(check("").unwrap_err().contains("0 characters"));
        assert!(check("{\"a\":").unwrap_err().contains("EOF"));
        assert!(check("{} {}").is_err());
    }

    #[test]
    fn errors_contain_no_control_characters_of_the_input() {
        for text in ["é", "{\"é\u{1b}[31m", "\u{0}", "{\"a\":\"\u{7}é\"}", "ééééééé{", "\n\n\n{"]
        {
            let problem = check(text).unwrap_err();
            assert!(!problem.chars().any(char::is_control), "{problem:?}");
        }
    }

    #[test]
    fn missing_arguments_are_an_empty_object() {
        let task = TaskName::new("a.b").unwrap();
        assert_eq!(read(&task, None).unwrap().get(), "{}");
    }
}
