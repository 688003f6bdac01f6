//! Ties a process to its parent: it ends when the parent does.
//!
//! Linux only. The kernel sends the signal, so it also comes when the parent is killed. Used by the
//! commands that start whole clusters (`demo`, `bench`, `verify`). Services started by a person or
//! a process manager are not tied to their parent.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use nix::sys::signal::Signal;
use nix::unistd::{Pid, getppid};

/// Lets the kernel kill this process when its parent ends. Fails unless the parent is `parent`.
///
/// The kernel watches the *thread* that started this process. Call this function before starting
/// anything that needs an orderly shutdown.
pub fn die_with(parent: u32) -> Result<(), LostParent> {
    let expected = i32::try_from(parent).map(Pid::from_raw);
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).map_err(|_| LostParent(parent))?;
    // Checked after the request, since the kernel sends nothing for a parent that ended before it.
    if expected == Ok(getppid()) { Ok(()) } else { Err(LostParent(parent)) }
}

/// Whether a worker started this process to run isolated attempts: its standard input is the socket
/// named in the environment. Its own children inherit the environment, but not the socket.
///
/// The parent process does not tell, since it may have died already; a child that then started as a
/// worker would be one that nothing stops.
pub fn is_isolated() -> bool {
    let socket = crate::config::isolated_on();
    socket.is_some() && socket == inode(io::stdin()).ok()
}

/// The inode of an open file or socket.
pub fn inode(file: impl AsFd) -> io::Result<u64> {
    Ok(File::from(file.as_fd().try_clone_to_owned()?).metadata()?.ino())
}

/// The expected parent of this process is not, or no longer, its parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the parent process {0} has ended")]
pub struct LostParent(u32);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_process_than_the_parent_is_refused() {
        // This process is certainly not its own parent. The kernel then also kills the test when
        // its real parent ends, which does no harm.
        let me = std::process::id();
        assert_eq!(die_with(me), Err(LostParent(me)));
    }
}
