//! The loop of a map: lines in, submissions and results under way, rows out.
//!
//! One task of the runtime does it all, so nothing here is shared or locked. Opening and sealing the
//! batch is not done here.

use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};
use garenne_common::{DeadReason, Payload, Status, TaskId, TaskResult};
use garenne_producer::{Batch, OutputError, Producer, Retried, RetryNotes, SubmitError};
use serde::Serialize;
use tokio::time::{Interval, MissedTickBehavior};

use super::Arguments;
use super::input::{AHEAD, Line, Receiver};
use super::order::InOrder;
use super::progress::{Progress, Tally, summary};
use super::submit::{Outcome, submit};
use crate::context::Context;
use crate::error::{CliError, Exit};
use crate::output::{json_line, print_error};

/// How often the bar moves.
const TICK: Duration = Duration::from_millis(100);
/// After so long without any result a person wants to know what to check.
const SILENCE: Duration = Duration::from_secs(15);
/// How much later than the end of the input a signal may be noticed that caused both.
const SIGNAL_LAG: Duration = Duration::from_millis(50);
/// Groups of lines that are on their way to the broker at once. While they are, more lines are read, so
/// that the next group is a larger one.
const GROUPS_UNDER_WAY: usize = 8;

/// Why it ended before the end.
pub(crate) enum Halt {
    /// A signal asked for it.
    Stop(Exit),
    /// It cannot go on.
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

/// A task under way: its place in the order, and the line it came from.
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
    context: &'a Context,
    arguments: &'a Arguments,
    results: FuturesUnordered<Ended>,
    retries: RetryNotes,
    order: InOrder<Row>,
    /// Whether the input can be read once only.
    streaming: bool,
    /// Lines taken from the input.
    begun: u64,
    /// Those of them that are on their way to the broker.
    submitting: u64,
    tally: Tally,
    progress: Progress,
    tick: Interval,
    /// The line that ended a streaming input too early.
    bad_line: Option<CliError>,
    hinted: bool,
}

impl<'a> Pump<'a> {
    /// For so many tasks, if that is known.
    pub(crate) fn new(
        context: &'a Context,
        arguments: &'a Arguments,
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
            tally: Tally::default(),
            progress: Progress::new(context, total),
            tick,
            bad_line: None,
            hinted: false,
        }
    }

    /// Submits all lines, taking in results meanwhile; returns when the last one is confirmed.
    pub(crate) async fn feed(
        &mut self,
        batch: &Batch,
        first: Line,
        mut lines: Receiver,
    ) -> Result<(), Halt> {
        let mut submits = Submits::new();
        submits.push(self.begin(batch, vec![first]));
        let (mut more, mut ready) = (true, vec![]);
        while more || !submits.is_empty() {
            let room = if more && submits.len() < GROUPS_UNDER_WAY { self.room() } else { 0 };
            let halted = tokio::select! {
                // What is there already; nothing waits for company.
                count = lines.recv_many(&mut ready, room), if room > 0 => {
                    more = count > 0;
                    let group = self.good_lines(ready.drain(..), &mut more);
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
                self.settle(submits).await;
                return Err(halt);
            }
        }
        self.progress.set_total(self.tally.submitted);
        if self.streaming { self.unless_cut_short().await } else { Ok(()) }
    }

    /// Ctrl-C on a pipeline ends its first command too, and the end of the input may be noticed before
    /// the signal. An input that was cut short must not pass for a whole one.
    async fn unless_cut_short(&self) -> Result<(), Halt> {
        match tokio::time::timeout(SIGNAL_LAG, self.context.stop.requested()).await {
            Ok(exit) => Err(Halt::Stop(exit)),
            Err(_) => Ok(()),
        }
    }

    /// Waits for the results of all that was submitted.
    pub(crate) async fn drain(&mut self) -> Result<(), Halt> {
        while !self.results.is_empty() {
            self.step().await?;
        }
        Ok(())
    }

    /// Whatever happens next besides submitting: a result, a retry, a signal, a tick of the clock.
    ///
    /// Cancel-safe: every branch is, and nothing is taken before its branch runs to its end.
    async fn step(&mut self) -> Result<(), Halt> {
        tokio::select! {
            exit = self.context.stop.requested() => {
                let remark = "stopping when what is on its way has arrived; again to stop at once";
                self.progress.aside(|| self.context.output.remark(remark));
                Err(Halt::Stop(exit))
            }
            Some((place, ended)) = self.results.next(), if !self.results.is_empty() => {
                let result = ended.map_err(CliError::from)?;
                Ok(self.ended(place, result)?)
            }
            Some(note) = self.retries.next() => {
                match note {
                    Retried::Note(note) => self.tally.retried(note.id),
                    Retried::Missed(count) => self.tally.retries += count,
                }
                Ok(())
            }
            _ = self.tick.tick() => {
                self.progress.show(&self.tally);
                self.hint();
                Ok(())
            }
        }
    }

    /// How many more tasks may begin: the window spans from the oldest row not yet written.
    fn room(&self) -> usize {
        let under_way = if self.arguments.detach {
            self.submitting
        } else {
            self.begun - self.order.released()
        };
        let room = self.arguments.window.saturating_sub(under_way);
        usize::try_from(room).map_or(AHEAD, |room| room.min(AHEAD))
    }

    /// The lines until the first bad one, after which there are no more.
    fn good_lines(
        &mut self,
        ready: impl Iterator<Item = Result<Line, CliError>>,
        more: &mut bool,
    ) -> Vec<Line> {
        let mut lines = vec![];
        for line in ready {
            match line {
                Ok(line) => lines.push(line),
                Err(error) => {
                    *more = false;
                    self.stop_at(error);
                }
            }
        }
        lines
    }

    fn begin<'b>(&mut self, batch: &'b Batch, lines: Vec<Line>) -> BoxFuture<'b, Submitted>
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

    /// Takes in what became of a group. The first problem ends the map; what the broker has of the rest
    /// is counted all the same.
    fn submitted(&mut self, submitted: Submitted) -> Result<(), Halt> {
        self.submitting -= submitted.len() as u64;
        let mut halted = Ok(());
        for (place, outcome) in submitted {
            match outcome {
                Ok(handle) => {
                    self.tally.submitted += 1;
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
        // The first line's problem is everybody's (no such queue); a later one's needs its place.
        if self.tally.submitted == 0 {
            return error;
        }
        CliError {
            message: format!("line {} was not submitted: {}", place.line, error.message),
            ..error
        }
    }

    /// A line of a streaming input cannot be read: said at once, since the rest may take long.
    fn stop_at(&mut self, error: CliError) {
        self.progress.aside(|| print_error(&error, self.context.output.format));
        self.bad_line = Some(error);
    }

    /// Gives submissions under way the deadline to be confirmed, so that the batch counts them.
    async fn settle(&mut self, mut submits: Submits<'_>) {
        let confirmed = async {
            while let Some(group) = submits.next().await {
                let good = group.iter().filter(|(_, outcome)| outcome.is_ok()).count();
                self.tally.submitted += good as u64;
            }
        };
        if tokio::time::timeout(self.context.deadline, confirmed).await.is_err() {
            self.context
                .output
                .remark("some submissions are unconfirmed: they may or may not arrive");
        }
    }

    fn ended(&mut self, place: Place, result: TaskResult) -> Result<(), CliError> {
        self.tally.ended(&result);
        let rows = self.order.push(place.number, Row::new(place.line, result));
        rows.iter().try_for_each(|row| self.write(row))
    }

    fn write(&self, row: &Row) -> Result<(), CliError> {
        if self.arguments.failures_only && row.status == Status::Succeeded {
            return Ok(());
        }
        self.progress.aside(|| json_line(row))
    }

    /// Once, when nothing has come for long.
    fn hint(&mut self) {
        let silent = self.tally.done() == 0 && self.tally.retries == 0;
        let delay = self.arguments.options.delay.unwrap_or_default();
        if !self.hinted
            && silent
            && !self.arguments.detach
            && self.progress.elapsed() > SILENCE + delay
        {
            self.hinted = true;
            let remark = "no result yet; is a worker running that serves the queue and knows the task? \
                          `garenne doctor` checks";
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
        summary(self.context.output, batch, &self.tally, self.progress.elapsed());
    }

    /// Writes the rows that still wait for their turn, and the summary, if anybody wants to read them.
    pub(crate) fn abandon(&mut self, batch: &str, why: &Halt) {
        self.progress.clear();
        if why.reader_is_gone() || self.tally.submitted == 0 {
            return;
        }
        let rest: Vec<_> = self.order.rest().collect();
        if rest.iter().try_for_each(|row| self.write(row)).is_ok() {
            self.finish(batch);
        }
    }

    /// How the whole came out.
    pub(crate) fn verdict(self) -> Exit {
        match self.bad_line {
            // It has been explained when it came.
            Some(error) => error.exit,
            None if self.tally.failed > 0 => Exit::Failed,
            None => Exit::Success,
        }
    }
}
