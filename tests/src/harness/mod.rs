//! What every test stands on: a real RabbitMQ, a namespace of its own on it, real processes, a foreign
//! client, a line that can be cut, and waiting for events with a deadline.
//!
//! It asserts nothing about Garenne; that is the tests' business. A test that cannot have what it
//! needs fails and says what to run. None is ever skipped.

mod amqp;
mod broker;
pub(crate) mod effects;
mod eventually;
mod foreign;
mod process;
mod proxy;
pub(crate) mod raw;
mod supervisor;
mod warren;

pub(crate) use amqp::{Amqp, Tap, message};
pub(crate) use broker::{PrivateNode, SilentQueue};
pub(crate) use eventually::{SOON, Soon, eventually, soon, time_passes};
pub(crate) use foreign::Foreign;
pub(crate) use process::{Ended, FAILPOINTS, Process, binary, finish};
pub(crate) use proxy::{Proxy, Sends};
pub(crate) use supervisor::supervise;
pub(crate) use warren::{Service, Warren};

use std::path::PathBuf;

/// The root of the repository.
pub(crate) fn root() -> PathBuf {
    let manifest = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().expect("the tests are a directory of the repository").to_owned()
}
