//! Writes log lines to standard error from a thread of its own. Lines that it cannot write in time
//! are dropped and counted, since standard error may be slow, full, closed, or a pipe without a
//! reader.
//!
//! `tracing-appender` is not used, because it prints to standard output when its queue is full at
//! exit.

use std::io::{ErrorKind, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

use tracing_subscriber::fmt::MakeWriter;

use crate::config::LogFormat;
use crate::timestamp::Timestamp;

/// Most queued lines; further ones are dropped.
const QUEUED_LINES: usize = 4_096;
/// How long the process waits for the last lines when it exits.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);
const RETRY_INTERVAL: Duration = Duration::from_millis(10);

/// Lost lines that have not been reported yet.
static UNREPORTED: AtomicU64 = AtomicU64::new(0);
/// Lost lines since the start of the process.
static LOST: AtomicU64 = AtomicU64::new(0);

enum LineMessage {
    Line(Vec<u8>),
    /// Confirmed when every line before it is written.
    Flush(SyncSender<()>),
}

/// Queues lines for the writing thread. Never blocks and never fails.
#[derive(Clone)]
pub(super) struct Lines(SyncSender<LineMessage>);

/// Ensures that the last log lines are written: dropping it waits for them, at most a second.
#[must_use = "the last log lines are lost unless this is dropped at the end of the process"]
pub struct LogGuard(Option<Lines>);

/// Number of log lines that this process has lost because standard error was too slow or failed.
pub fn lost_lines() -> u64 {
    LOST.load(Ordering::Relaxed)
}

fn count_lost_line() {
    UNREPORTED.fetch_add(1, Ordering::Relaxed);
    LOST.fetch_add(1, Ordering::Relaxed);
}

impl Lines {
    /// Starts the thread, which writes to `to`.
    pub(super) fn start(to: impl Write + Send + 'static, format: LogFormat) -> Self {
        let (queue, lines) = sync_channel(QUEUED_LINES);
        let writer = std::thread::Builder::new().name("log".to_owned());
        // Without a thread every line counts as lost. Threads are exhausted then, and logging must
        // not end the process.
        drop(writer.spawn(move || write_all(to, &lines, format)));
        Self(queue)
    }

    pub(super) fn guard(&self) -> LogGuard {
        LogGuard(Some(self.clone()))
    }

    fn flush(&self) {
        let (done, flushed) = sync_channel(1);
        let deadline = Instant::now() + FLUSH_TIMEOUT;
        let mut message = LineMessage::Flush(done);
        // While the queue is full, the thread writes it, or is blocked.
        while let Err(TrySendError::Full(back)) = self.0.try_send(message) {
            if Instant::now() >= deadline {
                return;
            }
            std::thread::sleep(RETRY_INTERVAL);
            message = back;
        }
        // On a timeout, or without the thread, the remaining lines are lost.
        let left = deadline.saturating_duration_since(Instant::now());
        flushed.recv_timeout(left).unwrap_or_default();
    }
}

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        if self.0.try_send(LineMessage::Line(line.to_vec())).is_err() {
            count_lost_line();
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

impl LogGuard {
    /// A guard without effect, for a process in which another subscriber was installed before.
    pub(super) fn none() -> Self {
        Self(None)
    }
}

impl Drop for LogGuard {
    fn drop(&mut self) {
        if let Some(lines) = &self.0 {
            lines.flush();
        }
    }
}

fn write_all(mut to: impl Write, lines: &Receiver<LineMessage>, format: LogFormat) {
    for message in lines {
        match message {
            LineMessage::Line(line) => write_line(&mut to, &line, format),
            LineMessage::Flush(done) => {
                report_lost_lines(&mut to, format);
                // The receiver may have stopped waiting.
                done.send(()).unwrap_or_default();
            }
        }
    }
}

fn write_line(to: &mut impl Write, line: &[u8], format: LogFormat) {
    if put(to, line) { report_lost_lines(to, format) } else { count_lost_line() }
}

fn report_lost_lines(to: &mut impl Write, format: LogFormat) {
    let lost = UNREPORTED.swap(0, Ordering::Relaxed);
    if lost > 0 && !put(to, lost_notice(lost, Timestamp::now(), format).as_bytes()) {
        UNREPORTED.fetch_add(lost, Ordering::Relaxed);
    }
}

/// Writes a whole line. Returns `false` if that fails.
fn put(to: &mut impl Write, mut line: &[u8]) -> bool {
    while !line.is_empty() {
        match to.write(line) {
            Ok(0) => return false,
            Ok(count) => line = &line[count..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // Another process that shares standard error has made it non-blocking.
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                std::thread::sleep(RETRY_INTERVAL);
            }
            Err(_) => return false,
        }
    }
    true
}

/// The line that reports lost lines. It bypasses the subscriber, whose queue was full.
fn lost_notice(lost: u64, at: Timestamp, format: LogFormat) -> String {
    let message = format!("{lost} log lines were lost: standard error did not take them");
    match format {
        LogFormat::Human => format!("{at}  WARN {message}\n"),
        LogFormat::Json => {
            let at = at.to_string();
            let line = serde_json::json!({
                "timestamp": at, "level": "WARN", "message": message, "lost": lost,
                "target": module_path!(),
            });
            format!("{line}\n")
        }
    }
}

/// Writes one sentence to standard error, and waits at most a second for it.
pub(super) fn write_within_limit(sentence: String) {
    let (done, written) = sync_channel(1);
    let writer = std::thread::Builder::new().spawn(move || {
        drop(std::io::stderr().write_all(sentence.as_bytes()));
        done.send(()).unwrap_or_default();
    });
    if writer.is_ok() {
        written.recv_timeout(FLUSH_TIMEOUT).unwrap_or_default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::Mutex;
    use std::sync::Arc;

    /// A writer that blocks while the test holds the lock, and fails if the flag is set.
    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<(Vec<u8>, bool)>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            let mut state = self.0.lock();
            if state.1 {
                return Err(ErrorKind::StorageFull.into());
            }
            state.0.extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    // One test, since the counters belong to the process.
    #[test]
    fn lines_that_cannot_be_written_are_dropped_counted_and_reported_later() {
        let sink = Sink::default();
        let mut lines = Lines::start(sink.clone(), LogFormat::Human);
        let held = sink.0.lock();
        // One more than fits, and one that the thread may have taken from the queue already.
        for n in 0..QUEUED_LINES + 2 {
            lines.write_all(format!("line {n}\n").as_bytes()).unwrap();
        }
        let dropped = lost_lines();
        assert!((1..=2).contains(&dropped), "{dropped}");
        drop(held);
        drop(lines.guard());
        let text = String::from_utf8(sink.0.lock().0.clone()).unwrap();
        assert!(text.starts_with("line 0\n"), "{text}");
        let notice = format!("WARN {dropped} log lines were lost");
        assert!(text.contains(&notice) && text.contains("line 4000\n"), "{notice}: {text}");

        sink.0.lock().1 = true;
        lines.write_all(b"refused\n").unwrap();
        drop(lines.guard());
        assert_eq!(lost_lines(), dropped + 1);
        sink.0.lock().1 = false;
        lines.write_all(b"taken\n").unwrap();
        drop(lines.guard());
        let text = String::from_utf8(sink.0.lock().0.clone()).unwrap();
        assert!(text.ends_with("standard error did not take them\n"), "{text}");
        assert!(text.contains("taken\n") && !text.contains("refused"), "{text}");
    }

    #[test]
    fn the_report_of_lost_lines_is_a_line_in_both_formats() {
        let at = Timestamp::from_millis(0);
        let line = lost_notice(3, at, LogFormat::Json);
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!((&value["lost"], &value["level"]), (&3.into(), &"WARN".into()));
        assert!(lost_notice(3, at, LogFormat::Human).contains(" WARN 3 log lines"));
    }
}
