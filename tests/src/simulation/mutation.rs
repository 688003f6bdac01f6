//! Mistakes that can be planted in a schedule, to see that the simulation would find them.
//!
//! Each takes one guard out of the wiring between the real code and the model; the real code is the
//! same. `tests.rs` looks for each of them.

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mutation {
    /// A worker takes a published successor for confirmed.
    AckBeforeConfirm,
    /// A worker takes a lost confirm for a confirm.
    LostConfirmCounts,
    /// A worker does not know what it runs.
    NoAdoption,
    /// A worker acknowledges deliveries of a lost channel on the new one.
    NoEpochCheck,
    /// A worker acknowledges everything up to what is done.
    AckTooMuch,
    /// A retry asks for the same attempt again.
    SameAttemptAgain,
    /// A retry keeps the broker's account of its last way.
    KeepDeathMarks,
    /// A worker waits for room to publish in line, and hears of nothing meanwhile.
    WaitsForRoomInLine,
    /// A stopping worker acknowledges what it has not begun.
    DrainAcks,
    /// A producer believes that what it sent has arrived.
    NoConfirmWait,
    /// The exchange of tasks has no alternate.
    NoAlternateExchange,
    /// Queues dead-letter at most once.
    AtMostOnceDeadLettering,
    /// A collector acknowledges a group before it commits it.
    AckBeforeCommit,
    /// A later result of a task replaces the first.
    LastResultWins,
    /// Notices are kept in memory instead of in the transaction.
    NoOutbox,
    /// A notice is forgotten when it is sent.
    NoConfirmForNotices,
    /// Batches are abandoned without a look at the queue.
    AbandonUndrained,
}

impl Mutation {
    pub(super) const ALL: [Self; 17] = [
        Self::AckBeforeConfirm,
        Self::LostConfirmCounts,
        Self::NoAdoption,
        Self::NoEpochCheck,
        Self::AckTooMuch,
        Self::SameAttemptAgain,
        Self::KeepDeathMarks,
        Self::WaitsForRoomInLine,
        Self::DrainAcks,
        Self::NoConfirmWait,
        Self::NoAlternateExchange,
        Self::AtMostOnceDeadLettering,
        Self::AckBeforeCommit,
        Self::LastResultWins,
        Self::NoOutbox,
        Self::NoConfirmForNotices,
        Self::AbandonUndrained,
    ];
}
