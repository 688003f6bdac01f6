//! Logs the state of a worker: its running and waiting tasks, and what they wait for.

use std::sync::Weak;

use garenne_common::broker::Publisher;
use garenne_common::service::telemetry;

use crate::run::Pipeline;

/// Maximum number of running tasks in a report, the oldest first.
const MAX_TASKS: usize = 100;

/// Logs the state of a running worker, also while it drains.
#[derive(Clone)]
pub struct WorkerState {
    /// Weak, since draining ends by dropping the pipeline.
    pub(crate) pipeline: Weak<Pipeline>,
    pub(crate) publisher: Publisher,
}

impl WorkerState {
    /// Logs one line for the worker, and one for each queue, running task and problem.
    pub fn log(&self) {
        let Some(pipeline) = self.pipeline.upgrade() else {
            return tracing::info!("state: stopping; waiting for the last confirms");
        };
        let (running, tasks) = pipeline.running.oldest(MAX_TASKS);
        let publishing = self.publisher.current_error().map(|error| error.to_string());
        let problems = pipeline.health.problems();
        tracing::info!(
            running,
            draining = pipeline.stop.is_cancelled(),
            stuck_handlers = pipeline.gate.concurrency.stuck(),
            to_settle = pipeline.settle.max_capacity() - pipeline.settle.capacity(),
            to_publish = self.publisher.queued(),
            not_publishing = publishing,
            problems = problems.len(),
            lost_log_lines = telemetry::lost_lines(),
            "state of the worker"
        );
        log_queues(&pipeline);
        for task in tasks {
            tracing::info!(task, "state: running");
        }
        for problem in problems {
            tracing::info!(problem = problem.code, since = %problem.since, "state: {}", problem.detail);
        }
    }
}

fn log_queues(pipeline: &Pipeline) {
    for queue in pipeline.queues.iter() {
        let (tasks, messages) = queue.waiting.len();
        tracing::info!(
            queue = %queue.name,
            consumer = %queue.settler.health(),
            unsettled = queue.settler.unsettled(),
            waiting_messages = messages,
            waiting_tasks_of_bundles = tasks,
            "state: queue"
        );
    }
}
