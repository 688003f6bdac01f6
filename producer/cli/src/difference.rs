//! How an object on the broker differs from its declaration, read from the broker's error message.

use serde::Serialize;

/// A difference between a declaration and the object on the broker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Difference {
    /// The argument or property, if the broker names it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) argument: Option<String>,
    /// The actual and the wanted value, as a sentence.
    detail: String,
}

impl Difference {
    /// Parses the broker's `inequivalent arg 'A' for queue 'Q' in vhost 'V': received the value 'W'
    /// of type 'T' but current is none`. Other messages are kept as they are.
    pub(crate) fn read(cause: &str) -> Self {
        let cause = cause.trim_start_matches("PRECONDITION_FAILED - ");
        let parts = cause
            .strip_prefix("inequivalent arg '")
            .and_then(|rest| rest.split_once('\''))
            .and_then(|(argument, rest)| Some((argument, rest.split_once(": received ")?.1)))
            .and_then(|(argument, rest)| Some((argument, rest.split_once(" but current is ")?)));
        match parts {
            Some((argument, (wanted, found))) => Self {
                argument: Some(argument.to_owned()),
                detail: format!("{argument} is {}, wanted is {}", value(found), value(wanted)),
            },
            None => Self { argument: None, detail: cause.to_owned() },
        }
    }
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.detail)
    }
}

/// The `'W'` in `the value 'W' of type 'T'`.
fn value(text: &str) -> &str {
    let text = text.strip_prefix("the value ").unwrap_or(text);
    text.split_once(" of type ").map_or(text, |(value, _)| value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_message_is_kept() {
        let difference = Difference::read("PRECONDITION_FAILED - something new");
        assert_eq!(difference, Difference { argument: None, detail: "something new".to_owned() });
    }
}
