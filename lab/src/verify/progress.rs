//! How far a run is: a bar on a terminal, a line a second otherwise, nothing when nobody wants it.

use std::time::{Duration, Instant};

use garenne_cli::context::Context;
use garenne_cli::output::Output;
use indicatif::{ProgressBar, ProgressStyle};

use super::faults::Nemesis;

const LINE_EVERY: Duration = Duration::from_secs(1);

/// Shows a run on standard error.
pub(super) struct Progress {
    bar: Option<ProgressBar>,
    output: Output,
    tasks: u64,
    last_line: Instant,
}

impl Progress {
    pub(super) fn new(context: &Context, tasks: u64, wanted: bool) -> Self {
        let bar = wanted.then(|| {
            let style = ProgressStyle::with_template("{bar:30} {pos}/{len}  {msg}");
            let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
            let bar = ProgressBar::new(tasks).with_style(style.progress_chars("━╸─"));
            context.screen.share(&bar);
            bar
        });
        Self { bar, output: context.output, tasks, last_line: Instant::now() }
    }

    pub(super) fn show(&mut self, ended: u64, confirmed: u64, nemesis: &Nemesis) {
        let Some(bar) = &self.bar else { return };
        if self.last_line.elapsed() < if bar.is_hidden() { LINE_EVERY } else { LINE_EVERY / 10 } {
            return;
        }
        self.last_line = Instant::now();
        let (injected, planned) = nemesis.count();
        let mut state = format!("{injected}/{planned} faults");
        for broken in nemesis.present() {
            state.push_str(", ");
            state.push_str(broken);
        }
        bar.set_position(ended);
        bar.set_message(state.clone());
        if bar.is_hidden() {
            let tasks = self.tasks;
            self.output
                .remark(format_args!("{confirmed} confirmed, {ended} of {tasks} ended, {state}"));
        }
    }

    /// What is done now that the tasks have ended.
    pub(super) fn say(&self, what: &str) {
        let Some(bar) = &self.bar else { return };
        bar.set_message(what.to_owned());
        if bar.is_hidden() {
            self.output.remark(what);
        }
    }

    /// Takes the bar away.
    pub(super) fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
