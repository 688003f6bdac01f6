//! What Linux tells of processes and of the machine, read from `/proc`. Elsewhere there are no such
//! files, and the report leaves out what it does not know.

use std::path::Path;

use crate::node::broker_version;
use garenne_common::Timestamp;
use serde::Serialize;

/// Ticks a second of the times in `/proc/PID/stat`; 100 on every architecture that Rust's std is built for.
const TICKS: f64 = 100.0;

/// The processor time of a process so far, user and system, in seconds.
pub(super) fn cpu_seconds(pid: u32) -> Option<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in brackets and may hold anything, brackets too.
    let (_, rest) = stat.rsplit_once(") ")?;
    // proc(5): utime and stime are fields 14 and 15; `rest` begins with field 3.
    let mut ticks = rest.split(' ').skip(11).map_while(|word| word.parse::<u32>().ok());
    Some(f64::from(ticks.next()?.checked_add(ticks.next()?)?) / TICKS)
}

/// The processor time of the whole machine so far, of all cores, in seconds; what a hypervisor took away
/// counts as spent.
pub(super) fn machine_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/stat").ok()?;
    let line = stat.lines().next()?.strip_prefix("cpu ")?;
    // proc(5): user, nice, system, idle, iowait, irq, softirq, steal; the rest is counted in these.
    let ticks: Vec<f64> = line.split_whitespace().map_while(|word| word.parse().ok()).collect();
    let busy = [0, 1, 2, 5, 6, 7].into_iter().map(|field| ticks.get(field).copied());
    busy.sum::<Option<f64>>().map(|ticks| ticks / TICKS)
}

/// The memory of a process.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Memory {
    /// Resident now, in MiB.
    pub(super) resident: f64,
    /// The most that was ever resident, in MiB.
    pub(super) peak: f64,
}

impl Memory {
    pub(super) fn of(pid: u32) -> Option<Self> {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        Some(Self { resident: mebibytes(&status, "VmRSS:")?, peak: mebibytes(&status, "VmHWM:")? })
    }
}

/// The value of a line like `VmRSS:     34180 kB`.
fn mebibytes(text: &str, key: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    let kibibytes: u32 = line.split_whitespace().next()?.parse().ok()?;
    Some(f64::from(kibibytes) / 1024.0)
}

/// Where and when the figures were measured, and with what.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Machine {
    pub(super) date: Timestamp,
    pub(super) garenne: &'static str,
    pub(super) profile: &'static str,
    pub(super) rabbitmq: Option<String>,
    pub(super) cores: usize,
    pub(super) processor: Option<String>,
    pub(super) memory_mebibytes: Option<f64>,
    pub(super) kernel: Option<String>,
    pub(super) system: Option<String>,
    /// Load average of the minute before: how idle the machine was.
    pub(super) load_before: Option<f64>,
}

impl Machine {
    pub(super) fn describe() -> Self {
        let read = |path: &str| std::fs::read_to_string(Path::new(path)).ok();
        let after = |path: &str, key: &str| {
            let text = read(path)?;
            let line = text.lines().find_map(|line| line.strip_prefix(key))?;
            Some(line.trim_matches([' ', '\t', ':', '=', '"']).to_owned())
        };
        Self {
            date: Timestamp::now(),
            garenne: garenne_common::VERSION,
            profile: if cfg!(debug_assertions) { "debug" } else { "release" },
            rabbitmq: broker_version(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            processor: after("/proc/cpuinfo", "model name"),
            memory_mebibytes: read("/proc/meminfo").and_then(|text| mebibytes(&text, "MemTotal:")),
            kernel: read("/proc/sys/kernel/osrelease").map(|text| text.trim().to_owned()),
            system: after("/etc/os-release", "PRETTY_NAME"),
            load_before: read("/proc/loadavg")
                .and_then(|text| text.split(' ').next()?.parse().ok()),
        }
    }

    pub(super) fn is_debug_build(&self) -> bool {
        self.profile == "debug"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_knows_its_own_usage() {
        let begin = cpu_seconds(std::process::id()).unwrap();
        let mut sum = 0_u64;
        while cpu_seconds(std::process::id()).unwrap() <= begin {
            sum = (0..1_000_000).fold(sum, |sum, n| sum.wrapping_mul(31).wrapping_add(n));
        }
        assert!(machine_seconds().unwrap() > begin);
        let memory = Memory::of(std::process::id()).unwrap();
        assert!(memory.resident > 0.5 && memory.peak >= memory.resident, "{memory:?} {sum}");
    }

    #[test]
    fn the_machine_is_known() {
        let machine = Machine::describe();
        assert!(machine.cores >= 1);
        assert!(machine.memory_mebibytes.is_some_and(|memory| memory > 100.0));
        assert_eq!(machine.is_debug_build(), cfg!(debug_assertions));
    }
}
