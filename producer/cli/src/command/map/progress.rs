//! The progress of a map: a bar on a terminal, otherwise a line now and then, nothing in JSON
//! format. Only counts and prints; decides nothing.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use garenne_common::{Status, TaskId, TaskResult};
use indicatif::{ProgressBar, ProgressState, ProgressStyle};

use crate::context::Context;
use crate::output::{Format, Output, Paint, note};

/// Interval of progress lines where no bar can be drawn.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Numbers of tasks and retries so far.
#[derive(Debug, Default)]
pub(crate) struct MapCounts {
    /// Tasks confirmed by the broker.
    pub(crate) submitted: u64,
    /// Tasks that succeeded.
    pub(crate) succeeded: u64,
    /// Tasks that failed or were cancelled.
    pub(crate) failed: u64,
    /// Failed attempts that are retried.
    pub(crate) retries: u64,
    /// Tasks that have failed at least once and not ended.
    retrying: HashSet<TaskId>,
}

impl MapCounts {
    /// Counts a task that has ended.
    pub(crate) fn ended(&mut self, result: &TaskResult) {
        self.retrying.remove(&result.id);
        match result.status {
            Status::Succeeded => self.succeeded += 1,
            Status::Failed | Status::Cancelled => self.failed += 1,
        }
    }

    /// Counts a failed attempt that is retried.
    pub(crate) fn retried(&mut self, id: TaskId) {
        self.retries += 1;
        self.retrying.insert(id);
    }

    /// Tasks that have ended.
    pub(crate) const fn done(&self) -> u64 {
        self.succeeded + self.failed
    }

    fn trouble(&self) -> String {
        let counts = [(self.failed, "failed"), (self.retrying.len() as u64, "retrying")];
        let counts = counts.iter().filter(|(count, _)| *count > 0);
        counts.map(|(count, what)| format!("  {count} {what}")).collect()
    }
}

/// Prints [`MapCounts`] to standard error.
pub(crate) struct Progress {
    bar: ProgressBar,
    output: Output,
    total: Option<u64>,
    started: Instant,
    last_line: Instant,
}

impl Progress {
    /// Starts with the number of tasks, if it is known.
    pub(crate) fn new(context: &Context, total: Option<u64>) -> Self {
        // indicatif draws on standard error, and only on a terminal.
        let bar = ProgressBar::new(0).with_style(style(total.is_some()));
        bar.set_length(total.unwrap_or(0));
        context.screen.share(&bar);
        let (now, output) = (Instant::now(), context.output);
        Self { bar, output, total, started: now, last_line: now }
    }

    /// Sets the number of tasks when the input has ended.
    pub(crate) fn set_total(&mut self, total: u64) {
        if self.total.replace(total) != Some(total) {
            self.bar.set_length(total);
            self.bar.set_style(style(true));
        }
    }

    /// Updates the bar, or prints a line if one is due.
    pub(crate) fn show(&mut self, counts: &MapCounts) {
        self.bar.set_position(counts.done());
        self.bar.set_message(counts.trouble());
        // Without a terminal the bar is never drawn.
        if self.bar.is_hidden() && self.last_line.elapsed() >= LINE_EVERY {
            self.last_line = Instant::now();
            let total = self.total.map_or(String::new(), |total| format!(" of {total}"));
            self.output.remark(format_args!("{}{total} done{}", counts.done(), counts.trouble()));
        }
    }

    /// Prints something above the bar.
    pub(crate) fn aside<R>(&self, write: impl FnOnce() -> R) -> R {
        self.bar.suspend(write)
    }

    /// The time since the start.
    pub(crate) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Removes the bar.
    pub(crate) fn clear(&self) {
        self.bar.finish_and_clear();
    }
}

fn style(total_known: bool) -> ProgressStyle {
    // Narrower than the terminal: otherwise the `^C` that the terminal echoes would start a new
    // line, and the bar could not be removed.
    let template = match (total_known, Paint::for_stderr().is_on()) {
        (true, true) => "{bar:30.green/black.bright} {pos}/{len}{msg:.yellow}  {rate}  ETA {eta}",
        (true, false) => "{bar:30} {pos}/{len}{msg}  {rate}  ETA {eta}",
        (false, _) => "{spinner} {pos} done{msg}  {rate}",
    };
    // The templates are constants, and a test checks them.
    let style =
        ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    style.progress_chars("━╸─").with_key(
        "rate",
        |state: &ProgressState, to: &mut dyn std::fmt::Write| {
            // A bar without its rate is still useful.
            write!(to, "{:.0}/s", state.per_sec()).unwrap_or_default();
        },
    )
}

/// Prints the summary of a map to standard error.
pub(crate) fn summary(output: Output, batch: &str, counts: &MapCounts, took: Duration) {
    let seconds = took.as_secs_f64();
    match output.format {
        Format::Json => {
            let line = serde_json::json!({
                "batch": batch, "submitted": counts.submitted, "succeeded": counts.succeeded,
                "failed": counts.failed, "retries": counts.retries, "seconds": seconds,
            });
            note(line);
        }
        Format::Text => note(summary_text(batch, counts, seconds, Paint::for_stderr())),
    }
}

fn summary_text(batch: &str, counts: &MapCounts, seconds: f64, paint: Paint) -> String {
    let mut parts = vec![paint.green(&format!("{} succeeded", counts.succeeded))];
    if counts.failed > 0 {
        parts.push(paint.red(&format!("{} failed", counts.failed)));
    }
    let open = counts.submitted.saturating_sub(counts.done());
    if open > 0 {
        parts.push(format!("{open} not ended"));
    }
    if counts.retries > 0 {
        parts.push(format!("{} retries", counts.retries));
    }
    let tasks = if counts.submitted == 1 { "task" } else { "tasks" };
    let batch = paint.dim(&format!("batch {batch}"));
    format!("{} {tasks} in {seconds:.1} s: {}\n{batch}", counts.submitted, parts.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_templates_are_valid() {
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
    fn the_summary_omits_counts_of_zero() {
        let counts = MapCounts { submitted: 3, succeeded: 3, ..MapCounts::default() };
        let text = summary_text("b", &counts, 1.24, Paint::plain());
        assert_eq!(text, "3 tasks in 1.2 s: 3 succeeded\nbatch b");
        let counts =
            MapCounts { submitted: 9, succeeded: 3, failed: 2, retries: 4, ..MapCounts::default() };
        let text = summary_text("b", &counts, 1.0, Paint::plain());
        assert_eq!(
            text,
            "9 tasks in 1.0 s: 3 succeeded, 2 failed, 4 not ended, 4 retries\nbatch b"
        );
    }

    #[test]
    fn a_task_is_counted_once_as_retrying() {
        let mut counts = MapCounts::default();
        counts.retried(TaskId::new("t").unwrap());
        counts.retried(TaskId::new("t").unwrap());
        assert_eq!((counts.retries, counts.trouble().as_str()), (2, "  1 retrying"));
    }
}
