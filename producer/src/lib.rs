//! The Garenne producer as a library: submit tasks, wait for their outputs, count them in batches.
//!
//! ```no_run
//! use garenne_common::{Task, config::Config};
//! use garenne_producer::{Producer, Submission};
//! use serde::{Deserialize, Serialize};
//!
//! #[derive(Serialize, Deserialize)]
//! struct CountWords {
//!     text: String,
//! }
//!
//! impl Task for CountWords {
//!     const NAME: &'static str = "text.count_words";
//!     type Output = u64;
//! }
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let config = Config::with_broker("amqp://guest:guest@127.0.0.1:5672/%2f", "garenne")?;
//! let producer = Producer::connect(&config).await?;
//! let handle = producer.submit(CountWords { text: "to be or not".to_owned() }).await?;
//! println!("task {} is with the broker", handle.id());
//! println!("{} words", handle.output().await?);
//!
//! let patient = Submission::new(CountWords { text: "later".to_owned() }).retries(9).queue("cpu")?;
//! let id = producer.submit_detached(patient).await?;
//! println!("task {id} reports to the collector only: {:?}", producer.task_state(&id).await?);
//! producer.close().await;
//! # Ok(()) }
//! ```
//!
//! The main types:
//! * [`Producer`] connects and submits; a [`Submission`] is a task with its options.
//! * [`Handle`] waits for one task. Replies are best effort, so the library also queries the
//!   collector.
//! * [`Batch`] counts tasks and waits for all of them; [`Notices`] is a subscription to done
//!   notices.
//! * [`Producer::dead_letters`], [`Producer::replay`] and [`Producer::purge`] list, replay and
//!   delete dead letters.
//! * [`Producer::query`] sends any query to the collector; methods such as [`Producer::task_state`]
//!   are typed shortcuts.
//!
//! The library runs no tasks, stores nothing and prints nothing. The command `garenne` is built on
//! it.

mod deadline;
mod error;
mod producer;
mod query;
mod session;
mod submit;
mod wait;

pub use error::{OutputError, QueryError, SubmitError};
pub use producer::Producer;
pub use query::{BatchCancelled, Totals};
pub use submit::Submission;
pub use wait::{Batch, Handle, NoticeFilter, Notices, Retried, RetryNotes, SealedBatch};
