//! A ledger of effects: command tasks that write a line when they begin, whichever worker runs them.
//!
//! It tells executions, where results only tell outcomes. A held task runs until its test opens the gate,
//! so that a test decides what still runs when something else happens, and no clock does.

use std::fs;
use std::path::PathBuf;

use garenne_common::RetryPolicy;
use garenne_producer::Submission;
use serde_json::{Value, json};

use super::{Warren, root, soon};

/// The name of the task that is held.
pub(crate) const HELD: &str = "test.held";

/// Configuration of the command tasks `test.effect`, which runs for `millis`, and [`HELD`], which runs
/// until its `gate` is open.
pub(crate) fn command(warren: &Warren) -> String {
    let program = root().join("tests/foreign/effect.py").display().to_string();
    let ledger = warren.path("effects").display().to_string();
    let argv = format!("\"python3\", \"-S\", \"{program}\", \"{ledger}\"");
    format!(
        "[worker.commands.\"test.effect\"]\nargv = [{argv}, \"{{millis}}\"]\n\
         [worker.commands.\"{HELD}\"]\nargv = [{argv}, \"hold\", \"{{gate}}\"]\n"
    )
}

/// One line `<task id> <attempt>` for each execution, in the order of their beginnings.
pub(crate) fn done(warren: &Warren) -> Vec<String> {
    let text = fs::read_to_string(warren.path("effects")).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

/// Waits until so many executions have begun, in all.
pub(crate) async fn begun(warren: &Warren, count: usize) {
    let what = format!("{count} executions have begun");
    soon(&what, async || (done(warren).len() >= count).then_some(())).await;
}

/// What holds tasks until the test opens it.
pub(crate) struct Gate(PathBuf);

impl Gate {
    /// A gate that is shut.
    pub(crate) fn shut(warren: &Warren, name: &str) -> Self {
        Self(warren.path(&format!("{name}.gate")))
    }

    /// The arguments of a [`HELD`] task.
    pub(crate) fn args(&self) -> Value {
        json!({ "gate": self.0 })
    }

    /// A task that it holds; a failure of it is final.
    pub(crate) fn task(&self) -> Submission<Value> {
        let task = Submission::dynamic(HELD, self.args()).expect("plain data encodes");
        task.retry_policy(RetryPolicy::NONE)
    }

    /// Lets the execution end that was so many-th to begin, of all in the ledger.
    pub(crate) fn open_for(&self, execution: usize) {
        let gate = format!("{}.{execution}", self.0.display());
        fs::write(gate, "").expect("the test's directory is writable");
    }

    /// Lets all that it holds end, and whatever comes later.
    pub(crate) fn open(&self) {
        fs::write(&self.0, "").expect("the test's directory is writable");
    }
}
