//! Signal handling of a service: signals that stop it, log its state, or are ignored.
//!
//! Signals that end a process by default and may be sent without that intention are caught: a
//! closed terminal (SIGHUP), a typing error (SIGUSR2), a timer (SIGALRM). SIGQUIT, SIGABRT and
//! SIGKILL still end the process at once.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::Signal as Number;
use parking_lot::Mutex;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinSet;

/// Longest time that a state report may take; it may need disk access.
const REPORT_TIMEOUT: Duration = Duration::from_secs(5);

/// Ignored signals that are logged every time, since a person sends them.
const IGNORED: [Number; 2] = [Number::SIGHUP, Number::SIGUSR2];

/// Ignored signals that are logged once, since a timer or the kernel may repeat them. With SIGXFSZ
/// ignored, the write that exceeds the limit fails, and its caller handles the error.
const IGNORED_AFTER_FIRST: &[Number] = &[
    Number::SIGALRM,
    Number::SIGVTALRM,
    Number::SIGPROF,
    Number::SIGIO,
    Number::SIGXFSZ,
    #[cfg(target_os = "linux")]
    Number::SIGPWR,
    #[cfg(target_os = "linux")]
    Number::SIGSTKFLT,
];

type StateReport = Pin<Box<dyn Future<Output = ()> + Send>>;
type Reporter = Box<dyn Fn() -> StateReport + Send>;

/// Catches the signals of a service for as long as it exists.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    /// Sent at the soft limit of processor time, before the hard limit kills the process.
    time_limit: Signal,
    reporter: Arc<Mutex<Option<Reporter>>>,
    /// The tasks end when this is dropped.
    _listeners: JoinSet<()>,
}

impl Signals {
    /// Starts catching signals. Call it before connecting, on a tokio runtime. Fails if the
    /// operating system refuses a handler.
    pub fn catch() -> io::Result<Self> {
        let reporter = Arc::<Mutex<Option<Reporter>>>::default();
        let mut listeners = JoinSet::new();
        for number in IGNORED {
            listeners.spawn(ignore(number, listen(number)?, usize::MAX));
        }
        for number in IGNORED_AFTER_FIRST {
            listeners.spawn(ignore(*number, listen(*number)?, 1));
        }
        listeners.spawn(report(listen(Number::SIGUSR1)?, Arc::clone(&reporter)));
        Ok(Self {
            terminate: listen(Number::SIGTERM)?,
            interrupt: listen(Number::SIGINT)?,
            time_limit: listen(Number::SIGXCPU)?,
            reporter,
            _listeners: listeners,
        })
    }

    /// Waits for a signal that stops the process.
    pub async fn stop(&mut self) {
        let signal = tokio::select! {
            _ = self.terminate.recv() => Number::SIGTERM,
            _ = self.interrupt.recv() => Number::SIGINT,
            _ = self.time_limit.recv() => Number::SIGXCPU,
        };
        tracing::info!(signal = signal.as_str(), "stopping on a signal");
    }

    /// Sets what SIGUSR1 does: `reporter` logs the state of the process.
    pub fn on_state<F>(&self, reporter: impl Fn() -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        *self.reporter.lock() = Some(Box::new(move || Box::pin(reporter())));
    }
}

fn listen(number: Number) -> io::Result<Signal> {
    signal(SignalKind::from_raw(number as i32))
}

async fn ignore(number: Number, mut signal: Signal, most: usize) {
    let mut received = 0_usize;
    while signal.recv().await.is_some() {
        received = received.saturating_add(1);
        if received <= most {
            tracing::info!(signal = number.as_str(), "signal ignored; the process continues");
        }
    }
}

async fn report(mut signal: Signal, reporter: Arc<Mutex<Option<Reporter>>>) {
    while signal.recv().await.is_some() {
        let lost_log_lines = super::telemetry::lost_lines();
        let report = reporter.lock().as_ref().map(|reporter| reporter());
        let Some(report) = report else {
            tracing::info!(lost_log_lines, "state: starting, waiting for the broker");
            continue;
        };
        if tokio::time::timeout(REPORT_TIMEOUT, report).await.is_err() {
            tracing::warn!("state: incomplete; the store or broker did not respond in time");
        }
    }
}
