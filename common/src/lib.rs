//! The model of a Garenne task, and how it is transported.
//!
//! The pure half ([`batch_key`], [`bundling`], [`fingerprint`], [`names`], [`outcome`],
//! [`printable`], [`reply_gate`], [`retry`], [`task`], [`timestamp`], [`topology`], [`wire`]) does
//! no IO and depends on neither tokio nor lapin. The other half ([`broker`], [`config`],
//! [`health`], and `service` with the feature of that name) is what every Garenne process needs at
//! run time. [`failpoints`] serves the tests only. Code that only one crate needs is not here.

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

/// The version of this build, as shown by `--version`, in heartbeats and in client properties.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
