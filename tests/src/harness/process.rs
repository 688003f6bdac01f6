//! Real processes: started from the built binaries, logged to a file, killed when the test is over.
//!
//! The log of a process is shown when its test fails, and only then.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, ChildStdin};

use super::{Soon, soon};

/// How much of a log is shown.
const SHOWN_LINES: usize = 60;
/// Protections that a test build switches off in this process and in all that it starts.
pub(crate) const FAILPOINTS: &str = "GARENNE_FAILPOINTS";

/// The path of a binary of this workspace, built in the same profile as this test.
pub(crate) fn binary(name: &str) -> PathBuf {
    let path = built().join(name);
    let shown = path.display();
    assert!(
        path.exists(),
        "{shown} is missing; run `make test`, or cargo build --workspace --bins --examples"
    );
    path
}

/// `target/<profile>`: this test binary is in its `deps`.
fn built() -> PathBuf {
    let test = std::env::current_exe().expect("a test has a path");
    test.ancestors().nth(2).expect("target/<profile>/deps/<test>").to_owned()
}

/// A command with a clean environment: only what a test sets reaches the program,
/// and which protections are off.
pub(crate) fn command(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
    if let Some(failpoints) = std::env::var_os(FAILPOINTS) {
        command.env(FAILPOINTS, failpoints);
    }
    command
}

/// Stops a process, and waits until every thread of it stands still: on a busy machine some of them run
/// on for a while after the signal.
pub(crate) fn freeze(process: Pid) {
    kill(process, Signal::SIGSTOP).expect("the process runs");
    let stands_still = |thread: PathBuf| {
        let stat = fs::read_to_string(thread.join("stat")).unwrap_or_default();
        // A thread that is gone by now does not run either.
        stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with(['T', 'Z', 'X']))
    };
    let threads = || fs::read_dir(format!("/proc/{process}/task")).expect("the process is there");
    while !threads().flatten().all(|thread| stands_still(thread.path())) {
        std::thread::yield_now();
    }
}

/// A process that runs until it is told otherwise.
pub(crate) struct Process {
    name: String,
    child: Child,
    /// Not left in `child`: waiting for a child closes its input.
    input: ChildStdin,
    log: PathBuf,
}

/// A process that has ended.
#[derive(Debug)]
pub(crate) struct Ended {
    /// What the shell would see; `None` after a signal.
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Process {
    /// Starts it. Standard output goes to `<log>.out`, standard error to `<log>.err`.
    pub(crate) fn start(name: &str, mut command: Command, log: &Path) -> Self {
        let file = |ending: &str| {
            let file = File::options().create(true).append(true).open(log.with_extension(ending));
            Stdio::from(file.expect("the test's directory is writable"))
        };
        // Open and silent until `write` or the end of the process.
        command.stdin(Stdio::piped()).stdout(file("out")).stderr(file("err"));
        let mut command = tokio::process::Command::from(command);
        let mut child = command.kill_on_drop(true).spawn().expect("the binary can be started");
        let input = child.stdin.take().expect("piped");
        Self { name: name.to_owned(), child, input, log: log.to_owned() }
    }

    /// Gives it something to read; its standard input stays open.
    pub(crate) async fn write(&mut self, text: &str) {
        self.input.write_all(text.as_bytes()).await.expect("it reads");
        self.input.flush().await.expect("it reads");
    }

    pub(crate) fn id(&self) -> Pid {
        let id = self.child.id().unwrap_or_else(|| panic!("{} has ended", self.name));
        Pid::from_raw(id.try_into().expect("process ids are small"))
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(self.id(), signal).expect("the process runs");
    }

    /// Stops it in mid-use, until SIGCONT.
    pub(crate) fn freeze(&self) {
        freeze(self.id());
    }

    /// Kills it as the kernel would, and waits until it is gone.
    pub(crate) async fn kill(mut self) {
        self.signal(Signal::SIGKILL);
        self.child.wait().await.expect("a child can be waited for");
    }

    /// Waits for its end.
    pub(crate) async fn ended(&mut self, deadline: Duration) -> ExitStatus {
        let what = format!("{} ends", self.name);
        self.child.wait().within(deadline, &what).await.expect("a child can be waited for")
    }

    /// Asks it to stop in order, and waits for its end.
    pub(crate) async fn terminate(&mut self, deadline: Duration) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        self.ended(deadline).await
    }

    /// What it has written to standard output so far.
    pub(crate) fn stdout(&self) -> String {
        fs::read_to_string(self.log.with_extension("out")).unwrap_or_default()
    }

    /// What it has logged so far.
    pub(crate) fn stderr(&self) -> String {
        fs::read_to_string(self.log.with_extension("err")).unwrap_or_default()
    }

    /// Its files may grow again.
    pub(crate) fn room(&self) {
        let mut command = std::process::Command::new("prlimit");
        command.arg("--pid").arg(self.id().to_string()).arg("--fsize=unlimited");
        assert!(command.status().unwrap().success());
    }

    /// Changes how many files it may have open.
    pub(crate) fn open_files_at_most(&self, count: &str) {
        let mut command = std::process::Command::new("prlimit");
        command.arg("--pid").arg(self.id().to_string()).arg(format!("--nofile={count}:"));
        assert!(command.status().unwrap().success());
    }

    /// Waits until it has logged a line that contains `text`.
    pub(crate) async fn logged(&mut self, text: &str) -> String {
        let what = format!("{} logs {text:?}", self.name);
        soon(&what, async || {
            let log = self.stderr();
            let line = log.lines().find(|line| line.contains(text)).map(str::to_owned);
            let gone = self.child.try_wait().expect("a child can be waited for");
            assert!(line.is_some() || gone.is_none(), "{} ended: {gone:?}", self.name);
            line
        })
        .await
    }
}

impl Drop for Process {
    #[expect(clippy::print_stderr, reason = "the test harness captures it and shows it on failure")]
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.stderr();
            let lines: Vec<_> = log.lines().collect();
            let shown = lines[lines.len().saturating_sub(SHOWN_LINES)..].join("\n");
            eprintln!("--- the end of the log of {}:\n{shown}\n---", self.name);
        }
    }
}

/// Runs a command to its end with `stdin` as its input.
pub(crate) async fn finish(mut command: Command, stdin: &str, deadline: Duration) -> Ended {
    let what = format!("{command:?} ends");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut command = tokio::process::Command::from(command);
    let mut child = command.kill_on_drop(true).spawn().expect("the program can be started");
    let mut input = child.stdin.take().expect("asked for");
    let feed = async {
        // A program may end without reading its input.
        drop(input.write_all(stdin.as_bytes()).await);
        drop(input);
    };
    let all = async { tokio::join!(feed, child.wait_with_output()).1 };
    let output: Output = all.within(deadline, &what).await.expect("a child can be waited for");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    Ended { code: output.status.code(), stdout, stderr }
}

impl Ended {
    /// Standard output of a command that must have succeeded.
    #[track_caller]
    pub(crate) fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{self:#?}");
        self.stdout
    }

    /// Standard output as one JSON value.
    #[track_caller]
    pub(crate) fn json(&self) -> serde_json::Value {
        let parsed = serde_json::from_str(&self.stdout);
        parsed.unwrap_or_else(|error| panic!("not JSON ({error}): {self:#?}"))
    }
}
