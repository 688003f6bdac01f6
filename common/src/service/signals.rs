//! The signals of a service: which stop it, which make it log its state, and which change nothing.
//!
//! Every signal that would end the process by default and may come without meaning that is caught:
//! a closing terminal (SIGHUP), a slip of the keyboard (SIGUSR2), a timer (SIGALRM). SIGQUIT, SIGABRT
//! and SIGKILL still end the process at once.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nix::sys::signal::Signal as Number;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinSet;

/// How long a report may take, which may have to ask a disk.
const REPORT_TIMEOUT: Duration = Duration::from_secs(5);

/// Signals that are logged each time: somebody sent them.
const IGNORED: [Number; 2] = [Number::SIGHUP, Number::SIGUSR2];

/// Signals that are logged once: a timer or the kernel may send them again and again. SIGXFSZ makes
/// the write that exceeds the limit fail, which whoever writes deals with.
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

/// The signals of a service, caught as long as this lives.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    /// The soft limit of processor time, a while before the hard one.
    time_limit: Signal,
    reporter: Arc<Mutex<Option<Reporter>>>,
    /// Ends with this.
    _listeners: JoinSet<()>,
}

impl Signals {
    /// Catches the signals from now on; to be called before connecting, on a tokio runtime.
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

    /// Waits until the process is told to stop.
    pub async fn stop(&mut self) {
        let signal = tokio::select! {
            _ = self.terminate.recv() => Number::SIGTERM,
            _ = self.interrupt.recv() => Number::SIGINT,
            _ = self.time_limit.recv() => Number::SIGXCPU,
        };
        tracing::info!(signal = signal.as_str(), "told to stop");
    }

    /// What SIGUSR1 does from now on: `reporter` logs the state of the process.
    pub fn on_state<F>(&self, reporter: impl Fn() -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        *self.reporter.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(Box::new(move || Box::pin(reporter())));
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
            tracing::info!(signal = number.as_str(), "signal ignored; the process goes on");
        }
    }
}

async fn report(mut signal: Signal, reporter: Arc<Mutex<Option<Reporter>>>) {
    while signal.recv().await.is_some() {
        let lost_log_lines = super::telemetry::lost_lines();
        let report = {
            let reporter = reporter.lock().unwrap_or_else(PoisonError::into_inner);
            reporter.as_ref().map(|reporter| reporter())
        };
        let Some(report) = report else {
            tracing::info!(lost_log_lines, "state: starting; it waits for the broker");
            continue;
        };
        if tokio::time::timeout(REPORT_TIMEOUT, report).await.is_err() {
            tracing::warn!("state: no more is known; what was asked did not answer in time");
        }
    }
}
