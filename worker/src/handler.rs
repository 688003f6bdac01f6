//! Handlers: typed functions on the outside, one erased form on the inside, found by task name.

use std::collections::HashMap;
use std::future::Future;
use std::marker::PhantomData;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::context::Context;
use crate::outcome::{Crash, TaskError, Trouble, TroubleKind};
pub(crate) use crate::slots::Slot;
use foldhash::fast::RandomState;
use garenne_common::wire::depth::is_too_deep;
use garenne_common::wire::{MAX_BODY_BYTES, MAX_DEPTH};
use garenne_common::{Codec, Payload, Task, TaskName};
use tokio::time::timeout;

/// Results travel in bundles, and a bundle must fit into a message with room for the rest of it.
const MAX_OUTPUT_BYTES: usize = MAX_BODY_BYTES - 1024 * 1024;

/// How long a blocking handler waits for a thread.
const THREAD_START: Duration = Duration::from_secs(2);

/// Why a handler gave no output.
#[derive(Debug, PartialEq)]
pub(crate) enum Fault {
    BadArguments(String),
    Failed(TaskError),
    /// It panicked, on a thread or in a process of its own.
    Panicked(String),
    /// It could not be finished, for no fault of its own.
    Interrupted,
    /// The process that ran it died.
    Crashed(Crash),
    /// It could not begin, for a reason that lies with the worker.
    Unable(Trouble),
}

pub(crate) type Running = Pin<Box<dyn Future<Output = Result<Payload, Fault>> + Send>>;

/// A handler with its types erased.
pub(crate) trait Handler: Send + Sync {
    /// Begins an attempt. The slot is free again when every holder has dropped it.
    fn run(&self, context: Context, slot: Slot) -> Running;

    /// Whether attempts run in a process of their own.
    ///
    /// Such an attempt cannot harm this process, and it can be waited for after its end was decided:
    /// it ends by itself when told, and dropping it kills what is left.
    fn is_process(&self) -> bool {
        false
    }

    /// Whether what it needs on this machine seems to be there, as far as that can be seen without
    /// running anything.
    fn is_usable(&self) -> bool {
        true
    }
}

/// All handlers of a worker.
#[derive(Default)]
pub(crate) struct Registry(HashMap<TaskName, Arc<dyn Handler>, RandomState>);

impl Registry {
    /// Adds a handler; `false` if the name is taken.
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
    fn run(&self, context: Context, slot: Slot) -> Running {
        let args = &context.task().args;
        let codec = args.codec;
        let task = match decode::<T>(args) {
            Ok(task) => task,
            Err(fault) => return Box::pin(async { Err(fault) }),
        };
        let attempt = (self.function)(context, task);
        Box::pin(async move {
            let output = attempt.await.map_err(Fault::Failed)?;
            drop(slot);
            encode(codec, &output)
        })
    }
}

/// A blocking function as a handler; runs on tokio's blocking pool.
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
    fn run(&self, context: Context, slot: Slot) -> Running {
        let function = Arc::clone(&self.function);
        Box::pin(async move {
            on_thread((context, slot), move |(context, slot)| {
                // A thread cannot be stopped from outside. It keeps its slot until it returns, so a
                // worker whose handlers hang shows fewer slots instead of more and more threads.
                let _slot = slot;
                let args = &context.task().args;
                let output = function(&context, decode::<T>(args)?).map_err(Fault::Failed)?;
                encode(args.codec, &output)
            })
            .await
        })
    }
}

/// Runs `work` on tokio's blocking pool.
///
/// If the system refuses a thread, the pool keeps `work` until a thread is free, which may be never: the
/// runtime's own threads count, too. So `input` is taken back if nothing has begun with it after a while.
async fn on_thread<I: Send + 'static>(
    input: I,
    work: impl FnOnce(I) -> Result<Payload, Fault> + Send + 'static,
) -> Result<Payload, Fault> {
    let input = Arc::new(Mutex::new(Some(input)));
    let theirs = Arc::clone(&input);
    let started = std::panic::catch_unwind(AssertUnwindSafe(|| {
        tokio::task::spawn_blocking(move || match take(&theirs) {
            Some(input) => work(input),
            None => Err(Fault::Interrupted),
        })
    }));
    // It panics if the pool has no thread at all.
    let Ok(mut work) = started else {
        drop(take(&input));
        return Err(no_thread());
    };
    if let Ok(ended) = timeout(THREAD_START, &mut work).await {
        return ended.unwrap_or_else(|error| Err(joined(error)));
    }
    match take(&input) {
        Some(_) => Err(no_thread()),
        None => work.await.unwrap_or_else(|error| Err(joined(error))),
    }
}

fn take<I>(input: &Mutex<Option<I>>) -> Option<I> {
    input.lock().unwrap_or_else(PoisonError::into_inner).take()
}

fn no_thread() -> Fault {
    let detail = "no thread for a blocking handler".to_owned();
    Fault::Unable(Trouble::new(TroubleKind::Resources, detail))
}

fn joined(error: tokio::task::JoinError) -> Fault {
    match error.try_into_panic() {
        Ok(panic) => Fault::Panicked(panic_message(&*panic)),
        Err(error) => Fault::Failed(TaskError::retry(error.to_string())),
    }
}

/// The text of a panic, as far as it has one.
pub(crate) fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("without a message").to_owned()
}

fn decode<T: Task>(args: &Payload) -> Result<T, Fault> {
    let wrong = |error| Fault::BadArguments(format!("wrong arguments for {}: {error}", T::NAME));
    args.decode().map_err(wrong)
}

/// Encodes an output in the codec of its task's arguments: who wrote one can read the other.
pub(crate) fn encode<O: serde::Serialize>(codec: Codec, output: &O) -> Result<Payload, Fault> {
    let fatal = |message: String| Fault::Failed(TaskError::fatal(message));
    let output = Payload::encode(codec, output)
        .map_err(|error| fatal(format!("the output cannot be sent: {error}")))?;
    if output.bytes.len() > MAX_OUTPUT_BYTES {
        let length = output.bytes.len();
        return Err(fatal(format!(
            "an output of {length} bytes is too large (at most {MAX_OUTPUT_BYTES}); store it and return where"
        )));
    }
    if codec == Codec::Json && is_too_deep(&output.bytes) {
        return Err(fatal(format!(
            "an output that is nested more than {MAX_DEPTH} levels deep cannot be shown; return it as text"
        )));
    }
    Ok(output)
}

#[cfg(test)]
mod tests {
    use super::*;
    use garenne_common::Codec;

    #[test]
    fn a_blocking_handler_without_a_thread_never_begins() {
        // As if the system refused a second thread.
        let runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = { runtime }.enable_time().max_blocking_threads(1).build().unwrap();
        let (release, held) = std::sync::mpsc::channel::<()>();
        let output = || Payload::encode(Codec::Json, &1).unwrap();
        let (begun, ended) = (Arc::new(()), output());
        runtime.block_on(async {
            let first = tokio::spawn(on_thread((), move |()| {
                assert!(held.recv().is_err());
                Ok(ended)
            }));
            tokio::task::yield_now().await;
            let second = on_thread(Arc::clone(&begun), |_| panic!("it begins"));
            assert!(matches!(second.await, Err(Fault::Unable(_))));
            assert_eq!(Arc::strong_count(&begun), 1, "what it was given is free again");
            drop(release);
            assert_eq!(first.await.unwrap(), Ok(output()), "one that has begun is waited for");
        });
    }
}
