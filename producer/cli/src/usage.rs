//! Usage errors: clap's message, and advice where the shell has split unquoted JSON into words.
//!
//! Arguments that clap has rejected come in; an error on standard error and an exit code go out.

use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, ErrorKind};

use garenne_common::config::without_arguments;

use crate::error::{CliError, Exit};
use crate::output::{Format, print_error};

/// Prints a usage error to standard error, or help and version to standard output, and returns the
/// exit code.
pub fn usage(error: &clap::Error, arguments: &[OsString]) -> Exit {
    if !error.use_stderr() {
        // Help or version. A closed standard output is not an error worth printing.
        return if error.print().is_ok() { Exit::Success } else { Exit::BrokenPipe };
    }
    if format_of(arguments) == Format::Json {
        print_error(&first_paragraph(error, arguments), Format::Json);
    } else if let Some(piece) = split_json(error, arguments) {
        print_error(&split_json_error(&piece), Format::Text);
    } else if contains_login(error, arguments) {
        print_error(&first_paragraph(error, arguments), Format::Text);
    } else {
        // If standard error is closed, there is nowhere left to report it.
        drop(error.print());
    }
    Exit::Unusable
}

/// The value of `--output`, found without clap, which has just failed.
fn format_of(arguments: &[OsString]) -> Format {
    let words: Vec<_> = arguments.iter().filter_map(|word| word.to_str()).collect();
    let json = words.iter().any(|word| ["--output=json", "-ojson", "-o=json"].contains(word))
        || words.windows(2).any(|pair| ["--output", "-o"].contains(&pair[0]) && pair[1] == "json");
    if json { Format::Json } else { Format::Text }
}

/// Whether clap's message quotes what may be the login of a URL.
fn contains_login(error: &clap::Error, arguments: &[OsString]) -> bool {
    let text = error.render().to_string();
    without_arguments(&text, arguments.iter().cloned()) != text
}

/// The first paragraph of clap's message, as one line without logins.
fn first_paragraph(error: &clap::Error, arguments: &[OsString]) -> CliError {
    let text = without_arguments(&error.render().to_string(), arguments.iter().cloned());
    let first = text.trim_start_matches("error: ").split("\n\n").next().unwrap_or_default();
    let words: Vec<_> = first.split_whitespace().collect();
    CliError::unusable(words.join(" ")).help("--help lists all options")
}

/// The unexpected word, if it looks like a piece of JSON after `submit`.
fn split_json(error: &clap::Error, arguments: &[OsString]) -> Option<String> {
    let submit = arguments.iter().any(|word| word == "submit");
    let Some(ContextValue::String(piece)) = error.get(ContextKind::InvalidArg) else { return None };
    let json =
        arguments.iter().filter_map(|word| word.to_str()).any(|word| word.starts_with(['{', '[']));
    let split = submit && json && error.kind() == ErrorKind::UnknownArgument;
    (split && !piece.starts_with('-')).then(|| piece.clone())
}

fn split_json_error(piece: &str) -> CliError {
    CliError::unusable(format!(
        "the shell has split the JSON: `{piece}` arrived as a separate argument"
    ))
    .help("quote it: garenne submit text.count_words '{\"text\":\"a b\"}'")
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{Arg, Command};

    fn words(line: &str) -> Vec<OsString> {
        line.split(' ').map(OsString::from).collect()
    }

    fn error(line: &str) -> (clap::Error, Vec<OsString>) {
        let submit = Command::new("submit").args([Arg::new("task"), Arg::new("json")]);
        let command = Command::new("garenne").subcommand(submit);
        (command.try_get_matches_from(words(line)).unwrap_err(), words(line))
    }

    #[test]
    fn json_that_the_shell_has_split_is_recognised() {
        let (unexpected, line) = error("garenne submit a.b {text: hi}");
        assert_eq!(split_json(&unexpected, &line), Some("hi}".to_owned()));
        let (unexpected, line) = error("garenne submit a.b {} --nonsense");
        assert_eq!(split_json(&unexpected, &line), None);
    }

    #[test]
    fn the_message_of_clap_becomes_one_sentence() {
        let (error, line) = error("garenne submit a.b --dellay 5s");
        let error = first_paragraph(&error, &line);
        assert!(error.message.contains("--dellay"), "{error:?}");
        assert!(!error.message.contains('\n'), "{error:?}");
    }

    #[test]
    fn the_output_format_is_found_although_parsing_failed() {
        assert_eq!(format_of(&words("garenne x --output json")), Format::Json);
        assert_eq!(format_of(&words("garenne x -o text")), Format::Text);
    }
}
