//! What the processes of a run hold: memory and open files, from `/proc`. Bounds are generous: they are to
//! find what grows with the number of tasks or faults, not what a fuller cache holds.

use serde::Serialize;

use super::check::{Invariant, Violation};
use crate::cluster::Cluster;

/// More memory than at the start, in MiB, that is still no leak.
const MEMORY: u64 = 256;
/// More open files than at the start that are still no leak.
const FILES: u64 = 64;

/// What a process held before the first task and after the last one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct BoundedProcess {
    pub(super) name: String,
    pub(super) before: Held,
    pub(super) after: Held,
}

/// What a process holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub(super) struct Held {
    pub(super) memory_mebibytes: u64,
    pub(super) files: u64,
}

/// What each process holds now.
pub(super) fn measure(cluster: &mut Cluster) -> Vec<(String, Held)> {
    let processes = cluster.processes().iter();
    processes.filter_map(|process| Some((process.name.clone(), held(process.id()?)?))).collect()
}

fn held(pid: u32) -> Option<Held> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kibibytes: u64 = line.split_whitespace().next()?.parse().ok()?;
    let files = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count();
    Some(Held { memory_mebibytes: kibibytes / 1024, files: u64::try_from(files).ok()? })
}

/// Puts together what was measured before and after.
pub(super) fn compare(
    before: Vec<(String, Held)>,
    after: &[(String, Held)],
) -> Vec<BoundedProcess> {
    let pairs = before.into_iter().filter_map(|(name, before)| {
        let (_, after) = after.iter().find(|(other, _)| *other == name)?;
        Some(BoundedProcess { name, before, after: *after })
    });
    pairs.collect()
}

/// Processes that hold much more than at the start.
pub(super) fn breaches(processes: &[BoundedProcess]) -> Vec<Violation> {
    let grown = processes.iter().filter(|process| {
        process.after.memory_mebibytes > process.before.memory_mebibytes + MEMORY
            || process.after.files > process.before.files + FILES
    });
    grown
        .map(|process| Violation {
            invariant: Invariant::Bounds,
            subject: process.name.clone(),
            what: format!(
                "{} MiB and {} files at the start, {} MiB and {} files at the end",
                process.before.memory_mebibytes,
                process.before.files,
                process.after.memory_mebibytes,
                process.after.files
            ),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_is_found_and_noise_is_not() {
        let process = |memory_mebibytes, files| BoundedProcess {
            name: "w".to_owned(),
            before: Held { memory_mebibytes: 20, files: 15 },
            after: Held { memory_mebibytes, files },
        };
        assert_eq!(breaches(&[process(60, 30)]), []);
        assert_eq!(breaches(&[process(900, 30), process(60, 500)]).len(), 2);
    }
}
