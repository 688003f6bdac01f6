//! The current problems of this process. Its parts raise and clear them; heartbeats, `garenne
//! doctor` and health checks read them.
//!
//! A problem is a state and not an event. It is logged once when it begins, at intervals while it
//! lasts, and once when it ends.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::timestamp::Timestamp;

/// How long pending work may make no progress before that is a problem.
pub const STALL_TIMEOUT: Duration = Duration::from_secs(10);

/// How often a lasting problem is logged again.
const REMINDER_INTERVAL: Duration = Duration::from_mins(1);

/// A condition that keeps a process from doing its work. Part of heartbeats.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// Stable name of the kind of problem: `settling_stalled`, `store_failing`, ….
    pub code: String,
    /// One sentence for people: what is blocked, since when, and what it waits for.
    pub detail: String,
    /// When the problem began, by the wall clock of the process.
    pub since: Timestamp,
}

/// The current problems of one process. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct ProcessHealth(Arc<Mutex<BTreeMap<&'static str, Raised>>>);

#[derive(Debug)]
struct Raised {
    detail: String,
    since: Timestamp,
    logged: Instant,
}

impl ProcessHealth {
    /// Raises a problem, or updates the detail of the current one with this code.
    pub fn raise(&self, code: &'static str, detail: impl Into<String>) {
        let (detail, now) = (detail.into(), Instant::now());
        let mut problems = self.0.lock();
        let Some(raised) = problems.get_mut(code) else {
            tracing::warn!(problem = code, "unhealthy: {detail}");
            problems.insert(code, Raised { detail, since: Timestamp::now(), logged: now });
            return;
        };
        raised.detail = detail;
        if now.duration_since(raised.logged) >= REMINDER_INTERVAL {
            raised.logged = now;
            let Raised { detail, since, .. } = raised;
            tracing::warn!(problem = code, %since, "still unhealthy: {detail}");
        }
    }

    /// Clears a problem. Does nothing if there is none with this code.
    pub fn clear(&self, code: &'static str) {
        if let Some(raised) = self.0.lock().remove(code) {
            tracing::info!(problem = code, since = %raised.since, "healthy again");
        }
    }

    /// [Raises](Self::raise) a problem if there is a detail, [clears](Self::clear) it otherwise.
    pub fn set(&self, code: &'static str, detail: Option<String>) {
        match detail {
            Some(detail) => self.raise(code, detail),
            None => self.clear(code),
        }
    }

    /// The current problems in the order of their codes.
    pub fn problems(&self) -> Vec<Problem> {
        let problem = |(code, raised): (&&'static str, &Raised)| Problem {
            code: (*code).to_owned(),
            detail: raised.detail.clone(),
            since: raised.since,
        };
        self.0.lock().iter().map(problem).collect()
    }

    /// Whether there is no problem.
    pub fn is_healthy(&self) -> bool {
        self.0.lock().is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_lasts_until_it_is_cleared_and_keeps_its_start() {
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
