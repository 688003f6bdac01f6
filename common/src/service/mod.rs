//! What every long-running Garenne process needs of its operating system: logs, signals, process 1 of a
//! container, and ties to the process that started it.
//!
//! Behind the feature `service`, so that a program which only submits tasks does without.

pub mod init;
pub mod lifeline;
mod log_lines;
pub mod signals;
pub mod telemetry;
