//! The Garenne collector: every task's one final record, every batch's one done notice.
//!
//! The path of a result, in the order of the modules:
//!
//! 1. [`ingest`] receives deliveries of three queues (results, dead letters, unrouted messages), decodes
//!    them into groups, and acknowledges each group when it is committed.
//! 2. [`rules`] decides what a group changes. Pure; a [`rules::batch`] is a small state machine.
//! 3. [`store`] applies the changes in one transaction, including notices.
//! 4. `outbox` publishes notices, and tasks that are published again.
//!
//! Besides, `query` responds to queries, and `control` contains everything that runs periodically:
//! heartbeats, deadlines of batches and leases, the release of parked tasks, retention, the detection of
//! stalls. [`Collector`] starts and stops all of them.
//!
//! The collector runs no task and retries none; it only records how they ended.

mod control;
pub mod ingest;
mod outbox;
mod query;
pub mod rules;
mod service;
pub mod store;

/// What our messages say of who published them.
const APP_ID: &str = concat!("garenne-collector/", env!("CARGO_PKG_VERSION"));

pub use control::state::CollectorState;
pub use service::{Collector, StartError};
