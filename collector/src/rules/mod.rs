//! The rules of the collector: what reports change, and when time is believed. Pure; no IO, and the time is
//! a parameter.

pub mod aggregate;
pub mod batch;
pub(crate) mod clock;
pub mod lease;
