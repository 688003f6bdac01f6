//! The loop of a map: lines come in, submissions and results are under way, rows go out.
//!
//! All of it runs in one task of the runtime, so nothing is shared or locked. Opening and sealing
//! the batch is not done here.

use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};
use garenne_common::{DeadReason, Payload, Status, TaskId, TaskResult};
use garenne_producer::{Batch, OutputError, Producer, Retried, RetryNotes, SubmitError};
use serde::Serialize;
use tokio::time::{Interval, MissedTickBehavior};

use super::args::MapArgs;
use super::input::{AHEAD, LineReceiver, NumberedLine};
use super::order::InOrder;
use super::progress::{MapCounts, Progress, summary};
use super::submit::{Outcome, submit};
use crate::context::Context;
use crate::error::{CliError, Exit};
use crate::output::{json_line, print_error};

/// Interval of updates of the progress bar.
const TICK: Duration = Duration::from_millis(100);
/// After this time without any result, a remark says what to check.
const HINT_AFTER: Duration = Duration::from_secs(15);
/// How much later than the end of the input a signal may arrive that caused both.
const SIGNAL_LAG: Duration = Duration::from_millis(50);
/// The most groups of lines that are submitted at once. While that many are under way, lines are
/// read ahead, so that the next group is larger.
const GROUPS_UNDER_WAY: usize = 8;

/// Why a map ended early.
pub(crate) enum Halt {
    /// A signal arrived.
    Stop(Exit),
    /// An error that ends the map.
    Error(CliError),
}

impl Halt {
    fn reader_is_gone(&self) -> bool {
        match self {
            Self::Stop(_) => false,
            Self::Error(error) => error.exit == Exit::BrokenPipe,
        }
    }
}

impl From<CliError> for Halt {
    fn from(error: CliError) -> Self {
        Self::Error(error)
    }
}

/// A task under way: its number, from 0, and the number of its line.
#[derive(Debug, Clone, Copy)]
struct Place {
    number: u64,
    line: u64,
}

/// One line of output.
#[derive(Debug, Serialize)]
struct Row {
    line: u64,
    id: TaskId,
    status: Status,
    #[serde(skip_serializing_if = "Option::is_none")]
    output: Option<Payload>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<DeadReason>,
    attempt: u32,
}

impl Row {
    fn new(line: u64, result: TaskResult) -> Self {
        let TaskResult { id, status, output, error, reason, attempt, .. } = result;
        Self { line, id, status, output, error, reason, attempt }
    }
}

type Submitted = Vec<(Place, Outcome)>;
type Submits<'a> = FuturesUnordered<BoxFuture<'a, Submitted>>;
type Ended = BoxFuture<'static, (Place, Result<TaskResult, OutputError>)>;

/// A map under way.
pub(crate) struct Pump<'a> {
    pub(super) context: &'a Context,
    pub(super) arguments: &'a MapArgs,
    results: FuturesUnordered<Ended>,
    retries: RetryNotes,
    order: InOrder<Row>,
    /// Whether the input can be read only once.
    streaming: bool,
    /// Lines whose submission has begun.
    begun: u64,
    /// Those of them that are not confirmed yet.
    submitting: u64,
    counts: MapCounts,
    progress: Progress,
    tick: Interval,
    /// The invalid line that ended streaming input.
    bad_line: Option<CliError>,
    hinted: bool,
}

impl<'a> Pump<'a> {
    /// Starts a map of `total` tasks, if the number is known.
    pub(crate) fn new(
        context: &'a Context,
        arguments: &'a MapArgs,
        producer: &Producer,
        total: Option<u64>,
    ) -> Self {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            context,
            arguments,
            results: FuturesUnordered::new(),
            retries: producer.retry_notes(),
            order: InOrder::new(!arguments.unordered),
            streaming: total.is_none(),
            begun: 0,
            submitting: 0,
            counts: MapCounts::default(),
            progress: Progress::new(context, total),
            tick,
            bad_line: None,
            hinted: false,
        }
    }

    /// Submits all lines and handles results meanwhile; returns when the last submission is
    /// confirmed.
    pub(crate) async fn feed(
        &mut self,
        batch: &Batch,
        first: NumberedLine,
        mut lines: LineReceiver,
    ) -> Result<(), Halt> {
        let mut submits = Submits::new();
        submits.push(self.begin(batch, vec![first]));
        let (mut more, mut ready) = (true, vec![]);
        while more || !submits.is_empty() {
            let room = if more && submits.len() < GROUPS_UNDER_WAY { self.room() } else { 0 };
            let halted = tokio::select! {
                // Only lines that are ready; nothing waits for more of them.
                count = lines.recv_many(&mut ready, room), if room > 0 => {
                    more = count > 0;
                    let group = self.valid_lines(ready.drain(..), &mut more);
                    if !group.is_empty() {
                        submits.push(self.begin(batch, group));
                    }
                    Ok(())
                }
                Some(submitted) = submits.next(), if !submits.is_empty() => {
                    self.submitted(submitted)
                }
                halted = self.step() => halted,
            };
            if let Err(halt) = halted {
                self.await_confirms(submits).await;
                return Err(halt);
            }
        }
        self.progress.set_total(self.counts.submitted);
        if self.streaming { self.check_for_signal().await } else { Ok(()) }
    }

    /// Ctrl-C in a pipeline also ends its first command, and the end of the input may be noticed
    /// before the signal. Input that was cut short must not be taken for complete.
    async fn check_for_signal(&self) -> Result<(), Halt> {
        match tokio::time::timeout(SIGNAL_LAG, self.context.stop.requested()).await {
            Ok(exit) => Err(Halt::Stop(exit)),
            Err(_) => Ok(()),
        }
    }

    /// Waits for the results of all submitted tasks.
    pub(crate) async fn drain(&mut self) -> Result<(), Halt> {
        while !self.results.is_empty() {
            self.step().await?;
        }
        Ok(())
    }

    /// Handles the next event other than a submission: a result, a retry, a signal, a tick of the
    /// clock.
    ///
    /// Cancel-safe: nothing is taken before its branch runs to its end.
    async fn step(&mut self) -> Result<(), Halt> {
        tokio::select! {
            exit = self.context.stop.requested() => {
                let remark = "stopping when the submissions under way are confirmed; again to \
                              stop at once";
                self.progress.aside(|| self.context.output.remark(remark));
                Err(Halt::Stop(exit))
            }
            Some((place, ended)) = self.results.next(), if !self.results.is_empty() => {
                let result = ended.map_err(CliError::from)?;
                Ok(self.handle_result(place, result)?)
            }
            Some(note) = self.retries.next() => {
                match note {
                    Retried::Note(note) => self.counts.retried(note.id),
                    Retried::Missed(count) => self.counts.retries += count,
                }
                Ok(())
            }
            _ = self.tick.tick() => {
                self.progress.show(&self.counts);
                self.hint();
                Ok(())
            }
        }
    }

    /// How many more tasks may be submitted. The window starts at the oldest row that was not
    /// written.
    fn room(&self) -> usize {
        let under_way = if self.arguments.detach {
            self.submitting
        } else {
            self.begun - self.order.released()
        };
        let room = self.arguments.window.saturating_sub(under_way);
        usize::try_from(room).map_or(AHEAD, |room| room.min(AHEAD))
    }

    /// The lines up to the first invalid one, which ends the input.
    fn valid_lines(
        &mut self,
        ready: impl Iterator<Item = Result<NumberedLine, CliError>>,
        more: &mut bool,
    ) -> Vec<NumberedLine> {
        let mut lines = vec![];
        for line in ready {
            match line {
                Ok(line) => lines.push(line),
                Err(error) => {
                    *more = false;
                    self.report_bad_line(error);
                }
            }
        }
        lines
    }

    /// Starts the submission of a group of lines.
    fn begin<'b>(&mut self, batch: &'b Batch, lines: Vec<NumberedLine>) -> BoxFuture<'b, Submitted>
    where
        'a: 'b,
    {
        let numbers = self.begun..;
        let places = numbers.zip(&lines).map(|(number, line)| Place { number, line: line.number });
        let places: Vec<_> = places.collect();
        self.begun += lines.len() as u64;
        self.submitting += lines.len() as u64;
        let arguments = self.arguments;
        Box::pin(async move {
            let outcomes = submit(batch, arguments, &lines).await;
            places.into_iter().zip(outcomes).collect()
        })
    }

    /// Handles the outcomes of a group. The first error ends the map; the tasks of the group that
    /// are confirmed are counted all the same.
    fn submitted(&mut self, submitted: Submitted) -> Result<(), Halt> {
        self.submitting -= submitted.len() as u64;
        let mut halted = Ok(());
        for (place, outcome) in submitted {
            match outcome {
                Ok(handle) => {
                    self.counts.submitted += 1;
                    self.results.extend(handle.map(|handle| -> Ended {
                        Box::pin(async move { (place, handle.result().await) })
                    }));
                }
                Err(error) if halted.is_ok() => {
                    halted = Err(Halt::Error(self.not_submitted(place, error)));
                }
                Err(_) => {}
            }
        }
        halted
    }

    fn not_submitted(&self, place: Place, error: SubmitError) -> CliError {
        let error = CliError::from(error);
        // An error of the first line, such as a missing queue, concerns all lines; a later one
        // needs its line number.
        if self.counts.submitted == 0 {
            return error;
        }
        CliError {
            message: format!("line {} was not submitted: {}", place.line, error.message),
            ..error
        }
    }

    /// Prints the error of an invalid line at once, since the rest of the map may take long.
    fn report_bad_line(&mut self, error: CliError) {
        self.progress.aside(|| print_error(&error, self.context.output.format));
        self.bad_line = Some(error);
    }

    /// Waits for the confirms of submissions under way, at most `--deadline`, so that the batch
    /// counts them.
    async fn await_confirms(&mut self, mut submits: Submits<'_>) {
        let confirmed = async {
            while let Some(group) = submits.next().await {
                let good = group.iter().filter(|(_, outcome)| outcome.is_ok()).count();
                self.counts.submitted += good as u64;
            }
        };
        if tokio::time::timeout(self.context.deadline, confirmed).await.is_err() {
            self.context
                .output
                .remark("some submissions are unconfirmed and may or may not have arrived");
        }
    }

    /// Counts a result and prints all rows whose turn has come.
    fn handle_result(&mut self, place: Place, result: TaskResult) -> Result<(), CliError> {
        self.counts.ended(&result);
        let rows = self.order.push(place.number, Row::new(place.line, result));
        rows.iter().try_for_each(|row| self.write(row))
    }

    fn write(&self, row: &Row) -> Result<(), CliError> {
        if self.arguments.failures_only && row.status == Status::Succeeded {
            return Ok(());
        }
        self.progress.aside(|| json_line(row))
    }

    /// Prints a remark, once, if there is no result for long.
    fn hint(&mut self) {
        let silent = self.counts.done() == 0 && self.counts.retries == 0;
        let delay = self.arguments.options.delay.unwrap_or_default();
        if !self.hinted
            && silent
            && !self.arguments.detach
            && self.progress.elapsed() > HINT_AFTER + delay
        {
            self.hinted = true;
            let remark = "no result yet; is a worker running that serves the queue and knows the \
                          task? `garenne doctor` checks";
            self.progress.aside(|| self.context.output.remark(remark));
        }
    }

    /// Removes the bar.
    pub(crate) fn clear(&self) {
        self.progress.clear();
    }

    /// Writes the summary.
    pub(crate) fn finish(&self, batch: &str) {
        self.progress.clear();
        summary(self.context.output, batch, &self.counts, self.progress.elapsed());
    }

    /// Prints the rows that still wait for their turn, and the summary, unless standard output is
    /// closed.
    pub(crate) fn abandon(&mut self, batch: &str, why: &Halt) {
        self.progress.clear();
        if why.reader_is_gone() || self.counts.submitted == 0 {
            return;
        }
        let rest: Vec<_> = self.order.rest().collect();
        if rest.iter().try_for_each(|row| self.write(row)).is_ok() {
            self.finish(batch);
        }
    }

    /// The exit code of a map that was not halted.
    pub(crate) fn verdict(self) -> Exit {
        match self.bad_line {
            // Its error was printed when the line was read.
            Some(error) => error.exit,
            None if self.counts.failed > 0 => Exit::Failed,
            None => Exit::Success,
        }
    }
}
