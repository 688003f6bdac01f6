//! The operating-system side of long-running Garenne processes: logs, signals, running as process 1
//! of a container, and the tie to the parent process.
//!
//! Behind the feature `service`, which programs that only submit tasks do not need. Nothing here
//! knows about tasks or the broker.

pub mod init;
pub mod lifeline;
mod log_lines;
pub mod signals;
pub mod telemetry;
