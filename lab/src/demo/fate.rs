//! What befalls the nodes during part 2, and the line that shows how far the job is meanwhile.

use std::time::Duration;

use garenne_cli::error::CliError;
use garenne_cli::output::{self, Format};
use garenne_common::BatchId;
use garenne_common::wire::BatchState;
use garenne_producer::Producer;
use indicatif::{HumanCount, ProgressBar, ProgressState, ProgressStyle};
use tokio::time::sleep;

use super::node_name;
use crate::cluster::{Cluster, WorkerSpec};

/// How often the collector is asked how far the job is.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// What befalls the nodes, and at how many percent of the job. Killed: SIGKILL, so the node says
/// nothing to anybody. Restarted: SIGTERM, so it hands back what it has not begun.
const FATES: [(u64, usize, Fate); 3] =
    [(35, 2, Fate::Killed), (50, 3, Fate::Restarted), (65, 2, Fate::StartedAgain)];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    Killed,
    Restarted,
    StartedAgain,
}

impl Fate {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Killed => "killed (SIGKILL)",
            Self::Restarted => "restarted (SIGTERM)",
            Self::StartedAgain => "started again",
        }
    }
}

/// Follows the batch and lets the nodes meet their fates, until it is done.
pub(super) async fn watch(
    cluster: &mut Cluster,
    producer: &Producer,
    specs: &[WorkerSpec],
    progress: &mut JobProgress,
) -> Result<(), CliError> {
    let mut fates = FATES.iter().peekable();
    loop {
        let status = producer.batch_status(&progress.batch).await?;
        if let Some(status) = status.map(|status| status.summary) {
            progress.set(status.succeeded + status.failed + status.cancelled)?;
            if matches!(status.state, BatchState::Done | BatchState::Abandoned) {
                return Ok(());
            }
        }
        if let Some((_, number, fate)) =
            fates.next_if(|(percent, ..)| progress.percent() >= *percent)
        {
            meet(cluster, &specs[number - 1], *fate).await?;
            progress.note(*number, *fate)?;
        }
        sleep(LOOK_EVERY).await;
    }
}

async fn meet(cluster: &mut Cluster, spec: &WorkerSpec, fate: Fate) -> Result<(), CliError> {
    match fate {
        Fate::Killed => {
            if let Some(process) = cluster.process(&spec.name) {
                process.kill().await;
            }
            Ok(())
        }
        Fate::Restarted => {
            cluster.stop(|name| name == spec.name).await;
            cluster.spawn_worker(spec)
        }
        Fate::StartedAgain => cluster.spawn_worker(spec),
    }
}

/// How far the job is: a bar on a terminal, a line now and then elsewhere.
pub(super) struct JobProgress {
    batch: BatchId,
    pub(super) total: u64,
    done: u64,
    bar: Option<ProgressBar>,
    /// Where the next line is due, without a bar.
    next_line: u64,
    text: bool,
    met: Vec<(usize, Fate, u64)>,
}

impl JobProgress {
    pub(super) fn new(format: Format, total: u64, batch: BatchId) -> Self {
        let text = format == Format::Text;
        let bar = ProgressBar::new(total);
        let style = "{bar:30.cyan} {human_pos}/{human_len} tasks  {rate}  {elapsed}";
        if let Ok(style) = ProgressStyle::with_template(style) {
            // The bar's own `per_sec` has four decimals.
            let rate = |state: &ProgressState, to: &mut dyn std::fmt::Write| {
                // Only this number is lost if it cannot be written.
                write!(to, "{:.0}/s", state.per_sec()).unwrap_or_default();
            };
            bar.set_style(style.with_key("rate", rate).progress_chars("━╸─"));
        }
        let bar = Some(bar).filter(|bar| text && !bar.is_hidden());
        Self { batch, total, done: 0, bar, next_line: total / 4, text, met: vec![] }
    }

    fn percent(&self) -> u64 {
        self.done * 100 / self.total.max(1)
    }

    fn set(&mut self, done: u64) -> Result<(), CliError> {
        self.done = done;
        match &self.bar {
            Some(bar) => bar.set_position(done),
            None if done >= self.next_line => {
                self.next_line = (done * 4 / self.total.max(1) + 1) * self.total.div_ceil(4);
                let (done, total) = (HumanCount(done), HumanCount(self.total));
                self.line(&format!("{done} of {total} tasks are done"))?;
            }
            None => {}
        }
        Ok(())
    }

    fn note(&mut self, number: usize, fate: Fate) -> Result<(), CliError> {
        let percent = self.percent();
        self.met.push((number, fate, percent));
        self.line(&format!("{} {} at {percent} %", node_name(number), fate.as_str()))
    }

    fn line(&self, line: &str) -> Result<(), CliError> {
        match &self.bar {
            Some(bar) => bar.suspend(|| output::line(line)),
            None if self.text => output::line(line),
            None => Ok(()),
        }
    }

    pub(super) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    /// What a node went through.
    pub(super) fn story(&self, name: &str) -> String {
        let own = self.met.iter().filter(|(number, ..)| node_name(*number) == name);
        let parts: Vec<_> =
            own.map(|(_, fate, percent)| format!("{} at {percent} %", fate.as_str())).collect();
        parts.join(", ")
    }
}
