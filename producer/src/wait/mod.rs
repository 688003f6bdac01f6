//! Waiting: for the result of a task, the end of a batch, notices and failed attempts.
//!
//! Replies and notices come in from the broker; results go to the futures that wait for them.
//! [`replies`] reads the reply queue, [`outstanding`] records which tasks are waited for, and
//! [`handle`], [`batch`], [`notices`] and [`retries`] are what callers wait on. Nothing here
//! submits tasks, except the methods of a [`Batch`], which pass them on to [`crate::submit`].

pub(crate) mod batch;
pub(crate) mod handle;
pub(crate) mod notices;
pub(crate) mod outstanding;
pub(crate) mod replies;
pub(crate) mod retries;

pub use batch::{Batch, SealedBatch};
pub use handle::Handle;
pub use notices::{NoticeFilter, Notices};
pub use retries::{Retried, RetryNotes};
