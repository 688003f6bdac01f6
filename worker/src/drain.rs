//! A running worker, and how it stops without losing anything.

use std::sync::Arc;
use std::time::Duration;

use garenne_common::broker::{Health, Link, Publisher};
use garenne_common::failpoints::Protection;
use garenne_common::{Problem, QueueName};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::control::Control;
use crate::control::state::WorkerState;
use crate::run::Pipeline;
use crate::run::running_tasks::RunningTasks;

/// How long the last confirms may take after all tasks have ended.
const FLUSH_GRACE: Duration = Duration::from_secs(10);
/// How often a stopping worker logs what it waits for.
const REMINDER_INTERVAL: Duration = Duration::from_secs(3);
/// Maximum number of tasks that it names, the oldest first.
const MAX_TASKS: usize = 5;

/// A running worker. Stop it with [`drain`](Self::drain); if it is dropped, it continues unattended.
pub struct Running {
    pub(crate) pipeline: Arc<Pipeline>,
    pub(crate) intakes: TaskTracker,
    pub(crate) tasks: TaskTracker,
    pub(crate) control: Control,
    pub(crate) publisher: Publisher,
    pub(crate) consume: Link,
    pub(crate) grace: Duration,
}

impl Running {
    /// Ends the grace period early when cancelled, for instance by a second signal.
    pub fn abort_token(&self) -> CancellationToken {
        self.pipeline.abort.clone()
    }

    /// Logs the state of this worker on request, also while it drains.
    pub fn state(&self) -> WorkerState {
        WorkerState { pipeline: Arc::downgrade(&self.pipeline), publisher: self.publisher.clone() }
    }

    /// Number of running tasks.
    pub fn running_tasks(&self) -> usize {
        self.pipeline.known.len()
    }

    /// What keeps the worker from doing its work; empty if it is healthy.
    pub fn problems(&self) -> Vec<Problem> {
        self.pipeline.health.problems()
    }

    /// Whether deliveries can arrive, for each queue.
    pub fn health(&self) -> Vec<(QueueName, Health)> {
        let queues = self.pipeline.queues.iter();
        queues.map(|queue| (queue.name.clone(), queue.settler.health())).collect()
    }

    /// Number of replies that were not sent, since their tasks name queues that may not receive replies.
    pub fn refused_replies(&self) -> u64 {
        self.pipeline.settlements.replies.refused()
    }

    /// Number of blocking handlers that have not returned although their attempts are over. The worker runs
    /// as many tasks fewer at the same time.
    pub fn stuck_handlers(&self) -> usize {
        self.pipeline.gate.concurrency.stuck()
    }

    /// Stops without losing anything. The order matters:
    ///
    /// 1. Intake ends. The broker is told to send no more, and then waiting tasks return to it, as far as
    ///    there is room to publish within the grace period.
    /// 2. Running tasks may end within the grace period; the log names them every few seconds.
    /// 3. Tasks that have not ended are interrupted and return to their queue without losing an attempt,
    ///    and so do tasks of bundles that were being decoded while intake ended.
    /// 4. The last successors are confirmed and the last deliveries acknowledged.
    /// 5. The connections close. Only now the broker may take back unsettled deliveries.
    pub async fn drain(self) {
        self.pipeline.stop.cancel();
        self.end_intake().await;
        self.end_attempts().await;
        self.return_leftovers().await;
        let Self { pipeline, tasks, control, publisher, consume, .. } = self;
        pipeline.watchers.close();
        pipeline.watchers.wait().await;
        control.end().await;
        // Drops the last sender, so the settlement task ends when everything is confirmed.
        drop(pipeline);
        if !Protection::FlushBeforeExit.is_enabled() {
            return;
        }
        if tokio::time::timeout(FLUSH_GRACE, tasks.wait()).await.is_err() {
            tracing::warn!("RabbitMQ did not confirm everything; the rest will be delivered again");
        }
        publisher.close(FLUSH_GRACE).await;
        consume.close().await;
        tracing::info!("stopped");
    }

    /// Waits until waiting tasks have returned. That waits for room to publish; tasks that find none are
    /// delivered again anyway.
    async fn end_intake(&self) {
        tokio::select! {
            () = self.intakes.wait() => {}
            () = tokio::time::sleep(self.grace) => {
                tracing::warn!("not all waiting tasks could be returned in time");
            }
            () = self.pipeline.abort.cancelled() => {}
        }
    }

    /// Waits for running attempts, and interrupts those that do not end within the grace period.
    async fn end_attempts(&self) {
        let Self { pipeline, grace, .. } = self;
        pipeline.attempts.close();
        tracing::info!(running = pipeline.known.len(), ?grace, "draining");
        tokio::select! {
            () = pipeline.attempts.wait() => {}
            () = tokio::time::sleep(*grace) => {
                let (tasks, oldest) = pipeline.running.oldest(MAX_TASKS);
                let oldest = oldest.join(", ");
                tracing::warn!(tasks, oldest, "the grace period is over; interrupting tasks");
            }
            () = pipeline.abort.cancelled() => tracing::warn!("the grace period is cut short"),
            () = log_running(&pipeline.running, *grace) => {}
        }
        pipeline.abort.cancel();
        if tokio::time::timeout(FLUSH_GRACE, pipeline.attempts.wait()).await.is_err() {
            tracing::warn!("some tasks found no room to be settled; they will be delivered again");
        }
    }

    /// Returns tasks of bundles that were being decoded while intake ended.
    async fn return_leftovers(&self) {
        let leftovers = async {
            for queue in self.pipeline.queues.iter() {
                self.pipeline.return_waiting(queue).await;
            }
        };
        if tokio::time::timeout(FLUSH_GRACE, leftovers).await.is_err() {
            tracing::warn!("not all waiting tasks could be returned in time");
        }
    }
}

/// Logs periodically what a stopping worker waits for. Never completes.
async fn log_running(running: &RunningTasks, grace: Duration) {
    let begun = tokio::time::Instant::now();
    loop {
        tokio::time::sleep(REMINDER_INTERVAL).await;
        let (tasks, oldest) = running.oldest(MAX_TASKS);
        let left = Duration::from_secs(grace.saturating_sub(begun.elapsed()).as_secs());
        tracing::info!(tasks, oldest = oldest.join(", "), ?left, "still waiting for running tasks");
    }
}
