//! Settling: the only place that tells the broker what became of a delivery.
//!
//! Settlements come in. Each message gets a successor first: a result, its next attempt, a dead letter, or
//! itself under an id. The broker confirms the successor, and only then the message is acknowledged.
//!
//! [`SettlementBuilder`] builds the settlements, [`SettleCore`] decides what may happen when, and
//! [`SettleTask`] does it. The first two do no IO and read no clock, so that a simulation can run them
//! against a model of the broker.

mod builder;
mod core;
mod driver;
mod progress;
mod reports;
mod settlement;

pub use self::core::{Action, Outbound, SettleCore, Ticket};
pub use builder::{Attempt, SettlementBuilder};
pub(crate) use driver::SettleTask;
pub(crate) use progress::SettleProgress;
pub use settlement::{Reply, Settlement, Subject, Successor};
