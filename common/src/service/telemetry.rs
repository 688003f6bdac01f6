//! Logs: readable lines on a terminal, JSON when asked, always on stderr so that stdout stays data.

use std::io::{IsTerminal, Write};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use super::log_lines::HarmlessLines;
use crate::config::{LogConfig, LogFormat};
use crate::printable::one_line;

mod lines;

pub use lines::{LogGuard, lost_lines};

/// Installs the process-wide subscriber of a service. A second call changes nothing.
///
/// Logging neither blocks nor ends the process: lines that standard error does not take are dropped,
/// counted ([`lost_lines`]) and told of later. Dropping the guard writes the last ones.
///
/// The filter is the one of `log.filter` (tracing's directive syntax, for instance
/// `info,garenne_worker=debug`), which the configuration has checked.
pub fn init(config: &LogConfig) -> LogGuard {
    let lines = lines::Lines::start(std::io::stderr(), config.format);
    let guard = lines.guard();
    if install(config, lines) { guard } else { LogGuard::none() }
}

/// [`init`] for a command that shares stderr with something else, a progress bar for instance: every
/// line is one write to a writer that `stderr` makes, at once. A line that cannot be written is lost.
pub fn init_to<W: Write + 'static>(
    config: &LogConfig,
    stderr: impl Fn() -> W + Send + Sync + 'static,
) {
    install(config, stderr);
}

fn install(
    config: &LogConfig,
    writer: impl for<'w> MakeWriter<'w> + Send + Sync + 'static,
) -> bool {
    let builder = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(&config.filter))
        // By default a line that cannot be written makes it print to stderr, which panics there.
        .log_internal_errors(false)
        .with_writer(HarmlessLines::new(writer, config.format));
    let installed = match config.format {
        LogFormat::Json => builder.json().flatten_event(true).with_current_span(true).try_init(),
        LogFormat::Human => builder.with_ansi(colours_wanted()).with_target(false).try_init(),
    };
    if installed.is_err() {
        tracing::debug!("a subscriber was installed before");
        return false;
    }
    // A panic is a log line like any other event. In a handler it is an outcome, not a disaster, and
    // the standard hook's many lines on stderr would drown what matters.
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string);
        tracing::error!(place, "panic: {}", panic.payload_as_str().unwrap_or("without a message"));
    }));
    true
}

/// Whether stderr is a terminal that wants colours.
pub fn colours_wanted() -> bool {
    std::io::stderr().is_terminal() && !crate::config::no_color()
}

/// One sentence on stderr, for a process that cannot go on. Standard error may be closed or full, or
/// a pipe that nobody reads; it is waited for at most a second.
pub fn complain(sentence: &str) {
    let sentence = crate::config::without_logins(sentence);
    lines::write_within_limit(format!("error: {}\n", one_line(&sentence)));
}
