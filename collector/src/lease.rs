//! The rules of leases: whose word counts for a task that its broker no longer holds. Pure.
//!
//! A lease begins with the whole task (`garenne_common::wire::Lease`) and ends with its final record,
//! with a release, or by lapsing: then the task is published again, and whatever the earlier
//! execution still says is too late.

use garenne_common::wire::{Fence, LeaseChange};

/// How a task's lease stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseStanding {
    /// The newest execution that was heard of.
    pub fence: Fence,
    /// What became of it.
    pub state: LeaseState,
}

/// What became of an execution under a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseState {
    /// It runs, as far as anybody knows.
    Held,
    /// It is over; the task's next message is with the broker.
    Released,
    /// It fell silent; the task was published again.
    Lapsed,
}

impl LeaseState {
    /// The word that the store keeps.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Held => "held",
            Self::Released => "released",
            Self::Lapsed => "lapsed",
        }
    }

    /// Every state; the store reads its word back by this list.
    pub const ALL: [Self; 3] = [Self::Held, Self::Released, Self::Lapsed];
}

impl LeaseStanding {
    /// Whether a new execution takes the lease over. Of two with the same number the first one stays:
    /// both came from one message, and if the first is gone, it lapses.
    pub fn yields_to(&self, fence: &Fence) -> bool {
        fence.number > self.fence.number
    }

    /// Whether this execution may still say how the task ends.
    pub fn admits(&self, fence: &Fence) -> bool {
        self.yields_to(fence) || (*fence == self.fence && self.state != LeaseState::Lapsed)
    }

    /// What a note makes of the lease; `None` if it is not for its sender to change.
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

    fn standing(state: LeaseState) -> LeaseStanding {
        LeaseStanding { fence: fence(2, "b"), state }
    }

    #[test]
    fn only_the_newest_execution_has_a_say() {
        let held = standing(LeaseState::Held);
        assert!(held.admits(&fence(2, "b")) && held.admits(&fence(3, "c")));
        assert!(!held.admits(&fence(1, "a")) && !held.admits(&fence(2, "other")));
        assert!(held.yields_to(&fence(3, "c")) && !held.yields_to(&fence(2, "other")));
    }

    #[test]
    fn a_lapsed_execution_has_none() {
        let lapsed = standing(LeaseState::Lapsed);
        assert!(!lapsed.admits(&fence(2, "b")) && lapsed.admits(&fence(3, "c")));
        assert_eq!(lapsed.after(&fence(2, "b"), LeaseChange::Renewed), None);
    }

    #[test]
    fn notes_change_the_lease_of_their_own_execution() {
        let held = standing(LeaseState::Held);
        let by_holder = |change| held.after(&fence(2, "b"), change);
        assert_eq!(by_holder(LeaseChange::Renewed), Some(LeaseState::Held));
        assert_eq!(by_holder(LeaseChange::Released), Some(LeaseState::Released));
        assert_eq!(held.after(&fence(1, "a"), LeaseChange::Released), None);
    }
}
