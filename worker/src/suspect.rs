//! Suspects: tasks that were delivered before and never settled. Who runs where, decided purely.
//!
//! A worker that dies takes all its deliveries back to the queue: the one task that killed it, and the
//! many that merely waited beside it. From outside they look the same. So all of them are suspects:
//! each runs isolated once, which costs an innocent one nothing, and shows the guilty one.

use std::time::Duration;

use garenne_common::failpoints::Protection;
use garenne_common::wire::{self, CrashRecord, Message};

/// Delivered so often, a message no longer waits beside others: a worker dies again and again, and
/// whatever waits in it is counted along with the culprit.
const TRIAL_FROM: u64 = 5;
/// So many deliveries beyond its crash budget a task may have without ever being settled.
const TOLERANCE: u64 = 10;
/// How long a message waits that goes back by being published again: two workers that both send it
/// back must not make a hot loop.
pub(crate) const RENEWAL: Duration = Duration::from_secs(1);

/// What is known of a delivery before it runs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Standing {
    /// It came before.
    pub(crate) returned: bool,
    /// How often it was delivered before and not settled: by the broker's count, and, since that one
    /// begins anew with every lease, by the leases that lapsed.
    pub(crate) deliveries: u64,
    pub(crate) crashes: CrashRecord,
}

/// How a task may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Course {
    /// Like any other.
    Usual,
    /// Isolated, where that can be.
    Suspect,
    /// Isolated, or else alone, and never beside another one on trial.
    Trial,
    /// Not again.
    GiveUp,
}

/// Whether a delivery needs a closer look; cheap, and asked of every delivery.
pub(crate) fn is_conspicuous(message: &Message, redelivered: bool) -> bool {
    redelivered || wire::crash::is_marked(message)
}

/// Whether handing this message back must not raise its count: up to RabbitMQ 4.2 each return counts,
/// and stopping workers in order must never make a task look guilty.
pub(crate) fn counts_high(message: &Message) -> bool {
    wire::crash::deliveries(message) >= TRIAL_FROM
}

impl Standing {
    /// Of a message that was found sound.
    pub(crate) fn of(message: &Message, redelivered: bool) -> Self {
        let crashes = CrashRecord::read(message).unwrap_or_default();
        let lapses = wire::lease::lapses(message);
        let deliveries = wire::crash::deliveries(message).saturating_add(lapses);
        let returned = redelivered || wire::crash::is_returned(message);
        Self { returned, deliveries, crashes }
    }

    /// How it may run, where a task may crash `budget` times, `isolating` or not.
    pub(crate) fn course(&self, budget: u32, isolating: bool) -> Course {
        let limit = TOLERANCE + u64::from(budget);
        if self.deliveries >= limit && Protection::DeliveryBudget.is_enabled() {
            Course::GiveUp
        } else if self.deliveries >= TRIAL_FROM || (self.crashes.count > 0 && !isolating) {
            Course::Trial
        } else if self.is_suspect() {
            Course::Suspect
        } else {
            Course::Usual
        }
    }

    /// Whether it may have killed a worker.
    pub(crate) fn is_suspect(&self) -> bool {
        self.returned || self.deliveries > 0 || self.crashes.count > 0
    }

    /// Why it is given up without having been caught at it.
    pub(crate) fn evidence(&self) -> String {
        let (deliveries, charged) = (self.deliveries, self.crashes.count);
        let mut text = format!(
            "delivered {} times and never settled: each time the worker that had it died, lost \
             its connection or fell silent; {charged} crashes were seen in isolation",
            deliveries.saturating_add(1)
        );
        if charged > 0 {
            text.push_str(":\n");
            text.push_str(&self.crashes.log);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn standing(returned: bool, deliveries: u64, count: u32) -> Standing {
        let crashes = CrashRecord { count, log: String::new() };
        Standing { returned, deliveries, crashes }
    }

    #[test]
    fn the_course_of_a_delivery() {
        let course = |standing: Standing| standing.course(3, true);
        assert_eq!(course(standing(false, 0, 0)), Course::Usual);
        assert_eq!(course(standing(true, 0, 0)), Course::Suspect);
        assert_eq!(course(standing(true, 1, 0)), Course::Suspect);
        assert_eq!(course(standing(false, 0, 1)), Course::Suspect);
        assert_eq!(course(standing(true, TRIAL_FROM, 0)), Course::Trial);
        assert_eq!(course(standing(true, 12, 0)), Course::Trial);
        assert_eq!(course(standing(true, 13, 0)), Course::GiveUp);
    }

    #[test]
    fn lapsed_leases_count_like_deliveries() {
        let mut message = Message::default();
        assert!(!is_conspicuous(&message, false));
        for lapses in 1..=13 {
            wire::lease::mark_lapsed(&mut message);
            assert!(is_conspicuous(&message, false));
            let expected = match lapses {
                13 => Course::GiveUp,
                5.. => Course::Trial,
                _ => Course::Suspect,
            };
            assert_eq!(Standing::of(&message, false).course(3, true), expected, "{lapses}");
        }
    }

    #[test]
    fn without_isolation_a_task_that_has_crashed_elsewhere_runs_alone() {
        assert_eq!(standing(false, 0, 1).course(3, false), Course::Trial);
        assert_eq!(standing(true, 1, 0).course(3, false), Course::Suspect);
    }
}
