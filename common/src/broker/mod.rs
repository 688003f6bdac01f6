//! Connections to RabbitMQ, confirmed publishing, and consuming that outlives connections. This is
//! the only module that uses lapin.
//!
//! * [`Link`] is one connection, opened on demand and again after it was lost.
//! * [`Publisher`] hands messages to a task that owns a confirm channel; `Ok` means that the broker
//!   has confirmed the message.
//! * [`Consumer`] is a stream of deliveries over epochs. Each new channel is a new epoch, and
//!   settling a delivery of an older one does nothing, because the broker has requeued it already.
//!
//! Messages of [`wire`](crate::wire) come in and go out; their contents are never interpreted here.
//! lapin's own recovery is disabled: it has states from which nothing wakes. A process publishes
//! and consumes over separate links, since RabbitMQ stops reading from a blocked publisher's
//! connection, acknowledgements included.

mod admin;
mod backoff;
mod consume_task;
mod consumer;
mod convert;
mod delivery;
mod error;
mod limit;
mod link;
mod outage;
mod publish_task;
mod publisher;
mod queue_monitor;
#[cfg(feature = "failpoints")]
mod sabotage;
mod tls;
mod transport;
mod window;

pub use admin::{Admin, QueueStatus};
pub use consumer::{Consumer, Pauser, Settler};
#[doc(hidden)]
pub use convert::parse_message;
pub use delivery::{ConsumerSpec, Delivery, DeliveryTag, QueueSource};
pub use error::BrokerError;
pub use limit::BrokerLimit;
pub use link::Link;
pub use publisher::{Outgoing, Publisher, Receipt, Room};
pub use queue_monitor::Health;
pub use tls::TlsFault;
