//! Mistakes in the arguments themselves, explained: clap's words, and a hint where the shell has taken
//! unquoted JSON apart.

use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, ErrorKind};

use garenne_common::config::without_arguments;

use super::error::{CliError, Exit};
use super::output::{Format, print_error};

/// Explains on standard error (help and version go to standard output) and says how to exit.
pub fn usage(error: &clap::Error, arguments: &[OsString]) -> Exit {
    if !error.use_stderr() {
        // Help or version; a reader that has gone away does not miss it.
        return if error.print().is_ok() { Exit::Success } else { Exit::BrokenPipe };
    }
    if format_of(arguments) == Format::Json {
        print_error(&plain(error, arguments), Format::Json);
    } else if let Some(piece) = torn_json(error, arguments) {
        print_error(&torn(&piece), Format::Text);
    } else if holds_login(error, arguments) {
        print_error(&plain(error, arguments), Format::Text);
    } else {
        // Standard error is the last place to complain.
        drop(error.print());
    }
    Exit::Unusable
}

/// What `--output` says, read without clap, which has just failed.
fn format_of(arguments: &[OsString]) -> Format {
    let words: Vec<_> = arguments.iter().filter_map(|word| word.to_str()).collect();
    let json = words.iter().any(|word| ["--output=json", "-ojson", "-o=json"].contains(word))
        || words.windows(2).any(|pair| ["--output", "-o"].contains(&pair[0]) && pair[1] == "json");
    if json { Format::Json } else { Format::Text }
}

/// Whether clap's message repeats what may be the login of a URL.
fn holds_login(error: &clap::Error, arguments: &[OsString]) -> bool {
    let text = error.render().to_string();
    without_arguments(&text, arguments.iter().cloned()) != text
}

/// The first paragraph of clap's message, as one line.
fn plain(error: &clap::Error, arguments: &[OsString]) -> CliError {
    let text = without_arguments(&error.render().to_string(), arguments.iter().cloned());
    let first = text.trim_start_matches("error: ").split("\n\n").next().unwrap_or_default();
    let words: Vec<_> = first.split_whitespace().collect();
    CliError::unusable(words.join(" ")).help("--help lists what is possible")
}

/// The word that clap did not expect, where it looks like a piece of JSON after `submit`.
fn torn_json(error: &clap::Error, arguments: &[OsString]) -> Option<String> {
    let submit = arguments.iter().any(|word| word == "submit");
    let Some(ContextValue::String(piece)) = error.get(ContextKind::InvalidArg) else { return None };
    let json =
        arguments.iter().filter_map(|word| word.to_str()).any(|word| word.starts_with(['{', '[']));
    let torn = submit && json && error.kind() == ErrorKind::UnknownArgument;
    (torn && !piece.starts_with('-')).then(|| piece.clone())
}

fn torn(piece: &str) -> CliError {
    CliError::unusable(format!(
        "the shell has split the JSON: `{piece}` arrived as a word of its own"
    ))
    .help("quote it: garenne submit text.count_words '{\"text\":\"a b\"}'")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Cli;
    use clap::Parser;

    fn words(line: &str) -> Vec<OsString> {
        line.split(' ').map(OsString::from).collect()
    }

    fn error(line: &str) -> (clap::Error, Vec<OsString>) {
        (Cli::try_parse_from(words(line)).unwrap_err(), words(line))
    }

    #[test]
    fn json_that_the_shell_split_is_recognised() {
        let (error_, line) = error("garenne submit a.b {text: hi}");
        assert_eq!(torn_json(&error_, &line), Some("hi}".to_owned()));
        let (error_, line) = error("garenne submit a.b {} --nonsense");
        assert_eq!(torn_json(&error_, &line), None);
    }

    #[test]
    fn clap_s_message_becomes_one_sentence() {
        let (error, line) = error("garenne submit a.b --dellay 5s");
        let plain = plain(&error, &line);
        assert!(plain.message.contains("--dellay"), "{plain:?}");
        assert!(!plain.message.contains('\n'), "{plain:?}");
    }

    #[test]
    fn the_format_is_known_although_parsing_failed() {
        assert_eq!(format_of(&words("garenne x --output json")), Format::Json);
        assert_eq!(format_of(&words("garenne x -o text")), Format::Text);
    }
}
