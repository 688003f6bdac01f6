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
//! Where things are:
//! * [`Producer`] connects and submits; [`Submission`] is a task with its options.
//! * [`Handle`] waits for one task. Replies are best effort, so it also asks the collector.
//! * [`Batch`] counts tasks and waits for all of them; [`Notices`] tells of whatever gets done.
//! * [`Producer::dead_letters`], [`Producer::replay`] and [`Producer::purge`] deal with what was given up.
//! * `Producer::ask` and its conveniences put questions to the collector.
//!
//! The library runs no tasks and stores nothing; it never prints. The `garenne` command is built on it.

mod ask;
mod batch;
mod bulk;
mod cancel;
mod coalesce;
mod deadline;
mod dispatch;
mod error;
mod handle;
mod letters;
mod notices;
mod outstanding;
mod producer;
mod questions;
mod queues;
mod recovery;
mod replies;
mod retries;
mod submission;

pub use batch::{Batch, SealedBatch};
pub use cancel::BatchCancelled;
pub use error::{OutputError, QueryError, SubmitError};
pub use handle::Handle;
pub use notices::{NoticeFilter, Notices};
pub use producer::Producer;
pub use questions::Totals;
pub use retries::{Retried, RetryNotes};
pub use submission::Submission;
