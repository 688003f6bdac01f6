//! Detects stalls: stages of the pipeline that have work and make no progress. Reports them in the health
//! of the process and repairs nothing.
//!
//! Checks once a second, for each stage of a task's life: whether deliveries arrive, waiting tasks start,
//! attempts end, settlements complete, and messages are published.

use std::sync::Arc;
use std::time::{Duration, Instant};

use garenne_common::broker::{Health, Publisher};
use garenne_common::health::STALL_TIMEOUT;
use tokio_util::sync::CancellationToken;

use crate::intake::queue::ServedQueue;
use crate::run::Pipeline;

const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// The task that detects stalls.
pub(crate) struct Watchdog {
    pub(crate) pipeline: Arc<Pipeline>,
    pub(crate) publisher: Publisher,
    pub(crate) stop: CancellationToken,
}

impl Watchdog {
    /// Checks until the worker has stopped.
    pub(crate) async fn run(self) {
        let mut tick = tokio::time::interval(POLL_INTERVAL);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut stages = Stages::default();
        loop {
            tokio::select! {
                () = self.stop.cancelled() => return,
                _ = tick.tick() => self.check(&mut stages, Instant::now()),
            }
        }
    }

    fn check(&self, stages: &mut Stages, now: Instant) {
        let health = &self.pipeline.health;
        health.set("not_consuming", self.deliveries(stages, now));
        health.set("not_publishing", self.publishing(stages, now));
        health.set("tasks_not_started", self.waiting(stages, now));
        health.set("settling_stalled", self.settling(stages, now));
        health.set("attempt_overdue", self.pipeline.running.overdue(self.pipeline.overdue_after()));
        let stuck = self.pipeline.gate.concurrency.stuck();
        health.set("handlers_stuck", (stuck > 0).then(|| {
            format!("{stuck} blocking handlers do not return although their attempts are over; the worker runs as many tasks fewer")
        }));
    }

    fn deliveries(&self, stages: &mut Stages, now: Instant) -> Option<String> {
        let down = |queue: &ServedQueue| match queue.settler.health() {
            Health::Flowing(_) => None,
            Health::Down(trouble) => {
                let trouble = trouble.map_or(String::new(), |trouble| format!(" ({trouble})"));
                Some(format!("{}{trouble}", queue.name))
            }
        };
        let down: Vec<_> = self.pipeline.queues.iter().filter_map(down).collect();
        let stuck = !down.is_empty() && !self.pipeline.stop.is_cancelled();
        let since = stages.deliveries.stuck_for(stuck, 0, now)?;
        Some(format!("not consuming for {since:?}: {}", down.join(", ")))
    }

    fn publishing(&self, stages: &mut Stages, now: Instant) -> Option<String> {
        let trouble = self.publisher.current_error().map(|error| error.to_string());
        let blocked = "RabbitMQ takes no messages (memory or disk alarm)";
        let trouble = trouble.or_else(|| self.publisher.is_blocked().then(|| blocked.to_owned()));
        let since = stages.publishing.stuck_for(trouble.is_some(), 0, now)?;
        trouble.map(|trouble| format!("nothing can be published for {since:?}: {trouble}"))
    }

    /// Tasks that wait although permits are free.
    fn waiting(&self, stages: &mut Stages, now: Instant) -> Option<String> {
        let waits = self.pipeline.queues.iter().any(|queue| !queue.waiting.is_empty());
        let free = self.pipeline.gate.concurrency.free();
        let begun = self.pipeline.running.total();
        let stuck = waits && free > 0 && !self.pipeline.stop.is_cancelled();
        let since = stages.waiting.stuck_for(stuck, begun, now)?;
        Some(format!(
            "tasks wait and none has started for {since:?} although {free} more could run"
        ))
    }

    fn settling(&self, stages: &mut Stages, now: Instant) -> Option<String> {
        let progress = &self.pipeline.progress;
        let open = progress.open();
        let stalled = stages.settling.stuck_for(open > 0, progress.concluded(), now);
        let oldest = progress.oldest_unconfirmed().filter(|age| *age >= STALL_TIMEOUT);
        let age = stalled.or(oldest.map(whole_seconds))?;
        let cause = if oldest.is_some() {
            self.publisher.timeout_error(age).to_string()
        } else {
            "room at the publisher or the settlement task".to_owned()
        };
        Some(format!(
            "{open} ended tasks are not settled, the oldest for {age:?}; waiting for: {cause}"
        ))
    }
}

/// The stall of each stage.
#[derive(Default)]
struct Stages {
    deliveries: Stall,
    publishing: Stall,
    waiting: Stall,
    settling: Stall,
}

/// A stage that has work: since when, and at which progress.
#[derive(Default)]
struct Stall {
    since: Option<(Instant, u64)>,
}

impl Stall {
    /// How long the stage has had work without progress; `None` below [`STALL_TIMEOUT`].
    fn stuck_for(&mut self, has_work: bool, progress: u64, now: Instant) -> Option<Duration> {
        if !has_work {
            self.since = None;
            return None;
        }
        let since = match self.since {
            Some((since, at)) if at == progress => since,
            Some(_) | None => now,
        };
        self.since = Some((since, progress));
        let stalled = now.saturating_duration_since(since);
        (stalled >= STALL_TIMEOUT).then(|| whole_seconds(stalled))
    }
}

/// Whole seconds are precise enough for people.
fn whole_seconds(time: Duration) -> Duration {
    Duration::from_secs(time.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_with_work_and_without_progress_is_stuck() {
        let (mut stage, start) = (Stall::default(), Instant::now());
        assert_eq!(stage.stuck_for(true, 1, start), None);
        assert_eq!(stage.stuck_for(true, 1, start + STALL_TIMEOUT), Some(STALL_TIMEOUT));
        assert_eq!(stage.stuck_for(true, 2, start + STALL_TIMEOUT), None, "it moved");
        assert_eq!(stage.stuck_for(false, 2, start + STALL_TIMEOUT * 3), None, "nothing to do");
        assert_eq!(stage.stuck_for(true, 2, start + STALL_TIMEOUT * 3), None);
    }
}
