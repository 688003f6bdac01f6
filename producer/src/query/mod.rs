//! Queries to the collector: the state of tasks and batches, cancel requests, dead letters.
//!
//! Queries go to the collector's queue; responses come back through [`crate::wait`]'s reply queue.
//! [`client`] sends a query and waits for its response; [`queries`], [`cancel`] and [`letters`] are
//! the typed methods of [`Producer`](crate::Producer); [`recovery`] asks for results whose replies
//! may be lost. Nothing here is needed to run tasks.

pub(crate) mod cancel;
pub(crate) mod client;
pub(crate) mod letters;
pub(crate) mod queries;
pub(crate) mod recovery;

pub use cancel::BatchCancelled;
pub use queries::Totals;
