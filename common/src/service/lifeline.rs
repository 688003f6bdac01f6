//! A process that must not outlive the one that started it.
//!
//! Linux only, by a signal of the kernel's: it comes even when the parent was killed and could tell
//! nobody. For the commands that start whole clusters (`demo`, `bench`, `verify`); services that a
//! person or a process manager starts are not tied to anybody.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use nix::sys::signal::Signal;
use nix::unistd::{Pid, getppid};

/// Kills this process when its parent, which must be `parent`, is gone.
///
/// The kernel watches the *thread* that started this process. Call it before anything is begun that
/// would need an orderly end.
pub fn die_with(parent: u32) -> Result<(), LostParent> {
    let expected = i32::try_from(parent).map(Pid::from_raw);
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).map_err(|_| LostParent(parent))?;
    // Asked after the order to the kernel: a parent that died before it would go unnoticed.
    if expected == Ok(getppid()) { Ok(()) } else { Err(LostParent(parent)) }
}

/// Whether a worker started this process to run isolated attempts: if its standard input is the line
/// of which the environment speaks. What such a process starts inherits the environment only.
///
/// Not by its parent, which may be dead already: a child that then took itself for a worker would be
/// one that nobody knows of and nobody ends.
pub fn is_isolated() -> bool {
    let line = crate::config::isolated_on();
    line.is_some() && line == inode(io::stdin()).ok()
}

/// The number by which the kernel knows what an open file, or socket, refers to.
pub fn inode(file: impl AsFd) -> io::Result<u64> {
    Ok(File::from(file.as_fd().try_clone_to_owned()?).metadata()?.ino())
}

/// The process that this one was tied to is not its parent, or not any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("process {0}, which started this one, is gone")]
pub struct LostParent(u32);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stranger_is_no_parent() {
        // Ourselves: certainly not our own parent, and nothing is ordered that outlasts the test's
        // real parent in a harmful way.
        let me = std::process::id();
        assert_eq!(die_with(me), Err(LostParent(me)));
    }
}
