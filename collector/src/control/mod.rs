//! What a collector does periodically, besides ingesting results and responding to queries.
//!
//! Each module is a task of the runtime, or state that one of them keeps. None of them acknowledges results.

pub(crate) mod deadlines;
pub(crate) mod heartbeat;
pub(crate) mod peers;
pub(crate) mod release;
pub(crate) mod retention;
pub(crate) mod state;
pub(crate) mod topology_reconciler;
pub(crate) mod watchdog;
pub(crate) mod worker_registry;
