//! Standard error, shared by log lines and a progress bar: lines appear above the bar, whole.

use std::io::{Stderr, Write};
use std::sync::{Arc, Mutex, PoisonError};

use indicatif::ProgressBar;

/// Who draws on standard error at present. Clones share it.
#[derive(Clone, Default)]
pub struct Screen(Arc<Mutex<Option<ProgressBar>>>);

impl Screen {
    /// From now on lines go above this bar.
    pub fn share(&self, bar: &ProgressBar) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(bar.clone());
    }

    /// A writer for log lines.
    pub fn writer(&self) -> ScreenWriter {
        let bar = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        ScreenWriter { bar, stderr: std::io::stderr() }
    }
}

/// Writes to standard error while the bar is away.
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
