//! What is known of a task's earlier deliveries, and how it may run because of it. Pure.
//!
//! When a worker dies, the broker takes back all of its deliveries: the one task that killed it and the
//! many that only waited beside it. They look alike from outside. So each of them is a suspect and runs
//! isolated once, which costs an innocent task nothing and identifies the guilty one.

use std::time::Duration;

use garenne_common::failpoints::Protection;
use garenne_common::wire::{self, CrashRecord, Message};

/// From this number of deliveries on, a message no longer waits beside others: workers that hold it
/// die repeatedly, and each death also counts for every task that waits in the same worker.
const EXCLUSIVE_FROM: u64 = 5;
/// Deliveries without a settlement that a task may have beyond its crash budget.
const TOLERANCE: u64 = 10;
/// How long a message waits that is returned by being published again. Prevents a tight loop between
/// two workers that both return it.
pub(crate) const RETURN_DELAY: Duration = Duration::from_secs(1);

/// Earlier deliveries and crashes of a task.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct DeliveryHistory {
    /// It was delivered before.
    pub(crate) returned: bool,
    /// Number of deliveries without a settlement: the broker's count plus the number of lapsed leases,
    /// since the broker's count restarts with each lease.
    pub(crate) deliveries: u64,
    pub(crate) crashes: CrashRecord,
}

/// How a task may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RunMode {
    /// Beside other tasks, in the worker's process.
    Normal,
    /// In a child process, where the worker has those.
    Isolated,
    /// In a child process, or with no other task beside it where the worker has none; at most one such
    /// task per worker.
    Exclusive,
    /// Not again.
    GiveUp,
}

/// Whether a delivery was made before. Cheap; called for every delivery.
pub(crate) fn was_delivered_before(message: &Message, redelivered: bool) -> bool {
    redelivered || wire::crash::is_marked(message)
}

/// Whether requeueing this message could make its task look guilty: RabbitMQ up to 4.2 counts each
/// return, and workers that stop in order must not add to the count.
pub(crate) fn has_many_deliveries(message: &Message) -> bool {
    wire::crash::deliveries(message) >= EXCLUSIVE_FROM
}

impl DeliveryHistory {
    /// Reads the history from a message that has been validated.
    pub(crate) fn of(message: &Message, redelivered: bool) -> Self {
        let crashes = CrashRecord::read(message).unwrap_or_default();
        let lapses = wire::lease::lapses(message);
        let deliveries = wire::crash::deliveries(message).saturating_add(lapses);
        let returned = redelivered || wire::crash::is_returned(message);
        Self { returned, deliveries, crashes }
    }

    /// How a task with this history may run if it may crash `budget` times. `isolating` says whether it
    /// can run in a child process.
    pub(crate) fn run_mode(&self, budget: u32, isolating: bool) -> RunMode {
        let limit = TOLERANCE + u64::from(budget);
        if self.deliveries >= limit && Protection::DeliveryBudget.is_enabled() {
            RunMode::GiveUp
        } else if self.deliveries >= EXCLUSIVE_FROM || (self.crashes.count > 0 && !isolating) {
            RunMode::Exclusive
        } else if self.is_suspect() {
            RunMode::Isolated
        } else {
            RunMode::Normal
        }
    }

    /// Whether the task may have crashed a worker.
    pub(crate) fn is_suspect(&self) -> bool {
        self.returned || self.deliveries > 0 || self.crashes.count > 0
    }

    /// Explains why a task is given up although no crash of it has been observed.
    pub(crate) fn evidence(&self) -> String {
        let (deliveries, crashes) = (self.deliveries, self.crashes.count);
        let mut text = format!(
            "delivered {} times and never settled: each time the worker that had it died, lost \
             its connection or fell silent; {crashes} crashes were seen in isolation",
            deliveries.saturating_add(1)
        );
        if crashes > 0 {
            text.push_str(":\n");
            text.push_str(&self.crashes.log);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history(returned: bool, deliveries: u64, count: u32) -> DeliveryHistory {
        let crashes = CrashRecord { count, log: String::new() };
        DeliveryHistory { returned, deliveries, crashes }
    }

    #[test]
    fn the_history_decides_the_run_mode() {
        let mode = |history: DeliveryHistory| history.run_mode(3, true);
        assert_eq!(mode(history(false, 0, 0)), RunMode::Normal);
        assert_eq!(mode(history(true, 0, 0)), RunMode::Isolated);
        assert_eq!(mode(history(true, 1, 0)), RunMode::Isolated);
        assert_eq!(mode(history(false, 0, 1)), RunMode::Isolated);
        assert_eq!(mode(history(true, EXCLUSIVE_FROM, 0)), RunMode::Exclusive);
        assert_eq!(mode(history(true, 12, 0)), RunMode::Exclusive);
        assert_eq!(mode(history(true, 13, 0)), RunMode::GiveUp);
    }

    #[test]
    fn lapsed_leases_count_like_deliveries() {
        let mut message = Message::default();
        assert!(!was_delivered_before(&message, false));
        for lapses in 1..=13 {
            wire::lease::mark_lapsed(&mut message);
            assert!(was_delivered_before(&message, false));
            let expected = match lapses {
                13 => RunMode::GiveUp,
                5.. => RunMode::Exclusive,
                _ => RunMode::Isolated,
            };
            assert_eq!(
                DeliveryHistory::of(&message, false).run_mode(3, true),
                expected,
                "{lapses}"
            );
        }
    }

    #[test]
    fn without_isolation_a_crashed_task_runs_exclusively() {
        assert_eq!(history(false, 0, 1).run_mode(3, false), RunMode::Exclusive);
        assert_eq!(history(true, 1, 0).run_mode(3, false), RunMode::Isolated);
    }
}
