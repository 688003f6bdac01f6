//! Notices what stands still in this worker although it could go on, and reports it as a problem of the
//! process. Repairs nothing.
//!
//! Looks once a second. Each of its questions is about one stage of a task's life: can deliveries
//! come, do waiting tasks begin, do attempts end, do settlements end, can anything be published.

use std::sync::Arc;
use std::time::{Duration, Instant};

use garenne_common::broker::{Health, Publisher, Settler};
use garenne_common::health::STALL_TIMEOUT;
use tokio_util::sync::CancellationToken;

use crate::attempt::Pipeline;
use crate::settle::Lane;

const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// The task that looks.
pub(crate) struct Watchdog {
    pub(crate) pipeline: Arc<Pipeline>,
    pub(crate) publisher: Publisher,
    /// One for each queue, in the order of the pipeline's.
    pub(crate) settlers: Vec<Settler>,
    pub(crate) stop: CancellationToken,
}

impl Watchdog {
    /// Looks until the worker has stopped.
    pub(crate) async fn run(self) {
        let mut tick = tokio::time::interval(LOOK_INTERVAL);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut stages = Stages::default();
        loop {
            tokio::select! {
                () = self.stop.cancelled() => return,
                _ = tick.tick() => self.look(&mut stages, Instant::now()),
            }
        }
    }

    fn look(&self, stages: &mut Stages, now: Instant) {
        let health = &self.pipeline.health;
        health.set("not_consuming", self.deliveries(stages, now));
        health.set("not_publishing", self.publishing(stages, now));
        health.set("tasks_not_started", self.waiting(stages, now));
        health.set("settling_stalled", self.settling(stages, now));
        health.set("attempt_overdue", self.pipeline.register.overdue(self.pipeline.longest_end()));
        let lost = self.pipeline.doors.slots.lost();
        health.set("slots_lost", (lost > 0).then(|| {
            format!("{lost} slots are held by blocking handlers that do not return although their attempts are over")
        }));
    }

    fn deliveries(&self, stages: &mut Stages, now: Instant) -> Option<String> {
        let down = |(lane, settler): (&Lane, &Settler)| match settler.health() {
            Health::Flowing(_) => None,
            Health::Down(trouble) => {
                let trouble = trouble.map_or(String::new(), |trouble| format!(" ({trouble})"));
                Some(format!("{}{trouble}", lane.queue))
            }
        };
        let down: Vec<_> =
            self.pipeline.lanes.iter().zip(&self.settlers).filter_map(down).collect();
        let stuck = !down.is_empty() && !self.pipeline.stop.is_cancelled();
        let since = stages.deliveries.stuck_for(stuck, 0, now)?;
        Some(format!("not consuming for {since:?}: {}", down.join(", ")))
    }

    fn publishing(&self, stages: &mut Stages, now: Instant) -> Option<String> {
        let trouble = self.publisher.trouble().map(|trouble| trouble.to_string());
        let blocked = "RabbitMQ takes no messages (memory or disk alarm)";
        let trouble = trouble.or_else(|| self.publisher.is_blocked().then(|| blocked.to_owned()));
        let since = stages.publishing.stuck_for(trouble.is_some(), 0, now)?;
        trouble.map(|trouble| format!("nothing can be published for {since:?}: {trouble}"))
    }

    /// Tasks that wait here although slots are free.
    fn waiting(&self, stages: &mut Stages, now: Instant) -> Option<String> {
        let waits = self.pipeline.lines.iter().any(|line| !line.is_empty());
        let free = self.pipeline.doors.slots.free();
        let begun = self.pipeline.register.entered();
        let stuck = waits && free > 0 && !self.pipeline.stop.is_cancelled();
        let since = stages.waiting.stuck_for(stuck, begun, now)?;
        Some(format!(
            "tasks wait here and none begins for {since:?} although {free} slots are free"
        ))
    }

    fn settling(&self, stages: &mut Stages, now: Instant) -> Option<String> {
        let gauge = &self.pipeline.gauge;
        let open = gauge.open();
        let still = stages.settling.stuck_for(open > 0, gauge.concluded(), now);
        let oldest = gauge.oldest_unconfirmed().filter(|age| *age >= STALL_TIMEOUT);
        let age = still.or(oldest.map(whole_seconds))?;
        let waits_for = if oldest.is_some() {
            self.publisher.why_late(age).to_string()
        } else {
            "room at the publisher or the settlement task".to_owned()
        };
        Some(format!(
            "{open} ended tasks are not settled, the oldest for {age:?}; waiting for: {waits_for}"
        ))
    }
}

/// Since when each stage has stood still.
#[derive(Default)]
struct Stages {
    deliveries: Stillness,
    publishing: Stillness,
    waiting: Stillness,
    settling: Stillness,
}

/// One stage: whether it has something to do, and how far it has got.
#[derive(Default)]
struct Stillness {
    since: Option<(Instant, u64)>,
}

impl Stillness {
    /// How long the stage has had something to do at `progress`; `None` below [`STALL_TIMEOUT`].
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
        let still = now.saturating_duration_since(since);
        (still >= STALL_TIMEOUT).then(|| whole_seconds(still))
    }
}

/// What a person wants to know.
fn whole_seconds(time: Duration) -> Duration {
    Duration::from_secs(time.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_is_stuck_when_it_has_work_and_gets_no_further() {
        let (mut stage, start) = (Stillness::default(), Instant::now());
        assert_eq!(stage.stuck_for(true, 1, start), None);
        assert_eq!(stage.stuck_for(true, 1, start + STALL_TIMEOUT), Some(STALL_TIMEOUT));
        assert_eq!(stage.stuck_for(true, 2, start + STALL_TIMEOUT), None, "it moved");
        assert_eq!(stage.stuck_for(false, 2, start + STALL_TIMEOUT * 3), None, "nothing to do");
        assert_eq!(stage.stuck_for(true, 2, start + STALL_TIMEOUT * 3), None);
    }
}
