//! Sets up logging: text or JSON lines on standard error. Standard output is reserved for data.

use std::io::{IsTerminal, Write};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use super::log_lines::HarmlessLines;
use crate::config::{LogConfig, LogFormat};
use crate::printable::one_line;

mod lines;

pub use lines::{LogGuard, lost_lines};

/// Installs the process-wide subscriber of a service. A second call has no effect.
///
/// Logging neither blocks nor ends the process: lines that standard error does not accept are
/// dropped, counted ([`lost_lines`]) and reported later. Dropping the guard writes the last lines.
///
/// The filter is that of `log.filter` (tracing's directive syntax, such as
/// `info,garenne_worker=debug`), which the configuration has validated.
pub fn init(config: &LogConfig) -> LogGuard {
    let lines = lines::Lines::start(std::io::stderr(), config.format);
    let guard = lines.guard();
    if install(config, lines) { guard } else { LogGuard::none() }
}

/// [`init`] for a command that shares standard error with other output, such as a progress bar:
/// every line is written at once, with one write to a writer made by `stderr`. A line that cannot
/// be written is lost.
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
        // By default it prints to standard error when a line cannot be written there, and panics.
        .log_internal_errors(false)
        .with_writer(HarmlessLines::new(writer, config.format));
    let installed = match config.format {
        LogFormat::Json => builder.json().flatten_event(true).with_current_span(true).try_init(),
        LogFormat::Human => builder.with_ansi(colours_wanted()).with_target(false).try_init(),
    };
    if installed.is_err() {
        tracing::debug!("a subscriber is already installed");
        return false;
    }
    // A panic is logged as one line. In a handler it is an ordinary outcome, for which the default
    // hook would write many lines.
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string);
        tracing::error!(place, "panic: {}", panic.payload_as_str().unwrap_or("without a message"));
    }));
    true
}

/// Whether standard error is a terminal, and colours are not disabled.
pub fn colours_wanted() -> bool {
    std::io::stderr().is_terminal() && !crate::config::no_color()
}

/// Writes one sentence to standard error, for a process that cannot continue. Waits at most a
/// second, since standard error may be closed, full, or a pipe without a reader.
pub fn complain(sentence: &str) {
    let sentence = crate::config::without_logins(sentence);
    lines::write_within_limit(format!("error: {}\n", one_line(&sentence)));
}
