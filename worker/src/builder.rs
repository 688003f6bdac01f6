//! Building a worker: collects and checks its handlers.

use std::sync::Arc;

use garenne_common::broker::BrokerError;
use garenne_common::config::Config;
use garenne_common::service::lifeline::is_isolated;
use garenne_common::{InvalidName, Task, TaskName};

use crate::handlers::command::CommandHandler;
use crate::handlers::file_root::FileRoot;
use crate::handlers::{AsyncHandler, BlockingHandler, Context, Handler, Registry, builtin, crash};
use crate::isolate::{self, Warden};
use crate::run::outcome::TaskError;

/// Why a worker could not be built or started.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The task name of a handler is invalid.
    #[error(transparent)]
    Name(#[from] InvalidName),
    /// Two handlers, or a handler and a command, have the same task name.
    #[error("two handlers are registered for the task {0}; remove or rename one")]
    Duplicate(TaskName),
    /// The worker has nothing to run.
    #[error("the worker has no handler; register one, configure a command or switch builtins on")]
    NoHandler,
    /// The broker refuses permanently.
    #[error(transparent)]
    Broker(#[from] BrokerError),
}

/// A worker, ready to start.
pub struct Worker {
    pub(crate) config: Config,
    pub(crate) registry: Registry,
    /// Whether suspects run in child processes.
    pub(crate) isolating: bool,
    /// Ends the commands if this process is killed.
    pub(crate) warden: Arc<Warden>,
}

/// Collects handlers; created by [`Worker::builder`].
pub struct Builder {
    config: Config,
    registry: Registry,
    warden: Arc<Warden>,
    problem: Option<WorkerError>,
}

impl Worker {
    /// A builder with the commands in `config` and, unless switched off there, the built-in tasks.
    pub fn builder(config: Config) -> Builder {
        let (registry, warden) = (Registry::default(), Arc::default());
        let mut builder = Builder { registry, warden, problem: None, config };
        for (name, command) in &builder.config.worker.commands.clone() {
            let handler = CommandHandler::new(command.clone(), Arc::clone(&builder.warden));
            builder.add(name.clone(), Arc::new(handler));
        }
        builder
    }

    /// Makes suspects run in child processes. To be called by programs that are workers.
    ///
    /// A suspect is a task that was delivered before and never settled: it may have crashed its worker. A
    /// child process is this program, started again with the same arguments and environment. It runs
    /// everything that the program does up to this call. Then it runs tasks for the worker that started
    /// it until that is gone, and the result is `None`: the program should end. Its standard input is its
    /// socket to the worker and must not be used before this call.
    ///
    /// Without this call no program is started again. Suspects then run in this process, and those with
    /// many deliveries run alone.
    pub async fn isolate(mut self) -> Option<Self> {
        if is_isolated() {
            isolate::serve(self.registry).await;
            return None;
        }
        self.isolating = true;
        if !self.config.worker.commands.is_empty() {
            self.warden.enable();
        }
        Some(self)
    }
}

impl Builder {
    /// Runs tasks of type `T` with an async function.
    pub fn register<T, F, R>(mut self, function: F) -> Self
    where
        T: Task,
        F: Fn(Context, T) -> R + Send + Sync + 'static,
        R: Future<Output = Result<T::Output, TaskError>> + Send + 'static,
    {
        self.add_typed::<T>(Arc::new(AsyncHandler::<T, F>::new(function)));
        self
    }

    /// Runs tasks of type `T` with a function that computes or blocks, on a pool of threads.
    pub fn register_blocking<T, F>(mut self, function: F) -> Self
    where
        T: Task,
        F: Fn(&Context, T) -> Result<T::Output, TaskError> + Send + Sync + 'static,
    {
        self.add_typed::<T>(Arc::new(BlockingHandler::<T, F>::new(function)));
        self
    }

    /// Checks the handlers.
    ///
    /// # Errors
    ///
    /// If a task name is invalid or used twice, or if there is no handler.
    pub fn build(mut self) -> Result<Worker, WorkerError> {
        if self.config.worker.builtins {
            // Handlers that were registered under the name of a built-in task replace it.
            for (name, handler) in
                builtin::handlers(FileRoot::new(self.config.worker.file_root.clone()))?
            {
                if !self.registry.contains(&name) {
                    self.add(name, handler);
                }
            }
        }
        if self.config.worker.builtins && self.config.worker.faults {
            let (name, handler) = crash::handler()?;
            self.add(name, handler);
        }
        match self.problem {
            Some(problem) => Err(problem),
            None if self.registry.names().is_empty() => Err(WorkerError::NoHandler),
            None => {
                let Self { config, registry, warden, problem: _ } = self;
                Ok(Worker { config, registry, isolating: false, warden })
            }
        }
    }

    fn add_typed<T: Task>(&mut self, handler: Arc<dyn Handler>) {
        match TaskName::new(T::NAME) {
            Ok(name) => self.add(name, handler),
            Err(error) => self.problem = Some(error.into()),
        }
    }

    fn add(&mut self, name: TaskName, handler: Arc<dyn Handler>) {
        if !self.registry.add(name.clone(), handler) {
            self.problem = Some(WorkerError::Duplicate(name));
        }
    }
}
