//! The one module that knows lapin: connections, confirmed publishing, consuming that survives.
//!
//! * [`Link`] is one connection, opened again whenever somebody needs it and it is gone.
//! * [`Publisher`] is one task that owns a confirm channel; `Ok` means the broker has the message.
//! * [`Consumer`] is a stream of deliveries over epochs: each rebuilt channel is a new epoch, and
//!   settling a delivery of an older one does nothing, because the broker has taken it back already.
//!
//! lapin's own auto-recovery stays off: it has ends from which nothing wakes. A process publishes and
//! consumes over separate links, since the broker stops reading a blocked publisher, acks included.

mod admin;
mod consumer;
mod convert;
mod delivery;
mod epochs;
mod error;
mod link;
mod publisher;
mod transport;
mod watch;
mod window;

pub use admin::{Admin, QueueStatus};
pub use consumer::{Consumer, Pauser, Settler};
#[doc(hidden)]
pub use convert::parse_message;
pub use delivery::{ConsumerSpec, Delivery, DeliveryTag, QueueSource};
pub use error::BrokerError;
pub use link::Link;
pub use publisher::{Outgoing, Publisher, Receipt, Room};
pub use watch::Health;
