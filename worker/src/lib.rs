//! The Garenne worker: takes tasks from RabbitMQ, runs them, and settles each exactly once.
//!
//! A task's life here is one pipeline, and each step is a module:
//!
//! ```text
//! intake ──► guard ──► execute ──► decide ──► settle
//!    └ deliveries  └ sound, known,  └ Outcome  └ Disposition  └ successor confirmed, then ack
//!                    not expired?
//! ```
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

mod acks;
mod admit;
mod aides;
mod announce;
mod attempt;
mod builtin;
mod cancels;
mod ceilings;
mod command;
mod context;
mod control;
mod decide;
mod doors;
mod execute;
mod faults;
mod file_root;
mod fitness;
mod guard;
mod handler;
mod heartbeat;
mod inflight;
mod intake;
mod isolate;
mod lease;
mod line;
mod outcome;
#[cfg(feature = "program")]
pub mod program;
mod register;
mod settle;
mod slots;
mod state;
mod suspect;
mod watchdog;
mod worker;

pub use ceilings::Ceilings;
pub use context::Context;
pub use decide::{decide, heed};
pub use outcome::{Crash, Disposition, Outcome, Retryable, TaskError, Trouble, TroubleKind};
pub use state::WorkerState;
pub use worker::{Builder, Running, Worker, WorkerError};

/// What a worker decides, without its IO: what the pipeline above is made of.
///
/// Public for simulations and tests, which run it against a broker of their own making. No part of
/// the stable interface: it changes with the worker.
pub mod protocol {
    pub use crate::acks::Ack;
    pub use crate::admit::{Admission, admit, admit_member, split};
    pub use crate::inflight::{Begin, DeliveryRef, Inflight, Key};
    pub use crate::settle::{
        Action, Answer, Arrival, Carrier, Ended, Lane, Outbound, Reply, SettleCore, Settlement,
        Signature, Subject, Successor, Then, Ticket,
    };
}
