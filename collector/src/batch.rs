//! A batch as a small state machine: facts arrive in any order, and it ends once.
//!
//! Pure. Nothing here knows which tasks were counted already: that is the business of whoever
//! inserts results, and it calls [`Batch::member_ended`] for each new one only.

use garenne_common::wire::{BatchState, BatchSummary, Notice};
use garenne_common::{BatchId, Status, Timestamp};

/// All that is known of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Which.
    pub id: BatchId,
    /// Where it is in its life.
    pub state: BatchState,
    /// How many tasks it has, once it is sealed.
    pub total: Option<u64>,
    /// Members that succeeded.
    pub succeeded: u64,
    /// Members that were given up.
    pub failed: u64,
    /// Members that were cancelled.
    pub cancelled: u64,
    /// The earliest moment that any report about it named.
    pub opened_at: Timestamp,
    /// Unsealed by then, it is abandoned.
    pub deadline: Timestamp,
    /// Whether its producer's opening was seen, so that `deadline` is its word and not our default.
    pub announced: bool,
    /// When it was sealed.
    pub sealed_at: Option<Timestamp>,
    /// When its last member so far ended.
    pub last_ended_at: Option<Timestamp>,
    /// When it ended itself.
    pub finished_at: Option<Timestamp>,
}

impl Batch {
    /// A batch at the first report about it, whichever that is: members overtake the opening, and
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

    /// Its producer announced it.
    pub fn opened(&mut self, at: Timestamp, deadline: Timestamp) {
        self.mentioned(at);
        // Of two announcements the later deadline counts, so that their order does not.
        self.deadline = if self.announced { self.deadline.max(deadline) } else { deadline };
        self.announced = true;
    }

    /// Its producer said how many members it has. The first word counts.
    pub fn sealed(&mut self, count: u64, at: Timestamp) {
        self.mentioned(at);
        if self.total.is_none() {
            self.total = Some(count);
            self.sealed_at = Some(at);
        }
    }

    /// A member ended that had not ended before.
    ///
    /// Members go on being counted when the batch is over: the counts stay true, the state stays.
    pub fn member_ended(&mut self, status: Status, at: Timestamp) {
        self.mentioned(at);
        match status {
            Status::Succeeded => self.succeeded += 1,
            Status::Failed => self.failed += 1,
            Status::Cancelled => self.cancelled += 1,
        }
        self.last_ended_at = self.last_ended_at.max(Some(at));
    }

    /// A report named it without changing it.
    pub fn mentioned(&mut self, at: Timestamp) {
        self.opened_at = self.opened_at.min(at);
    }

    /// Draws the conclusion from the facts so far; the notice, if this ends the batch.
    ///
    /// `>=`, because more members than announced (a producer's mistake) must not keep it from ending.
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

    /// Ends it as abandoned, if it is still waiting for its seal at `now`.
    pub fn abandon(&mut self, now: Timestamp) -> Option<Notice> {
        if self.state != BatchState::Open || self.deadline > now {
            return None;
        }
        self.state = BatchState::Abandoned;
        self.finished_at = Some(now);
        Some(Notice::Batch(self.summary()))
    }

    /// Ends it as abandoned, if it is not over: somebody knows that its members will not end.
    pub fn abandon_as_asked(&mut self, now: Timestamp) -> Option<Notice> {
        if self.state.is_final() {
            return None;
        }
        self.state = BatchState::Abandoned;
        self.finished_at = Some(now);
        Some(Notice::Batch(self.summary()))
    }

    /// What others are told of it.
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
    fn an_empty_batch_is_done_when_it_is_sealed() {
        let mut batch = batch();
        assert_eq!(batch.settle(), None);
        batch.sealed(0, at(20));
        assert!(batch.settle().is_some());
        assert_eq!((batch.state, batch.finished_at), (BatchState::Done, Some(at(20))));
        assert_eq!(batch.settle(), None, "one notice");
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
    fn a_sealed_batch_waits_for_its_members_however_long() {
        let mut batch = batch();
        batch.sealed(1, at(20));
        assert_eq!(batch.settle(), None);
        assert_eq!(batch.abandon(at(9_999)), None);
    }
}
