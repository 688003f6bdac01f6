//! A client that shares no code with Garenne: Python's pika, told what to do in JSON.

use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use serde_json::{Value, json};

use super::process::{command, finish};
use super::root;

/// Speaks to one broker.
pub(crate) struct Foreign {
    url: String,
}

impl Foreign {
    pub(crate) fn new(url: &str) -> Self {
        Self { url: url.to_owned() }
    }

    /// Publishes messages and collects `replies` replies to a queue of its own; see
    /// tests/foreign/client.py for what a message looks like.
    pub(crate) async fn publish(&self, messages: Value, replies: usize) -> Vec<Value> {
        let order =
            json!({ "url": self.url, "messages": messages, "replies": replies, "seconds": 60 });
        let mut command = command(python());
        command.arg(root().join("tests/foreign/client.py"));
        let done = finish(command, &order.to_string(), Duration::from_secs(90)).await.ok();
        let replies = done.lines().map(|line| serde_json::from_str(line).expect("JSON lines"));
        replies.collect()
    }
}

/// An interpreter that has pika: the one on the path, or the system's.
fn python() -> &'static PathBuf {
    static PYTHON: OnceLock<PathBuf> = OnceLock::new();
    PYTHON.get_or_init(|| {
        let mut candidates = ["python3", "/usr/bin/python3"].into_iter().map(PathBuf::from);
        let has_pika = |python: &PathBuf| {
            let tried = Command::new(python).args(["-c", "import pika"]).output();
            tried.is_ok_and(|tried| tried.status.success())
        };
        candidates.find(has_pika).expect("no Python with pika; run scripts/setup")
    })
}
