//! RabbitMQ for the tests: one shared node for everybody, one private node for those who break it.
//!
//! The shared one is that of `AMQP_URL` (`make test` sets it) or one that the first test starts. The
//! private one goes from test to test; whoever holds it may kill it, and the next holder finds it
//! running again. No broker is a failure with the words of the script that starts it.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::sync::{Mutex, MutexGuard};

use super::process::freeze;
use super::{root, soon, time_passes};

/// RabbitMQ writes the name of a new quorum queue to disk within half a second; a queue whose node is
/// killed before that comes back without a leader (rabbitmq-server issue 15725).
const WRITTEN_AFTER: Duration = Duration::from_secs(2);

/// The URL of the broker that tests share and must not harm.
pub(crate) fn shared_url() -> &'static str {
    static SHARED: OnceLock<String> = OnceLock::new();
    SHARED.get_or_init(|| match std::env::var("AMQP_URL") {
        Ok(url) if !url.is_empty() => url,
        _ => Node::start("shared").variable("AMQP_URL"),
    })
}

/// The node that tests may kill, held by one test at a time.
pub(crate) struct PrivateNode(MutexGuard<'static, Option<Node>>);

impl PrivateNode {
    /// Waits until no other test has it.
    pub(crate) async fn take() -> Self {
        static NODE: Mutex<Option<Node>> = Mutex::const_new(None);
        let mut held = NODE.lock().await;
        match &*held {
            // The last holder may have left it killed or stopped.
            Some(node) => node.run(),
            None => *held = Some(Node::start("private")),
        }
        Self(held)
    }

    fn node(&self) -> &Node {
        self.0.as_ref().expect("filled in by `take`")
    }

    /// The URL; the same after a restart.
    pub(crate) fn url(&self) -> String {
        self.node().variable("AMQP_URL")
    }

    /// What tells a program that it may kill this node and start it again.
    pub(crate) fn environment(&self) -> Vec<(&'static str, String)> {
        let names = ["GARENNE_NODE_DIRECTORY", "GARENNE_NODE_SCRIPT", "BROKER_VERSION"];
        let mut all = names.map(|name| (name, self.node().variable(name))).to_vec();
        // The script must start the same version again.
        let version = std::env::var("RABBITMQ_ROOTFS").ok();
        all.extend(version.map(|directory| ("RABBITMQ_ROOTFS", directory)));
        all
    }

    /// Kills the broker as a power cut would, and waits until it is gone.
    ///
    /// Not before the youngest queue is on its disk.
    pub(crate) async fn kill(&self) {
        time_passes(WRITTEN_AFTER).await;
        let pid = self.signal(Signal::SIGKILL);
        let stat = format!("/proc/{pid}/stat");
        soon("the broker is gone", async || {
            let stat = fs::read_to_string(&stat).unwrap_or_default();
            // A dead process stays as a zombie until somebody has waited for it.
            let runs = stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'));
            (!runs).then_some(())
        })
        .await;
    }

    /// Stops the broker in order.
    pub(crate) fn stop(&self) {
        script(&["stop", &self.node().directory()]);
    }

    /// Starts it again, with the same port and data.
    pub(crate) fn start(&self) {
        self.node().run();
    }

    /// Freezes the broker: connections stay open and nobody answers.
    pub(crate) fn freeze(&self) {
        freeze(self.pid());
    }

    /// Lets a frozen broker go on.
    pub(crate) fn thaw(&self) {
        self.signal(Signal::SIGCONT);
    }

    /// Runs `rabbitmqctl` on it; what it prints.
    pub(crate) fn ctl(&self, arguments: &[&str]) -> String {
        let directory = self.node().directory();
        script(&[&["ctl", &directory], arguments].concat())
    }

    /// Which RabbitMQ it is: major and minor version.
    pub(crate) fn version(&self) -> (u32, u32) {
        let version = self.node().variable("BROKER_VERSION");
        let mut numbers = version.split('.').map_while(|number| number.parse().ok());
        numbers.next().zip(numbers.next()).expect("a version has two numbers")
    }

    /// What it has logged so far.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.node().0.join("log/node.log")).unwrap_or_default()
    }

    /// Raises a memory alarm: the broker takes no messages until [`calm`](Self::calm).
    pub(crate) fn alarm(&self) {
        self.ctl(&["set_vm_memory_high_watermark", "absolute", "1MB"]);
    }

    /// Ends the alarm.
    pub(crate) fn calm(&self) {
        self.ctl(&["set_vm_memory_high_watermark", "absolute", "2GB"]);
    }

    fn pid(&self) -> Pid {
        let pid = self.node().variable("BROKER_PID").parse().expect("a process id");
        Pid::from_raw(pid)
    }

    fn signal(&self, signal: Signal) -> Pid {
        let pid = self.pid();
        kill(pid, signal).expect("the broker runs");
        pid
    }
}

/// A quorum queue whose process stands still, as silent as one that has no leader; until it is dropped.
pub(crate) struct SilentQueue<'n> {
    node: &'n PrivateNode,
    queue: String,
}

impl<'n> SilentQueue<'n> {
    pub(crate) fn new(node: &'n PrivateNode, queue: &str) -> Self {
        let silent = Self { node, queue: queue.to_owned() };
        silent.tell("suspend");
        silent
    }

    fn tell(&self, what: &str) {
        let name = format!("list_to_atom(\"%2F_{}\")", self.queue);
        let said = self.node.ctl(&["eval", &format!("sys:{what}(whereis({name})).")]);
        assert_eq!(said.trim(), "ok");
    }
}

impl Drop for SilentQueue<'_> {
    fn drop(&mut self) {
        self.tell("resume");
    }
}

impl Drop for PrivateNode {
    fn drop(&mut self) {
        // A test that failed may have left it frozen; the next holder could not restart that.
        if let Some(pid) = self.node().try_variable("BROKER_PID").and_then(|pid| pid.parse().ok()) {
            kill(Pid::from_raw(pid), Signal::SIGCONT).ok();
        }
    }
}

/// A node below a directory of ours. It dies with this process, however that ends.
struct Node(PathBuf);

impl Node {
    fn start(name: &str) -> Self {
        let place = Path::new(env!("CARGO_TARGET_TMPDIR"));
        sweep(place);
        let node = Self(place.join(format!("rabbitmq-{}-{name}", std::process::id())));
        node.run();
        node
    }

    /// Makes it run, from whatever state.
    fn run(&self) {
        script(&["start", &self.directory(), "--die-with", &std::process::id().to_string()]);
    }

    fn directory(&self) -> String {
        self.0.display().to_string()
    }

    fn variable(&self, name: &str) -> String {
        self.try_variable(name).unwrap_or_else(|| panic!("{} has no {name}", self.directory()))
    }

    fn try_variable(&self, name: &str) -> Option<String> {
        let text = fs::read_to_string(self.0.join("env")).ok()?;
        let pairs: HashMap<_, _> = text.lines().filter_map(|line| line.split_once('=')).collect();
        pairs.get(name).map(|value| (*value).to_owned())
    }
}

fn script(arguments: &[&str]) -> String {
    let program = root().join("scripts/rabbitmq");
    let done = Command::new(program).args(arguments).output().expect("scripts/rabbitmq can run");
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(
        done.status.success(),
        "no RabbitMQ for the tests; run `make test`, or scripts/setup:\n{said}"
    );
    String::from_utf8_lossy(&done.stdout).into_owned()
}

/// Removes what earlier runs left: their nodes died with them, their directories did not.
fn sweep(place: &Path) {
    for entry in fs::read_dir(place).expect("cargo makes it").flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name.strip_prefix("rabbitmq-").and_then(|rest| rest.split('-').next());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            // Another run may sweep at the same time.
            drop(fs::remove_dir_all(entry.path()));
        }
    }
}
