//! What a Garenne task is and how it travels.
//!
//! The pure half ([`batch_key`], [`bundling`], [`fingerprint`], [`names`], [`task`], [`outcome`], [`printable`],
//! [`reply_gate`], [`retry`], [`topology`], [`wire`]) does no IO and knows neither tokio nor lapin. The
//! other half ([`broker`], [`config`], [`health`], and the module `service` with its feature) is how every
//! Garenne process meets the outside world, and [`failpoints`] is for the tests of the tests. Nothing lives
//! here that only one crate needs.

pub mod batch_key;
pub mod broker;
pub mod bundling;
pub mod config;
pub mod failpoints;
pub mod fingerprint;
pub mod health;
pub mod names;
pub mod outcome;
pub mod printable;
pub mod reply_gate;
pub mod retry;
#[cfg(feature = "service")]
pub mod service;
pub mod task;
pub mod timestamp;
pub mod topology;
pub mod wire;

pub use fingerprint::Fingerprint;
pub use health::{Problem, ProcessHealth};
pub use names::{BatchId, InvalidName, Namespace, QueueName, TaskId, TaskName};
pub use outcome::{DeadReason, Status, TaskResult};
pub use reply_gate::{QueuePattern, ReplyGate, ReplyRule};
pub use retry::RetryPolicy;
pub use task::{Options, ReplyFormat, ReplyTo, Task, TaskMessage};
pub use timestamp::Timestamp;
pub use wire::{Codec, Payload};

/// The version of this build, as `--version`, reports and client properties show it.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
