//! Standard output for handlers. It may be a pipe that is not read, so a dedicated thread writes to it, and
//! an attempt waits for that thread no longer than its time limit.

use std::io::{self, Write};
use std::sync::OnceLock;

use tokio::sync::{mpsc, oneshot};

/// Maximum number of lines that wait for the thread.
const WAITING_LINES: usize = 64;

type PendingLine = (String, oneshot::Sender<io::Result<()>>);

/// Writes a line to standard output. Completes when it is written.
pub(crate) async fn print(line: String) -> io::Result<()> {
    static LINES: OnceLock<mpsc::Sender<PendingLine>> = OnceLock::new();
    let (written, answer) = oneshot::channel();
    let gone = || io::Error::other("nothing writes to standard output");
    LINES.get_or_init(start).send((line, written)).await.map_err(|_| gone())?;
    answer.await.unwrap_or_else(|_| Err(gone()))
}

fn start() -> mpsc::Sender<PendingLine> {
    let (lines, mut queue) = mpsc::channel::<PendingLine>(WAITING_LINES);
    let writer = std::thread::Builder::new().name("announce".to_owned());
    // If no thread starts, every line is an error.
    drop(writer.spawn(move || {
        while let Some((line, written)) = queue.blocking_recv() {
            // Skips lines of attempts that are over.
            if !written.is_closed() {
                let done = writeln!(io::stdout().lock(), "{line}");
                drop(written.send(done));
            }
        }
    }));
    lines
}
