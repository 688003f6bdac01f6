//! How far a map is: a bar on a terminal, a line now and then otherwise, nothing for programs.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use garenne_common::{Status, TaskId, TaskResult};
use indicatif::{ProgressBar, ProgressState, ProgressStyle};

use crate::context::Context;
use crate::output::{Format, Output, Paint, note};

/// How often a line is written where no bar can be.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// What has happened so far.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// Tasks confirmed by the broker.
    pub(crate) submitted: u64,
    /// Tasks that succeeded.
    pub(crate) succeeded: u64,
    /// Tasks that were given up or cancelled.
    pub(crate) failed: u64,
    /// Failed attempts that were followed by another one.
    pub(crate) retries: u64,
    /// Tasks between a failed attempt and their end.
    retrying: HashSet<TaskId>,
}

impl Tally {
    /// A task ended.
    pub(crate) fn ended(&mut self, result: &TaskResult) {
        self.retrying.remove(&result.id);
        match result.status {
            Status::Succeeded => self.succeeded += 1,
            Status::Failed | Status::Cancelled => self.failed += 1,
        }
    }

    /// An attempt failed and its task goes on.
    pub(crate) fn retried(&mut self, id: TaskId) {
        self.retries += 1;
        self.retrying.insert(id);
    }

    /// Tasks that ended.
    pub(crate) const fn done(&self) -> u64 {
        self.succeeded + self.failed
    }

    fn trouble(&self) -> String {
        let counts = [(self.failed, "failed"), (self.retrying.len() as u64, "retrying")];
        let counts = counts.iter().filter(|(count, _)| *count > 0);
        counts.map(|(count, what)| format!("  {count} {what}")).collect()
    }
}

/// Shows a [`Tally`] on standard error.
pub(crate) struct Progress {
    bar: ProgressBar,
    output: Output,
    total: Option<u64>,
    started: Instant,
    last_line: Instant,
}

impl Progress {
    /// For so many tasks, if that is known.
    pub(crate) fn new(context: &Context, total: Option<u64>) -> Self {
        // Draws on standard error, and only where that is a terminal.
        let bar = ProgressBar::new(0).with_style(style(total.is_some()));
        bar.set_length(total.unwrap_or(0));
        context.screen.share(&bar);
        let (now, output) = (Instant::now(), context.output);
        Self { bar, output, total, started: now, last_line: now }
    }

    /// The input has ended: the total is known now.
    pub(crate) fn set_total(&mut self, total: u64) {
        if self.total.replace(total) != Some(total) {
            self.bar.set_length(total);
            self.bar.set_style(style(true));
        }
    }

    /// Shows how it stands.
    pub(crate) fn show(&mut self, tally: &Tally) {
        self.bar.set_position(tally.done());
        self.bar.set_message(tally.trouble());
        // A bar that was never drawn would leave a person without any sign.
        if self.bar.is_hidden() && self.last_line.elapsed() >= LINE_EVERY {
            self.last_line = Instant::now();
            let total = self.total.map_or(String::new(), |total| format!(" of {total}"));
            self.output.remark(format_args!("{}{total} done{}", tally.done(), tally.trouble()));
        }
    }

    /// Writes something above the bar.
    pub(crate) fn aside<R>(&self, write: impl FnOnce() -> R) -> R {
        self.bar.suspend(write)
    }

    /// Since the start.
    pub(crate) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Takes the bar away: the summary says it all.
    pub(crate) fn clear(&self) {
        self.bar.finish_and_clear();
    }
}

fn style(total_known: bool) -> ProgressStyle {
    // Not as wide as the terminal: the `^C` that a terminal echoes would go to a line of its own, and
    // the bar could not be taken away any more.
    let template = match (total_known, Paint::for_stderr().is_on()) {
        (true, true) => "{bar:30.green/black.bright} {pos}/{len}{msg:.yellow}  {rate}  ETA {eta}",
        (true, false) => "{bar:30} {pos}/{len}{msg}  {rate}  ETA {eta}",
        (false, _) => "{spinner} {pos} done{msg}  {rate}",
    };
    // The templates are constants, and a test reads them all.
    let style =
        ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    style.progress_chars("━╸─").with_key(
        "rate",
        |state: &ProgressState, to: &mut dyn std::fmt::Write| {
            // Nowhere to complain: a bar without its rate is still a bar.
            write!(to, "{:.0}/s", state.per_sec()).unwrap_or_default();
        },
    )
}

/// The last word of a map on standard error.
pub(crate) fn summary(output: Output, batch: &str, tally: &Tally, took: Duration) {
    let seconds = took.as_secs_f64();
    match output.format {
        Format::Json => {
            let line = serde_json::json!({
                "batch": batch, "submitted": tally.submitted, "succeeded": tally.succeeded,
                "failed": tally.failed, "retries": tally.retries, "seconds": seconds,
            });
            note(line);
        }
        Format::Text => note(summary_text(batch, tally, seconds, Paint::for_stderr())),
    }
}

fn summary_text(batch: &str, tally: &Tally, seconds: f64, paint: Paint) -> String {
    let mut parts = vec![paint.green(&format!("{} succeeded", tally.succeeded))];
    if tally.failed > 0 {
        parts.push(paint.red(&format!("{} failed", tally.failed)));
    }
    let unknown = tally.submitted.saturating_sub(tally.done());
    if unknown > 0 {
        parts.push(format!("{unknown} not ended"));
    }
    if tally.retries > 0 {
        parts.push(format!("{} retries", tally.retries));
    }
    let tasks = if tally.submitted == 1 { "task" } else { "tasks" };
    let batch = paint.dim(&format!("batch {batch}"));
    format!("{} {tasks} in {seconds:.1} s: {}\n{batch}", tally.submitted, parts.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_templates_are_sound() {
        for known in [true, false] {
            let _: ProgressStyle = style(known);
        }
        assert!(
            ProgressStyle::with_template(
                "{bar:30.green/black.bright} {pos}/{len}{msg:.yellow}  {rate}  ETA {eta}"
            )
            .is_ok()
        );
    }

    #[test]
    fn the_summary_leaves_out_what_did_not_happen() {
        let tally = Tally { submitted: 3, succeeded: 3, ..Tally::default() };
        let text = summary_text("b", &tally, 1.24, Paint::plain());
        assert_eq!(text, "3 tasks in 1.2 s: 3 succeeded\nbatch b");
        let tally = Tally { submitted: 9, succeeded: 3, failed: 2, retries: 4, ..Tally::default() };
        let text = summary_text("b", &tally, 1.0, Paint::plain());
        assert_eq!(
            text,
            "9 tasks in 1.0 s: 3 succeeded, 2 failed, 4 not ended, 4 retries\nbatch b"
        );
    }

    #[test]
    fn a_task_that_ends_is_not_retrying_any_more() {
        let mut tally = Tally::default();
        tally.retried(TaskId::new("t").unwrap());
        tally.retried(TaskId::new("t").unwrap());
        assert_eq!((tally.retries, tally.trouble().as_str()), (2, "  1 retrying"));
    }
}
