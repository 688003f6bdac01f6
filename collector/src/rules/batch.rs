//! A batch as a small state machine: reports arrive in any order, and it ends once.
//!
//! Pure. It does not know which tasks have been counted: the caller, which inserts results, calls
//! [`Batch::member_ended`] for fresh ones only.

use garenne_common::wire::{BatchState, BatchSummary, Notice};
use garenne_common::{BatchId, Status, Timestamp};

/// A batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Its id.
    pub id: BatchId,
    /// Its state.
    pub state: BatchState,
    /// Number of its tasks, once it is sealed.
    pub total: Option<u64>,
    /// Number of members that succeeded.
    pub succeeded: u64,
    /// Number of members that failed.
    pub failed: u64,
    /// Number of members that were cancelled.
    pub cancelled: u64,
    /// The earliest time in any report about it.
    pub opened_at: Timestamp,
    /// It is abandoned if it is not sealed by then.
    pub deadline: Timestamp,
    /// Whether its producer has announced it, so that `deadline` is not the default.
    pub announced: bool,
    /// When it was sealed.
    pub sealed_at: Option<Timestamp>,
    /// When its last member so far ended.
    pub last_ended_at: Option<Timestamp>,
    /// When it ended itself.
    pub finished_at: Option<Timestamp>,
}

impl Batch {
    /// A batch with the first report about it, of any kind: members may arrive before the announcement, and
    /// producers in other languages send none.
    pub fn first_seen(id: BatchId, at: Timestamp, default_deadline: Timestamp) -> Self {
        Self {
            id,
            state: BatchState::Open,
            total: None,
            succeeded: 0,
            failed: 0,
            cancelled: 0,
            opened_at: at,
            deadline: default_deadline,
            announced: false,
            sealed_at: None,
            last_ended_at: None,
            finished_at: None,
        }
    }

    /// Records the announcement of its producer.
    pub fn opened(&mut self, at: Timestamp, deadline: Timestamp) {
        self.mentioned(at);
        // The later deadline of two announcements counts, so that their order does not matter.
        self.deadline = if self.announced { self.deadline.max(deadline) } else { deadline };
        self.announced = true;
    }

    /// Records the number of its members. The first seal counts.
    pub fn sealed(&mut self, count: u64, at: Timestamp) {
        self.mentioned(at);
        if self.total.is_none() {
            self.total = Some(count);
            self.sealed_at = Some(at);
        }
    }

    /// Counts a member that has ended.
    ///
    /// Members are also counted after the end of the batch: the counts stay true, the state does not change.
    pub fn member_ended(&mut self, status: Status, at: Timestamp) {
        self.mentioned(at);
        match status {
            Status::Succeeded => self.succeeded += 1,
            Status::Failed => self.failed += 1,
            Status::Cancelled => self.cancelled += 1,
        }
        self.last_ended_at = self.last_ended_at.max(Some(at));
    }

    /// Records that a report mentions it.
    pub fn mentioned(&mut self, at: Timestamp) {
        self.opened_at = self.opened_at.min(at);
    }

    /// Updates the state. Returns the notice if this ends the batch.
    ///
    /// More members than announced, a mistake of the producer, must not prevent the end.
    pub fn settle(&mut self) -> Option<Notice> {
        let total = self.total.filter(|_| !self.state.is_final())?;
        self.state = BatchState::Sealed;
        if self.summary().ended() < total {
            return None;
        }
        self.state = BatchState::Done;
        self.finished_at = self.last_ended_at.or(self.sealed_at);
        Some(Notice::Batch(self.summary()))
    }

    /// Abandons it if it is past its deadline at `now` and not sealed.
    pub fn abandon(&mut self, now: Timestamp) -> Option<Notice> {
        if self.state != BatchState::Open || self.deadline > now {
            return None;
        }
        self.state = BatchState::Abandoned;
        self.finished_at = Some(now);
        Some(Notice::Batch(self.summary()))
    }

    /// Abandons it on request if it has not ended.
    pub fn abandon_on_request(&mut self, now: Timestamp) -> Option<Notice> {
        if self.state.is_final() {
            return None;
        }
        self.state = BatchState::Abandoned;
        self.finished_at = Some(now);
        Some(Notice::Batch(self.summary()))
    }

    /// Its summary for notices and responses.
    pub fn summary(&self) -> BatchSummary {
        BatchSummary {
            batch: self.id.clone(),
            state: self.state,
            total: self.total,
            succeeded: self.succeeded,
            failed: self.failed,
            cancelled: self.cancelled,
            opened_at: self.opened_at,
            finished_at: self.finished_at,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Timestamp {
        Timestamp::from_millis(millis)
    }

    fn batch() -> Batch {
        Batch::first_seen(BatchId::new("b-1").unwrap(), at(10), at(1_000))
    }

    #[test]
    fn an_empty_batch_is_done_when_sealed() {
        let mut batch = batch();
        assert_eq!(batch.settle(), None);
        batch.sealed(0, at(20));
        assert!(batch.settle().is_some());
        assert_eq!((batch.state, batch.finished_at), (BatchState::Done, Some(at(20))));
        assert_eq!(batch.settle(), None, "only one notice");
    }

    #[test]
    fn more_members_than_announced_end_it_once() {
        let mut batch = batch();
        batch.member_ended(Status::Succeeded, at(30));
        batch.member_ended(Status::Failed, at(40));
        batch.sealed(1, at(20));
        assert!(batch.settle().is_some());
        batch.member_ended(Status::Failed, at(50));
        assert_eq!(batch.settle(), None);
        assert_eq!((batch.failed, batch.finished_at), (2, Some(at(40))));
    }

    #[test]
    fn an_unsealed_batch_is_abandoned_at_its_deadline_and_does_not_reopen() {
        let mut batch = batch();
        batch.opened(at(5), at(500));
        assert_eq!(batch.abandon(at(499)), None);
        assert!(batch.abandon(at(500)).is_some());
        assert_eq!(batch.abandon(at(501)), None);
        batch.member_ended(Status::Succeeded, at(600));
        batch.sealed(1, at(700));
        assert_eq!(batch.settle(), None);
        assert_eq!((batch.state, batch.succeeded), (BatchState::Abandoned, 1));
    }

    #[test]
    fn a_sealed_batch_waits_for_its_members_without_limit() {
        let mut batch = batch();
        batch.sealed(1, at(20));
        assert_eq!(batch.settle(), None);
        assert_eq!(batch.abandon(at(9_999)), None);
    }
}
