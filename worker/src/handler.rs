//! Handlers: typed functions on the outside, one erased form on the inside, found by task name.

use std::collections::HashMap;
use std::future::Future;
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::Arc;

use crate::context::Context;
use crate::outcome::{Crash, TaskError};
pub(crate) use crate::slots::Slot;
use foldhash::fast::RandomState;
use garenne_common::wire::MAX_BODY_BYTES;
use garenne_common::{Payload, Task, TaskName};

/// Results travel in bundles, and a bundle must fit into a message with room for the rest of it.
const MAX_OUTPUT_BYTES: usize = MAX_BODY_BYTES - 1024 * 1024;

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
            let work = tokio::task::spawn_blocking(move || {
                // A thread cannot be stopped from outside. It keeps its slot until it returns, so a
                // worker whose handlers hang shows fewer slots instead of more and more threads.
                let _slot = slot;
                let args = &context.task().args;
                let output = function(&context, decode::<T>(args)?).map_err(Fault::Failed)?;
                encode(args.codec, &output)
            });
            work.await.unwrap_or_else(|error| Err(joined(error)))
        })
    }
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
pub(crate) fn encode<O: serde::Serialize>(
    codec: garenne_common::Codec,
    output: &O,
) -> Result<Payload, Fault> {
    let fatal = |message: String| Fault::Failed(TaskError::fatal(message));
    let output = Payload::encode(codec, output)
        .map_err(|error| fatal(format!("the output cannot be sent: {error}")))?;
    if output.bytes.len() > MAX_OUTPUT_BYTES {
        let length = output.bytes.len();
        return Err(fatal(format!(
            "an output of {length} bytes is too large (at most {MAX_OUTPUT_BYTES}); store it and return where"
        )));
    }
    Ok(output)
}
