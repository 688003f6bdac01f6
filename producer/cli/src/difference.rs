//! How an object on the broker differs from what is wanted, read from the broker's own words.

use serde::Serialize;

/// What differs, as far as the broker says so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Difference {
    /// Which argument or property.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) argument: Option<String>,
    /// What is wanted and what is there, in words.
    detail: String,
}

impl Difference {
    /// Reads the broker's `inequivalent arg 'A' for queue 'Q' in vhost 'V': received the value 'W' of
    /// type 'T' but current is none`; other words are kept as they are.
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

/// `the value 'W' of type 'T'` without the words around it.
fn value(text: &str) -> &str {
    let text = text.strip_prefix("the value ").unwrap_or(text);
    text.split_once(" of type ").map_or(text, |(value, _)| value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_that_are_not_understood_are_kept() {
        let difference = Difference::read("PRECONDITION_FAILED - something new");
        assert_eq!(difference, Difference { argument: None, detail: "something new".to_owned() });
    }
}
