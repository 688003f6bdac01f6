//! `garenne demo`, `bench` and `verify`: run by `garenne-lab`, a program beside this one, because
//! who only submits tasks needs none of what starts and kills whole systems.
//!
//! The arguments go to that program unread, and it replaces this process.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::error::{CliError, Exit};
use crate::output::{Format, print_error};

const PROGRAM: &str = "garenne-lab";

/// The commands that `garenne-lab` runs.
#[derive(Debug, Subcommand)]
pub(crate) enum LabCommand {
    /// Show Garenne at work: processes that are killed during a real job, and the management UI
    Demo(LabArgs),
    /// Measure throughput, latency and memory on this machine, compared with a bare client
    Bench(LabArgs),
    /// Run tasks while killing workers, broker and all, and certify that nothing is lost
    Verify(LabArgs),
}

/// Arguments that `garenne-lab` parses.
#[derive(Debug, Args)]
#[command(disable_help_flag = true)]
pub(crate) struct LabArgs {
    /// See `--help`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    _rest: Vec<OsString>,
}

/// Translates `garenne help demo` into the arguments `demo --help` of `garenne-lab`.
pub(crate) fn help_request(arguments: &[OsString]) -> Option<[OsString; 2]> {
    match arguments {
        [_, help, command] if help == "help" => {
            let known = ["demo", "bench", "verify"].iter().any(|name| command == name);
            known.then(|| [command.clone(), "--help".into()])
        }
        _ => None,
    }
}

/// Replaces this process by `garenne-lab`. Returns only if that fails, after printing the error.
pub(crate) fn replace_process(arguments: &[OsString], format: Format) -> Exit {
    let beside = std::env::current_exe().map(|here| here.with_file_name(PROGRAM));
    let program = beside.ok().filter(|path| path.is_file());
    // Otherwise looked up in PATH.
    let program = program.unwrap_or_else(|| PathBuf::from(PROGRAM));
    let cause = std::process::Command::new(program).args(arguments).exec();
    let error = CliError::unusable(format!("cannot start {PROGRAM}: {cause}")).help(
        "this command is a separate program: build all of them with `cargo build --release \
         --bins`, and keep them in one directory",
    );
    print_error(&error, format);
    error.exit
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn help_for_a_lab_command_is_left_to_the_lab() {
        let request = |line: &str| {
            let words: Vec<_> = line.split(' ').map(OsString::from).collect();
            help_request(&words)
        };
        assert_eq!(request("garenne help demo"), Some(["demo".into(), "--help".into()]));
        assert_eq!(request("garenne help submit"), None);
        assert_eq!(request("garenne help"), None);
    }
}
