//! Standard error, shared by log lines and a progress bar: log lines appear whole, above the bar.

use std::io::{Stderr, Write};
use std::sync::Arc;

use indicatif::ProgressBar;
use parking_lot::Mutex;

/// The progress bar on standard error, if there is one. Clones share it.
#[derive(Clone, Default)]
pub struct Screen(Arc<Mutex<Option<ProgressBar>>>);

impl Screen {
    /// Prints later log lines above this bar.
    pub fn share(&self, bar: &ProgressBar) {
        *self.0.lock() = Some(bar.clone());
    }

    /// A writer for log lines.
    pub fn writer(&self) -> ScreenWriter {
        ScreenWriter { bar: self.0.lock().clone(), stderr: std::io::stderr() }
    }
}

/// Writes to standard error while the bar is hidden.
pub struct ScreenWriter {
    bar: Option<ProgressBar>,
    stderr: Stderr,
}

impl Write for ScreenWriter {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match &self.bar {
            Some(bar) => bar.suspend(|| self.stderr.write(bytes)),
            None => self.stderr.write(bytes),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.stderr.flush()
    }
}
