//! Logs: readable lines on a terminal, JSON when asked, always on stderr so that stdout stays data.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::config::{LogConfig, LogFormat};

/// Installs the process-wide subscriber. A second call changes nothing.
///
/// The filter is the one of `log.filter` (tracing's directive syntax, for instance
/// `info,garenne_worker=debug`), which the configuration has checked.
pub fn init(config: &LogConfig) {
    let builder = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(&config.filter))
        .with_writer(std::io::stderr);
    let installed = match config.format {
        LogFormat::Json => builder.json().flatten_event(true).with_current_span(true).try_init(),
        LogFormat::Human => builder.with_ansi(colours_wanted()).with_target(false).try_init(),
    };
    if installed.is_err() {
        tracing::debug!("a subscriber was installed before");
    }
}

/// Whether stderr is a terminal that wants colours.
pub fn colours_wanted() -> bool {
    std::io::stderr().is_terminal() && !crate::config::no_color()
}
