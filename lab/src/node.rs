//! What `scripts/rabbitmq run` says, by the environment, of the broker node that it has started for this
//! process alone.

use std::path::PathBuf;

/// The node, which this process may kill and start again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OwnNode {
    /// Where it lives; its file `env` says how to reach it.
    pub(crate) directory: PathBuf,
    /// What starts it again: `SCRIPT start DIRECTORY`.
    pub(crate) script: PathBuf,
}

/// The node, if there is one.
pub(crate) fn own_node() -> Option<OwnNode> {
    let path = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    Some(OwnNode {
        directory: path("GARENNE_NODE_DIRECTORY")?,
        script: path("GARENNE_NODE_SCRIPT")?,
    })
}

/// The version of the broker that `scripts/rabbitmq run` has started.
pub(crate) fn broker_version() -> Option<String> {
    std::env::var("BROKER_VERSION").ok().filter(|version| !version.is_empty())
}
