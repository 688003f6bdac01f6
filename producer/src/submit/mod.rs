//! Submitting tasks: from a [`Submission`] to the broker's confirm.
//!
//! Submissions come in; messages go to the publisher. In the order of a submission's life:
//! [`submission`] checks and encodes it, [`known_queues`] checks that its queue exists,
//! [`coalesce`] (one task) or [`bulk`] (many) decides which tasks travel together, [`dispatch`]
//! builds the message and waits for the confirm, and [`members`] counts confirmed members of a
//! batch. Nothing here waits for results.

pub(crate) mod bulk;
pub(crate) mod coalesce;
pub(crate) mod dispatch;
pub(crate) mod known_queues;
pub(crate) mod members;
pub(crate) mod submission;

pub use submission::Submission;
