//! Errors of the configuration, which quote no values: any value may be a secret, or a secret may
//! be in the wrong place.

use std::ffi::OsString;
use std::fmt;
use std::path::Path;

use config::ConfigError as Cause;

const NOT_UTF_8: &str = "is not UTF-8; percent-encode what is not in a URL";
const HIDDEN: &str = "…";
/// The login in the URL that help texts show.
const EXAMPLE: &str = "://user:password";
/// The messages whose values are quoted, by their beginnings. Others may contain a value anywhere.
const SERDE: [&str; 5] = [
    "unknown field `",
    "invalid type: ",
    "invalid value: ",
    "invalid length ",
    "unknown variant `",
];

/// An invalid configuration, with every problem.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the configuration cannot be used: {}", problems.join("; "))]
pub struct ConfigError {
    /// One sentence for each problem.
    pub problems: Vec<String>,
}

impl ConfigError {
    fn one(problem: &impl fmt::Display) -> Self {
        Self { problems: vec![problem.to_string()] }
    }
}

/// Describes the problem of a layer, without values.
pub(super) fn sentence(cause: &Cause) -> String {
    let named = |key: &Option<String>, text: String, origin: &Option<String>| {
        let key = key.as_deref().map(|key| format!("{}: ", name(key))).unwrap_or_default();
        let origin = origin.as_deref().map(|origin| format!(" in {origin}")).unwrap_or_default();
        format!("{key}{text}{origin}")
    };
    if let Cause::Type { origin, unexpected, expected, key } = cause {
        return named(key, format!("expected {expected}, found {}", kind(unexpected)), origin);
    }
    if let Cause::At { error, origin, key } = cause {
        return named(key, sentence(error), origin);
    }
    if let Cause::FileParse { uri, cause } = cause {
        return named(uri, not_toml(&cause.to_string()), &None);
    }
    if let Cause::Message(text) = cause {
        let known = SERDE.iter().any(|start| text.starts_with(start));
        return if known { without_values(text) } else { "invalid value".to_owned() };
    }
    "the layers of the configuration cannot be merged".to_owned()
}

impl ConfigError {
    /// The problem of a layer.
    pub(super) fn of(cause: &Cause) -> Self {
        Self::one(&sentence(cause))
    }
}

/// Checks that a file can be read. The error names its path.
pub(super) fn check_file(path: &Path) -> Result<(), ConfigError> {
    let cannot = |error| ConfigError::one(&format!("cannot read {}: {error}", path.display()));
    std::fs::read_to_string(path).map(drop).map_err(cannot)
}

/// The value of a variable as text. The error names the variable.
pub(super) fn text(name: &str, value: OsString) -> Result<String, ConfigError> {
    value.into_string().map_err(|_| ConfigError::one(&format!("{name}: {NOT_UTF_8}")))
}

/// The type that was found, without the value that is quoted behind it.
fn kind(found: &impl fmt::Display) -> String {
    found.to_string().split(['`', '"']).next().unwrap_or_default().trim().to_owned()
}

/// Removes the quoted line from an error of the TOML parser, which consists of the position, the
/// line, and what was expected.
fn not_toml(text: &str) -> String {
    let mut lines = text.lines();
    let place = lines.next().and_then(|first| first.strip_prefix("TOML parse error at "));
    let Some(place) = place else { return "is not valid TOML".to_owned() };
    let expected: Vec<_> = lines.skip(3).map(without_values).collect();
    format!("{place}: not valid TOML: {}", expected.join("; "))
}

/// Removes values from a message of serde: what it quotes before "expected", except for the name of
/// a field.
fn without_values(text: &str) -> String {
    let (found, expected) = match text.find(", expected ") {
        Some(place) => text.split_at(place),
        None => (text, ""),
    };
    if let Some(field) = found.strip_prefix("unknown field `") {
        return format!("unknown field `{}`{expected}", name(field.trim_end_matches('`')));
    }
    // serde escapes strings, so an escaped quotation mark does not end one.
    let (mut shown, mut closing, mut escaped) = (String::new(), None, false);
    for c in found.chars() {
        match closing {
            None => {
                shown.push(c);
                closing = ['"', '`', '\''].contains(&c).then_some(c);
                shown.push_str(if closing.is_some() { HIDDEN } else { "" });
            }
            Some(end) if c == end && !escaped => {
                shown.push(c);
                closing = None;
            }
            Some(_) => escaped = c == '\\' && !escaped,
        }
    }
    shown + expected
}

/// A key, if it looks like one.
fn name(key: &str) -> &str {
    let fine = |c: char| c.is_ascii_alphanumeric() || "_-.[]/".contains(c);
    if key.chars().all(fine) { key } else { "(a key that is not shown)" }
}

/// Hides possible logins in text: in each word everything before the last `@`, if it contains a
/// colon. For messages that repeat user input.
pub fn without_logins(text: &str) -> String {
    let is_end = |c: char| c.is_whitespace() || ['"', '\'', '`', '<', '>', ','].contains(&c);
    let hide = |word: &str| match word.rsplit_once('@') {
        Some((login, rest)) if login.contains(':') && !login.ends_with(EXAMPLE) => {
            let scheme = login.find("://").map(|place| &login[..place + 3]).unwrap_or_default();
            format!("{scheme}{HIDDEN}@{rest}")
        }
        Some(_) | None => word.to_owned(),
    };
    text.split_inclusive(is_end)
        .map(|piece| match piece.char_indices().next_back() {
            Some((place, c)) if is_end(c) => format!("{}{c}", hide(&piece[..place])),
            Some(_) | None => hide(piece),
        })
        .collect()
}

/// Hides possible logins in the message of a parser of command-line arguments.
pub fn without_arguments(text: &str, arguments: impl IntoIterator<Item = OsString>) -> String {
    let mut text = text.to_owned();
    for argument in arguments {
        let argument = argument.to_string_lossy().into_owned();
        if argument.contains('@') && argument.contains(':') {
            let value = argument.split_once('=').map_or(&*argument, |(_, value)| value);
            text = text.replace(&argument, HIDDEN).replace(value, HIDDEN);
        }
    }
    without_logins(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_keep_names_and_hide_values() {
        for (text, shown) in [
            (
                "unknown field `concurency`, expected `concurrency`",
                "unknown field `concurency`, expected `concurrency`",
            ),
            (
                "unknown field `a://b:c@d`, expected `concurrency`",
                "unknown field `(a key that is not shown)`, expected `concurrency`",
            ),
            ("unknown variant `pw`, expected `human`", "unknown variant `…`, expected `human`"),
            (
                r#"invalid value: string "a \" pw", expected a duration"#,
                r#"invalid value: string "…", expected a duration"#,
            ),
        ] {
            assert_eq!(without_values(text), shown);
        }
    }

    #[test]
    fn logins_are_hidden_in_any_text() {
        for (text, shown) in [
            ("argument 'amqp://me:p@ss@host/v' found", "argument 'amqp://…@host/v' found"),
            ("me:pw@host", "…@host"),
            ("try amqp://user:password@host", "try amqp://user:password@host"),
            ("amqp//me:pw@host, amqp://host", "…@host, amqp://host"),
            ("mail me@host at 12:30", "mail me@host at 12:30"),
        ] {
            assert_eq!(without_logins(text), shown);
        }
        let arguments = ["--url=amqp://me:a b@host", "x"].map(OsString::from);
        let text = "unexpected 'amqp://me:a b@host'";
        assert_eq!(without_arguments(text, arguments), "unexpected '…'");
    }
}
