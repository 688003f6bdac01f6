//! What a worker does at the moment, as log lines: what runs, what waits, and for what.

use std::sync::Weak;

use garenne_common::broker::{Publisher, Settler};
use garenne_common::service::telemetry;

use crate::attempt::Pipeline;

/// How many running tasks a report names, the longest-running first.
const NAMED_TASKS: usize = 100;

/// Reports the state of a running worker, also while it drains.
#[derive(Clone)]
pub struct WorkerState {
    /// Weak, since a drained worker is one that has dropped its pipeline.
    pub(crate) pipeline: Weak<Pipeline>,
    /// One for each queue, in the pipeline's order.
    pub(crate) settlers: Vec<Settler>,
    pub(crate) publisher: Publisher,
}

impl WorkerState {
    /// Logs the state: a line for the worker, one for each queue, running task and problem.
    pub fn log(&self) {
        let Some(pipeline) = self.pipeline.upgrade() else {
            return tracing::info!("state: stopping; it waits for the last confirms");
        };
        let (running, tasks) = pipeline.register.oldest(NAMED_TASKS);
        let publishing = self.publisher.trouble().map(|trouble| trouble.to_string());
        let problems = pipeline.health.problems();
        tracing::info!(
            running,
            draining = pipeline.stop.is_cancelled(),
            lost_slots = pipeline.doors.slots.lost(),
            to_settle = pipeline.settle.max_capacity() - pipeline.settle.capacity(),
            to_publish = self.publisher.queued(),
            not_publishing = publishing,
            problems = problems.len(),
            lost_log_lines = telemetry::lost_lines(),
            "state of the worker"
        );
        self.log_queues(&pipeline);
        for task in tasks {
            tracing::info!(task, "state: running");
        }
        for problem in problems {
            tracing::info!(problem = problem.code, since = %problem.since, "state: {}", problem.detail);
        }
    }

    fn log_queues(&self, pipeline: &Pipeline) {
        let waiting = pipeline.lines.iter().map(crate::line::Line::len);
        for ((lane, settler), (tasks, messages)) in
            pipeline.lanes.iter().zip(&self.settlers).zip(waiting)
        {
            tracing::info!(
                queue = %lane.queue,
                consumer = %settler.health(),
                unsettled = settler.unsettled(),
                waiting_messages = messages,
                waiting_tasks_of_bundles = tasks,
                "state: queue"
            );
        }
    }
}
