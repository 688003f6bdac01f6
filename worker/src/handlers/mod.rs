//! Handlers: typed functions outside, one erased type inside, found by task name.
//!
//! A handler gets the context of an attempt and returns its outcome. It never settles anything.

use std::collections::HashMap;
use std::future::Future;
use std::marker::PhantomData;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use foldhash::fast::RandomState;
use garenne_common::wire::depth::is_too_deep;
use garenne_common::wire::{MAX_BODY_BYTES, MAX_DEPTH};
use garenne_common::{Codec, Payload, Task, TaskName};
use parking_lot::Mutex;
use tokio::time::timeout;

use crate::run::concurrency::Permit;
use crate::run::outcome::{Outcome, StartFailure, StartFailureKind, TaskError};

pub(crate) mod builtin;
pub(crate) mod command;
mod context;
pub(crate) mod crash;
pub(crate) mod file_root;
mod stdout;

pub use context::Context;
pub(crate) use context::ExecutionFacts;

/// Maximum size of an output. Results travel in bundles, and a bundle must fit into a message.
const MAX_OUTPUT_BYTES: usize = MAX_BODY_BYTES - 1024 * 1024;

/// How long a blocking handler waits for a thread.
const THREAD_START: Duration = Duration::from_secs(2);

/// An attempt under way.
pub(crate) type RunningHandler = Pin<Box<dyn Future<Output = Outcome> + Send>>;

/// A handler with its types erased.
pub(crate) trait Handler: Send + Sync {
    /// Starts an attempt. The permit is released when every holder has dropped it.
    fn run(&self, context: Context, permit: Permit) -> RunningHandler;

    /// Whether attempts run in processes of their own.
    ///
    /// Such an attempt cannot harm this process. It ends by itself when asked to, and dropping it kills
    /// the process, so that it can be waited for after its outcome is known.
    fn is_process(&self) -> bool {
        false
    }

    /// Whether the program that it needs seems to be usable, as far as that can be determined without
    /// running it.
    fn is_usable(&self) -> bool {
        true
    }
}

/// The handlers of a worker, by task name.
#[derive(Default)]
pub(crate) struct Registry(HashMap<TaskName, Arc<dyn Handler>, RandomState>);

impl Registry {
    /// Adds a handler. Returns `false` if the name is taken.
    pub(crate) fn add(&mut self, name: TaskName, handler: Arc<dyn Handler>) -> bool {
        self.0.insert(name, handler).is_none()
    }

    pub(crate) fn find(&self, name: &TaskName) -> Option<Arc<dyn Handler>> {
        self.0.get(name).cloned()
    }

    pub(crate) fn contains(&self, name: &TaskName) -> bool {
        self.0.contains_key(name)
    }

    /// The names, sorted.
    pub(crate) fn names(&self) -> Vec<TaskName> {
        let mut names: Vec<_> = self.0.keys().cloned().collect();
        names.sort_unstable();
        names
    }
}

/// An async function as a handler.
pub(crate) struct AsyncHandler<T, F> {
    function: F,
    task: PhantomData<fn() -> T>,
}

impl<T, F> AsyncHandler<T, F> {
    pub(crate) fn new(function: F) -> Self {
        Self { function, task: PhantomData }
    }
}

impl<T, F, R> Handler for AsyncHandler<T, F>
where
    T: Task,
    F: Fn(Context, T) -> R + Send + Sync,
    R: Future<Output = Result<T::Output, TaskError>> + Send + 'static,
{
    fn run(&self, context: Context, permit: Permit) -> RunningHandler {
        let args = &context.task().args;
        let codec = args.codec;
        let task = match decode::<T>(args) {
            Ok(task) => task,
            Err(outcome) => return Box::pin(std::future::ready(outcome)),
        };
        let attempt = (self.function)(context, task);
        Box::pin(async move {
            let output = attempt.await;
            drop(permit);
            outcome(codec, output)
        })
    }
}

/// A blocking function as a handler; runs on tokio's blocking thread pool.
pub(crate) struct BlockingHandler<T, F> {
    function: Arc<F>,
    task: PhantomData<fn() -> T>,
}

impl<T, F> BlockingHandler<T, F> {
    pub(crate) fn new(function: F) -> Self {
        Self { function: Arc::new(function), task: PhantomData }
    }
}

impl<T, F> Handler for BlockingHandler<T, F>
where
    T: Task,
    F: Fn(&Context, T) -> Result<T::Output, TaskError> + Send + Sync + 'static,
{
    fn run(&self, context: Context, permit: Permit) -> RunningHandler {
        let function = Arc::clone(&self.function);
        Box::pin(on_thread((context, permit), move |(context, permit)| {
            // A thread cannot be stopped from outside. It holds the permit until it returns, so that a
            // worker whose handlers hang runs fewer tasks instead of starting ever more threads.
            let _permit = permit;
            let args = &context.task().args;
            match decode::<T>(args) {
                Ok(task) => outcome(args.codec, function(&context, task)),
                Err(outcome) => outcome,
            }
        }))
    }
}

/// Runs `work` on tokio's blocking thread pool.
///
/// If the system refuses to start a thread, the pool keeps `work` until a thread is free, which may be
/// never, since the runtime's own threads count too. So `input` is taken back if `work` has not started
/// after a while.
async fn on_thread<I: Send + 'static>(
    input: I,
    work: impl FnOnce(I) -> Outcome + Send + 'static,
) -> Outcome {
    let input = Arc::new(Mutex::new(Some(input)));
    let shared = Arc::clone(&input);
    let started = std::panic::catch_unwind(AssertUnwindSafe(|| {
        tokio::task::spawn_blocking(move || {
            let input = shared.lock().take();
            input.map_or(Outcome::Interrupted, work)
        })
    }));
    // `spawn_blocking` panics if the pool has no thread at all.
    let Ok(mut work) = started else {
        drop(input.lock().take());
        return no_thread();
    };
    if let Ok(ended) = timeout(THREAD_START, &mut work).await {
        return ended.unwrap_or_else(join_error);
    }
    if input.lock().take().is_some() {
        return no_thread();
    }
    work.await.unwrap_or_else(join_error)
}

fn no_thread() -> Outcome {
    let detail = "no thread for a blocking handler".to_owned();
    Outcome::NotStarted(StartFailure::new(StartFailureKind::Resources, detail))
}

fn join_error(error: tokio::task::JoinError) -> Outcome {
    match error.try_into_panic() {
        Ok(panic) => Outcome::Panicked(panic_message(&*panic)),
        Err(error) => Outcome::Failed(TaskError::retry(error.to_string())),
    }
}

/// The text of a panic, if it has one.
pub(crate) fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("without a message").to_owned()
}

fn decode<T: Task>(args: &Payload) -> Result<T, Outcome> {
    let wrong = |error| Outcome::BadArguments(format!("wrong arguments for {}: {error}", T::NAME));
    args.decode().map_err(wrong)
}

fn outcome<O: serde::Serialize>(codec: Codec, output: Result<O, TaskError>) -> Outcome {
    match output {
        Ok(output) => encode(codec, &output),
        Err(error) => Outcome::of_error(error),
    }
}

/// Encodes an output in the codec of its task's arguments, which the sender can read.
pub(crate) fn encode<O: serde::Serialize>(codec: Codec, output: &O) -> Outcome {
    let output = match Payload::encode(codec, output) {
        Ok(output) => output,
        Err(error) => return Outcome::fatal(format!("the output cannot be sent: {error}")),
    };
    if output.bytes.len() > MAX_OUTPUT_BYTES {
        let length = output.bytes.len();
        return Outcome::fatal(format!(
            "an output of {length} bytes is too large (at most {MAX_OUTPUT_BYTES}); store it and return where"
        ));
    }
    if codec == Codec::Json && is_too_deep(&output.bytes) {
        return Outcome::fatal(format!(
            "an output that is nested more than {MAX_DEPTH} levels deep cannot be shown; return it as text"
        ));
    }
    Outcome::Succeeded(output)
}

#[cfg(test)]
mod tests {
    use super::*;
    use garenne_common::Codec;

    #[test]
    fn a_blocking_handler_without_a_thread_is_not_started() {
        // Like a system that refuses a second thread.
        let runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = { runtime }.enable_time().max_blocking_threads(1).build().unwrap();
        let (release, held) = std::sync::mpsc::channel::<()>();
        let output = || Outcome::Succeeded(Payload::encode(Codec::Json, &1).unwrap());
        let (input, ended) = (Arc::new(()), output());
        runtime.block_on(async {
            let first = tokio::spawn(on_thread((), move |()| {
                assert!(held.recv().is_err());
                ended
            }));
            tokio::task::yield_now().await;
            let second = on_thread(Arc::clone(&input), |_| panic!("it starts"));
            assert!(matches!(second.await, Outcome::NotStarted(_)));
            assert_eq!(Arc::strong_count(&input), 1, "its input is released");
            drop(release);
            assert_eq!(first.await.unwrap(), output(), "work that has started is waited for");
        });
    }
}
