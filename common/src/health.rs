//! What is wrong with this process right now, in one place: parts of the process raise and clear
//! problems here; heartbeats, `garenne doctor` and health checks read them.
//!
//! A problem is a state, not an event. It is logged once when it begins, again at intervals while it
//! lasts, and once when it ends.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::timestamp::Timestamp;

/// How long something that could go on may stand still before it is a problem.
pub const STALL_TIMEOUT: Duration = Duration::from_secs(10);

/// How often a problem that lasts is logged again.
const REMINDER_INTERVAL: Duration = Duration::from_mins(1);

/// Something that keeps a process from doing its work. Travels in heartbeats.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// Stable name of the kind of problem, for machines: `settling_stalled`, `store_failing`, ….
    pub code: String,
    /// What is stuck, since when, and what it waits for; one sentence for people.
    pub detail: String,
    /// When the problem began, by this process's wall clock.
    pub since: Timestamp,
}

/// The problems of one process. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct ProcessHealth(Arc<Mutex<BTreeMap<&'static str, Raised>>>);

#[derive(Debug)]
struct Raised {
    detail: String,
    since: Timestamp,
    logged: Instant,
}

impl ProcessHealth {
    /// Reports a problem, or updates the detail of one that is known. At most one per code.
    pub fn raise(&self, code: &'static str, detail: impl Into<String>) {
        let (detail, now) = (detail.into(), Instant::now());
        let mut problems = self.problems_mut();
        let Some(raised) = problems.get_mut(code) else {
            tracing::warn!(problem = code, "unhealthy: {detail}");
            problems.insert(code, Raised { detail, since: Timestamp::now(), logged: now });
            return;
        };
        raised.detail = detail;
        if now.duration_since(raised.logged) >= REMINDER_INTERVAL {
            raised.logged = now;
            tracing::warn!(problem = code, since = %raised.since, "still unhealthy: {}", raised.detail);
        }
    }

    /// The problem is over. Does nothing if there was none.
    pub fn clear(&self, code: &'static str) {
        if let Some(raised) = self.problems_mut().remove(code) {
            tracing::info!(problem = code, since = %raised.since, "healthy again");
        }
    }

    /// [`raise`](Self::raise) if there is a detail, else [`clear`](Self::clear).
    pub fn set(&self, code: &'static str, detail: Option<String>) {
        match detail {
            Some(detail) => self.raise(code, detail),
            None => self.clear(code),
        }
    }

    /// All problems, in the order of their codes.
    pub fn problems(&self) -> Vec<Problem> {
        let problem = |(code, raised): (&&'static str, &Raised)| Problem {
            code: (*code).to_owned(),
            detail: raised.detail.clone(),
            since: raised.since,
        };
        self.problems_mut().iter().map(problem).collect()
    }

    /// Whether there is no problem.
    pub fn is_healthy(&self) -> bool {
        self.problems_mut().is_empty()
    }

    fn problems_mut(&self) -> MutexGuard<'_, BTreeMap<&'static str, Raised>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_lasts_until_it_is_cleared_and_keeps_its_beginning() {
        let health = ProcessHealth::default();
        health.raise("b", "first");
        health.raise("a", "other");
        let since = health.problems()[1].since;
        health.clone().raise("b", "second");
        let problems = health.problems();
        let seen: Vec<_> = problems.iter().map(|p| (&*p.code, &*p.detail)).collect();
        assert_eq!(seen, [("a", "other"), ("b", "second")]);
        assert_eq!(problems[1].since, since);
        health.set("a", None);
        health.clear("b");
        assert!(health.is_healthy());
    }
}
