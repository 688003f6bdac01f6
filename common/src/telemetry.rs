//! Logs: readable lines on a terminal, JSON when asked, always on stderr so that stdout stays data.

use std::io::{IsTerminal, Write};

use tracing_subscriber::EnvFilter;

use crate::config::{LogConfig, LogFormat};

/// Installs the process-wide subscriber. A second call changes nothing.
///
/// The filter is the one of `log.filter` (tracing's directive syntax, for instance
/// `info,garenne_worker=debug`), which the configuration has checked.
pub fn init(config: &LogConfig) {
    init_to(config, std::io::stderr);
}

/// [`init`] for a process that shares stderr with something else, a progress bar for instance: every
/// line is one write to a writer that `stderr` makes.
pub fn init_to<W: Write + 'static>(
    config: &LogConfig,
    stderr: impl Fn() -> W + Send + Sync + 'static,
) {
    let builder = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(&config.filter))
        .with_writer(stderr);
    let installed = match config.format {
        LogFormat::Json => builder.json().flatten_event(true).with_current_span(true).try_init(),
        LogFormat::Human => builder.with_ansi(colours_wanted()).with_target(false).try_init(),
    };
    if installed.is_err() {
        return tracing::debug!("a subscriber was installed before");
    }
    // A panic is a log line like any other event. In a handler it is an outcome, not a disaster, and
    // the standard hook's many lines on stderr would drown what matters.
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string);
        tracing::error!(place, "panic: {}", panic.payload_as_str().unwrap_or("without a message"));
    }));
}

/// Whether stderr is a terminal that wants colours.
pub fn colours_wanted() -> bool {
    std::io::stderr().is_terminal() && !crate::config::no_color()
}

/// One sentence on stderr, for a process that cannot go on; stderr itself may be gone.
pub fn complain(sentence: &str) {
    if writeln!(std::io::stderr().lock(), "error: {sentence}").is_err() {
        tracing::debug!("stderr is closed");
    }
}
