//! The Garenne worker: takes tasks from RabbitMQ, runs them, and settles each exactly once.
//!
//! The path of a task:
//!
//! ```text
//! intake ──► validate ──► admit ──► run ──► decide ──► settle
//!  deliveries  sound, known,  permit,   Outcome   Disposition   successor confirmed,
//!              not expired    isolation                         then acknowledged
//! ```
//!
//! The modules are in this order: `intake`, `run` (`validate` to `decide`), `isolate` (child processes),
//! `settle`. Besides the path there are `control` (cancel requests, heartbeats, stalls) and `handlers`.
//!
//! A worker with one handler:
//!
//! ```no_run
//! use garenne_common::{Task, config::Config};
//! use garenne_worker::{Context, TaskError, Worker};
//! use serde::{Deserialize, Serialize};
//!
//! #[derive(Serialize, Deserialize)]
//! struct Greet {
//!     name: String,
//! }
//!
//! impl Task for Greet {
//!     const NAME: &'static str = "greet";
//!     type Output = String;
//! }
//!
//! async fn greet(_: Context, task: Greet) -> Result<String, TaskError> {
//!     Ok(format!("Hello, {}!", task.name))
//! }
//!
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! let config = Config::with_broker("amqp://guest:guest@127.0.0.1", "garenne")?;
//! let worker = Worker::builder(config).register::<Greet, _, _>(greet).build()?;
//! let running = worker.start().await?;
//! tokio::signal::ctrl_c().await?;
//! running.drain().await;
//! # Ok(()) }
//! ```

mod builder;
mod control;
mod drain;
mod handlers;
mod intake;
mod isolate;
#[cfg(feature = "program")]
pub mod program;
mod run;
mod settle;
mod start;

pub use builder::{Builder, Worker, WorkerError};
pub use control::state::WorkerState;
pub use drain::Running;
pub use handlers::Context;
pub use run::decide::{apply_cancellation, decide};
pub use run::outcome::{
    Crash, Disposition, Outcome, Retryable, StartFailure, StartFailureKind, TaskError,
};
pub use run::retry_limits::RetryLimits;

/// The decisions of a worker without IO.
///
/// Public for simulations and tests, which run them against a model of the broker. Not part of the stable
/// interface.
pub mod protocol {
    pub use crate::intake::queue::{DeliveryRef, QueueIndex};
    pub use crate::intake::source::{Arrival, TaskSource};
    pub use crate::intake::unacked::{Ack, UnackedDeliveries};
    pub use crate::run::known_attempts::{AttemptKey, KnownAttempts, Registration};
    pub use crate::run::validate::{split_bundle, validate};
    pub use crate::settle::{
        Action, Attempt, Outbound, Reply, SettleCore, Settlement, SettlementBuilder, Subject,
        Successor, Ticket,
    };
}
