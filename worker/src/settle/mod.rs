//! Settling: the one place that tells the broker what became of a delivery.
//!
//! Every message gets its successor first (a result, its next attempt, a dead letter, itself under an
//! id), the broker confirms the successor, and only then the message is acknowledged.
//!
//! [`Signature`] makes the orders, [`SettleCore`] knows what may happen when, and [`SettleTask`] does
//! it. The first two do no IO and read no clock, so that a simulation can run
//! them against a broker of its own making.

mod bundle;
mod carrier;
mod core;
mod driver;
mod gauge;
mod lane;
mod order;
mod signature;

pub use self::core::{Action, Answer, Outbound, SettleCore, Ticket};
pub use carrier::Carrier;
pub(crate) use driver::SettleTask;
pub(crate) use gauge::SettleGauge;
pub use lane::Lane;
pub use order::{Reply, Settlement, Subject, Successor, Then};
pub use signature::{Arrival, Ended, Signature};
