//! One check of `garenne doctor`: its verdict, its detail, what to do, and how it is printed.

use serde::Serialize;

use crate::error::CliError;
use crate::output::Paint;

/// The verdict of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Verdict {
    /// As it should be.
    Good,
    /// It works, but should be looked at.
    Odd,
    /// A problem.
    Bad,
}

/// The result of a check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Check {
    #[serde(rename = "check")]
    pub(super) name: String,
    pub(super) state: Verdict,
    /// What was found.
    pub(super) detail: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) advice: Option<String>,
}

impl Check {
    pub(super) fn new(name: impl Into<String>, state: Verdict, detail: impl Into<String>) -> Self {
        Self { name: name.into(), state, detail: detail.into(), advice: None }
    }

    pub(super) fn good(check: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::new(check, Verdict::Good, detail)
    }

    pub(super) fn bad(check: impl Into<String>, error: CliError) -> Self {
        // Errors of other commands may advise to run this one.
        let advice = error.help.map(|help| match help.split_once("; `garenne doctor`") {
            Some((help, _)) => help.to_owned(),
            None => help,
        });
        Self { advice, ..Self::new(check, Verdict::Bad, error.message) }
    }

    pub(super) fn advice(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }

    pub(super) fn as_text(&self, paint: Paint) -> String {
        let mark = match self.state {
            Verdict::Good => paint.green("✓"),
            Verdict::Odd => paint.yellow("!"),
            Verdict::Bad => paint.red("✗"),
        };
        let line = format!("{mark} {:14} {}", self.name, wrapped(&self.detail, 17));
        match &self.advice {
            Some(advice) => {
                let advice = wrapped(advice, 19);
                format!("{line}\n  {:14} {} {advice}", "", paint.cyan("→"))
            }
            None => line,
        }
    }
}

/// Wraps text between words so that it fits a terminal of 80 columns behind `indent`.
fn wrapped(text: &str, indent: usize) -> String {
    let (mut wrapped, mut column) = (String::new(), indent);
    for word in text.split(' ') {
        let width = word.chars().count();
        if column > indent && column + 1 + width > 80 {
            wrapped.push('\n');
            wrapped.extend(std::iter::repeat_n(' ', indent));
            column = indent;
        } else if column > indent {
            wrapped.push(' ');
            column += 1;
        }
        wrapped.push_str(word);
        column += width;
    }
    wrapped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_fit_eighty_columns() {
        let text = Check::good("results", "word ".repeat(40).trim()).as_text(Paint::plain());
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        assert_eq!(text.lines().nth(1).unwrap().find('w'), Some(17));
    }
}
