//! The rules of leases: which execution of a leased task may report its end. Pure.
//!
//! A lease begins with the whole task (`garenne_common::wire::Lease`) and ends with the final record of the
//! task, with its release, or by lapsing. A lapsed task is published again, and later reports of the earlier
//! execution are rejected.

use garenne_common::wire::{Fence, LeaseChange};

/// The lease of a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseRecord {
    /// The newest known execution.
    pub fence: Fence,
    /// Its state.
    pub state: LeaseState,
}

/// The state of an execution under a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseState {
    /// It is running, as far as known.
    Held,
    /// It is over; the next message of the task is in the broker.
    Released,
    /// It was not renewed; the task has been published again.
    Lapsed,
}

impl LeaseState {
    /// The name in the store.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Held => "held",
            Self::Released => "released",
            Self::Lapsed => "lapsed",
        }
    }

    /// All states; the store looks up names in this list.
    pub const ALL: [Self; 3] = [Self::Held, Self::Released, Self::Lapsed];
}

impl LeaseRecord {
    /// Whether a new execution takes over the lease. Of two with the same number the first one keeps it:
    /// both come from the same message, and if the first one is gone, its lease lapses.
    pub fn yields_to(&self, fence: &Fence) -> bool {
        fence.number > self.fence.number
    }

    /// Whether this execution may report the end of the task.
    pub fn admits(&self, fence: &Fence) -> bool {
        self.yields_to(fence) || (*fence == self.fence && self.state != LeaseState::Lapsed)
    }

    /// The state after a note; `None` if its sender does not hold the lease.
    pub fn after(&self, fence: &Fence, change: LeaseChange) -> Option<LeaseState> {
        let holds = *fence == self.fence && self.state == LeaseState::Held;
        holds.then_some(match change {
            LeaseChange::Renewed => LeaseState::Held,
            LeaseChange::Released => LeaseState::Released,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fence(number: u64, execution: &str) -> Fence {
        Fence { number, execution: execution.to_owned() }
    }

    fn record(state: LeaseState) -> LeaseRecord {
        LeaseRecord { fence: fence(2, "b"), state }
    }

    #[test]
    fn only_the_newest_execution_is_admitted() {
        let held = record(LeaseState::Held);
        assert!(held.admits(&fence(2, "b")) && held.admits(&fence(3, "c")));
        assert!(!held.admits(&fence(1, "a")) && !held.admits(&fence(2, "other")));
        assert!(held.yields_to(&fence(3, "c")) && !held.yields_to(&fence(2, "other")));
    }

    #[test]
    fn a_lapsed_execution_is_rejected() {
        let lapsed = record(LeaseState::Lapsed);
        assert!(!lapsed.admits(&fence(2, "b")) && lapsed.admits(&fence(3, "c")));
        assert_eq!(lapsed.after(&fence(2, "b"), LeaseChange::Renewed), None);
    }

    #[test]
    fn notes_apply_to_the_lease_of_their_own_execution() {
        let held = record(LeaseState::Held);
        let by_holder = |change| held.after(&fence(2, "b"), change);
        assert_eq!(by_holder(LeaseChange::Renewed), Some(LeaseState::Held));
        assert_eq!(by_holder(LeaseChange::Released), Some(LeaseState::Released));
        assert_eq!(held.after(&fence(1, "a"), LeaseChange::Released), None);
    }
}
