//! Standard output for handlers: it may be a pipe that nobody reads, so a thread of its own writes, and
//! an attempt only waits for that, no longer than its time limit.

use std::io::{self, Write};
use std::sync::OnceLock;

use tokio::sync::{mpsc, oneshot};

/// Lines that wait for the thread.
const WAITING_LINES: usize = 64;

type Line = (String, oneshot::Sender<io::Result<()>>);

/// Writes a line to standard output; done when that took it.
pub(crate) async fn print(line: String) -> io::Result<()> {
    static LINES: OnceLock<mpsc::Sender<Line>> = OnceLock::new();
    let (written, answer) = oneshot::channel();
    let gone = || io::Error::other("nothing writes to standard output");
    LINES.get_or_init(start).send((line, written)).await.map_err(|_| gone())?;
    answer.await.unwrap_or_else(|_| Err(gone()))
}

fn start() -> mpsc::Sender<Line> {
    let (lines, mut queue) = mpsc::channel::<Line>(WAITING_LINES);
    let writer = std::thread::Builder::new().name("announce".to_owned());
    // Without a thread every line is refused.
    drop(writer.spawn(move || {
        while let Some((line, written)) = queue.blocking_recv() {
            // An attempt that is over waits for it no more.
            if !written.is_closed() {
                let done = writeln!(io::stdout().lock(), "{line}");
                drop(written.send(done));
            }
        }
    }));
    lines
}
