//! The Garenne collector: every task's one final record, every batch's one done notice.
//!
//! The path of a result, from top to bottom:
//!
//! 1. `pipeline` receives deliveries of three queues (results, dead letters, unrouted messages),
//! 2. [`group`] decodes them and gathers them into groups,
//! 3. [`aggregate`] decides what a group changes (pure; a [`batch`] is a small state machine),
//! 4. [`store`] makes it so in one transaction, notices included,
//! 5. `pipeline` acknowledges the group, and
//! 6. `relay` publishes what waits in the outboxes: `notices`, and tasks to be sent again (`resends`).
//!
//! Beside it, `answers` answers questions, `deadlines` ends batches that their producer left
//! behind, `release` lets parked tasks go that a `live` worker knows, and `retention` deletes what is
//! old. [`Collector`] starts and stops all of them.
//!
//! The collector runs no task and retries none: it only hears how they ended.

pub mod aggregate;
mod answers;
pub mod batch;
mod clock;
mod deadlines;
pub mod group;
mod heartbeat;
mod keeper;
pub mod lease;
mod letters;
mod live;
mod notices;
mod outlets;
mod peers;
mod pipeline;
mod refusal;
mod relay;
mod release;
mod replies;
mod resends;
mod retention;
mod service;
mod state;
pub mod store;
mod watchdog;

/// What our messages say of who published them.
const APP_ID: &str = concat!("garenne-collector/", env!("CARGO_PKG_VERSION"));

pub use service::{Collector, StartError};
pub use state::CollectorState;
