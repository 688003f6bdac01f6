//! The program `garenne-lab-worker`: a stock worker with the tasks of `garenne verify`, which end as they
//! are told and leave word of it in a ledger outside the system.
//!
//! Each execution says that it began before it does anything else, and one that is to succeed leaves an
//! effect. The ledger speaks lines (`lab/src/verify/ledger.rs`); a line counts when it is whole, so a
//! worker that is killed has left an effect or has not.

use std::io;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use garenne_common::Task;
use garenne_worker::{Builder, Context, TaskError};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::runtime::Handle;

/// See docs/decisions/0021-mimalloc.md.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The address of the ledger, `host:port`.
const LEDGER: &str = "GARENNE_LAB_LEDGER";

fn main() -> ExitCode {
    garenne_worker::program::main(with_tasks)
}

/// The handlers, both with one ledger.
fn with_tasks(worker: Builder) -> Builder {
    let address = std::env::var(LEDGER).unwrap_or_default();
    let ledger = Arc::new(LedgerClient { address, idle: Mutex::default() });
    let patient = Arc::clone(&ledger);
    let run = move |context: Context, task: Verify| {
        let ledger = Arc::clone(&patient);
        async move { perform(&ledger, &context, task).await }
    };
    // The same on a thread of its own, where a handler may block.
    let block = move |context: &Context, VerifyBlocking(task): VerifyBlocking| {
        Handle::current().block_on(perform(&ledger, context, task))
    };
    worker.register::<Verify, _, _>(run).register_blocking::<VerifyBlocking, _>(block)
}

/// `garenne.verify`: what one task of a run is to do.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Verify {
    /// Its number in the run; also its output.
    index: u64,
    /// How long it works.
    millis: u64,
    /// So many first attempts fail.
    failures: u32,
    /// How the others end.
    end: WorkEnd,
    /// Whether its effect goes under the idempotency key.
    keyed: bool,
}

/// How an attempt ends.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum WorkEnd {
    Succeed,
    Fail,
    Fatal,
    Panic,
    Overrun,
    /// The process dies of it.
    Crash,
}

impl Task for Verify {
    const NAME: &'static str = "garenne.verify";
    type Output = u64;
}

/// `garenne.verify_blocking`: the same for a blocking handler.
#[derive(Serialize, Deserialize)]
struct VerifyBlocking(Verify);

impl Task for VerifyBlocking {
    const NAME: &'static str = "garenne.verify_blocking";
    type Output = u64;
}

async fn perform(ledger: &LedgerClient, context: &Context, task: Verify) -> Result<u64, TaskError> {
    let (index, attempt) = (task.index, context.attempt());
    let entry = format!("{index} {attempt} {} {}", context.id(), context.worker());
    ledger.write(&format!("run {entry}")).await?;
    tokio::time::sleep(Duration::from_millis(task.millis)).await;
    if attempt <= task.failures {
        return Err(TaskError::retry("asked to fail at first"));
    }
    match task.end {
        WorkEnd::Succeed => {
            let key = if task.keyed { context.idempotency_key() } else { "-" };
            ledger.write(&format!("effect {entry} {key}")).await?;
            Ok(index)
        }
        WorkEnd::Fail => Err(TaskError::retry("asked to fail")),
        WorkEnd::Fatal => Err(TaskError::fatal("asked to fail for good")),
        WorkEnd::Panic => panic!("asked to panic"),
        WorkEnd::Overrun => std::future::pending().await,
        WorkEnd::Crash => std::process::abort(),
    }
}

/// The way to the ledger: connections that are used again, one at a time.
struct LedgerClient {
    address: String,
    idle: Mutex<Vec<BufReader<TcpStream>>>,
}

impl LedgerClient {
    /// Writes a line and waits until the ledger has it. A repeated effect is not an error: it is what the
    /// idempotency key is for.
    async fn write(&self, line: &str) -> io::Result<()> {
        let idle = self.lock().pop();
        let mut connection = match idle {
            Some(connection) => connection,
            None => BufReader::new(TcpStream::connect(&self.address).await?),
        };
        connection.get_mut().write_all(format!("{line}\n").as_bytes()).await?;
        let mut answer = String::new();
        if connection.read_line(&mut answer).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // Only a connection with nothing under way goes back; a dropped attempt takes its own along.
        self.lock().push(connection);
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<BufReader<TcpStream>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
