//! The broker's own process, where it belongs to this run: killed, frozen and started again.
//!
//! It is this run's when `scripts/rabbitmq run` has started it for this command, and when it is the
//! broker that the configuration names. Any other broker is left alone.

use std::process::Stdio;

use garenne_cli::error::CliError;
use garenne_common::config::BrokerUrl;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};

use crate::node::{OwnNode, own_node};

/// The node.
pub(super) struct Node(OwnNode);

impl Node {
    /// The node behind this URL, if it may be harmed.
    pub(super) fn behind(url: &BrokerUrl) -> Option<Self> {
        let node = Self(own_node()?);
        let own = BrokerUrl::parse(&node.variable("AMQP_URL")?).ok()?;
        (own.address() == url.address()).then_some(node)
    }

    /// Sends a signal to the broker, and says to which process.
    pub(super) fn signal(&self, signal: Signal) -> Option<Pid> {
        let pid = Pid::from_raw(self.variable("BROKER_PID")?.parse().ok()?);
        kill(pid, signal).ok().map(|()| pid)
    }

    /// Starts it again, on the same port, with the same data. It serves when the child has ended.
    pub(super) fn start(&self) -> Result<Child, CliError> {
        let started = Command::new(&self.0.script)
            .arg("start")
            .arg(&self.0.directory)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let script = self.0.script.display();
        started.map_err(|error| CliError::unusable(format!("cannot run {script}: {error}")))
    }

    /// One of the variables that the script has written for its callers.
    fn variable(&self, name: &str) -> Option<String> {
        let text = std::fs::read_to_string(self.0.directory.join("env")).ok()?;
        let mut pairs = text.lines().filter_map(|line| line.split_once('='));
        pairs.find(|(key, _)| *key == name).map(|(_, value)| value.to_owned())
    }
}

/// Whether a killed process is really gone; as a zombie it runs no more.
pub(super) fn is_gone(pid: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with(['Z', 'X']))
}
