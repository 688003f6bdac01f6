//! A ledger of effects: a command task that writes a line when it begins, whichever worker runs it.
//!
//! It tells executions, where results only tell outcomes.

use std::fs;

use super::{Warren, root};

/// Configuration of the command task `test.effect` with the argument `millis`, how long it runs.
pub(crate) fn command(warren: &Warren) -> String {
    let program = root().join("tests/foreign/effect.py").display().to_string();
    let ledger = ledger(warren);
    format!(
        "[worker.commands.\"test.effect\"]\n\
         argv = [\"python3\", \"-S\", \"{program}\", \"{ledger}\", \"{{millis}}\"]\n"
    )
}

/// One line `<task id> <attempt>` for each execution, in the order of their beginnings.
pub(crate) fn done(warren: &Warren) -> Vec<String> {
    let text = fs::read_to_string(ledger(warren)).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

fn ledger(warren: &Warren) -> String {
    warren.path("effects").display().to_string()
}
