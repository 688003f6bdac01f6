//! The scenarios: each prepares, warms up, and then measures run by run, its reference first.

mod backlog;
mod latency;
mod memory;
mod payload;
mod scaling;
mod throughput;

pub(super) use payload::size;
