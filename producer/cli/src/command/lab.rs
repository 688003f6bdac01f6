//! `garenne demo`, `bench` and `verify` are run by `garenne-lab`, a program beside this one: a
//! machine that only submits tasks does not need what starts and kills whole systems.
//!
//! The arguments go to that program unread, and it replaces this process.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use clap::{Arg, ArgAction, Args, Subcommand};

use crate::error::{CliError, Exit};
use crate::output::{Format, print_error};

const PROGRAM: &str = "garenne-lab";
const COMMANDS: [&str; 3] = ["demo", "bench", "verify"];

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
            let known = COMMANDS.iter().any(|name| command == name);
            known.then(|| [command.clone(), "--help".into()])
        }
        _ => None,
    }
}

/// Replaces this process by `garenne-lab`. Returns only if that fails, after printing the error.
pub(crate) fn replace_process(arguments: &[OsString], format: Format) -> Exit {
    let cause = Command::new(program()).args(arguments).exec();
    let error = CliError::unusable(format!("cannot start {PROGRAM}: {cause}")).help(
        "this command is a separate program: build all of them with `cargo build --release \
         --bins`, and keep them in one directory",
    );
    print_error(&error, format);
    error.exit
}

/// Adds the options of the lab's commands, as far as `garenne-lab` is there to print its help, for
/// completion scripts.
pub(crate) fn with_options(mut command: clap::Command) -> clap::Command {
    for name in COMMANDS {
        let Ok(help) = Command::new(program()).args([name, "--help"]).output() else { continue };
        let options = options_in(&String::from_utf8_lossy(&help.stdout));
        let known: Vec<_> = command.get_arguments().filter_map(Arg::get_long).collect();
        let options = options.into_iter().filter(|option| !known.contains(&&*option.long));
        let options: Vec<_> = options.map(LabOption::into_arg).collect();
        command = command.mut_subcommand(name, |command| command.args(options));
    }
    command
}

/// An option that the help of a command lists.
#[derive(Debug, PartialEq, Eq)]
struct LabOption {
    /// Its name without the dashes.
    long: String,
    takes_value: bool,
}

impl LabOption {
    fn into_arg(self) -> Arg {
        let action = if self.takes_value { ArgAction::Set } else { ArgAction::SetTrue };
        Arg::new(self.long.clone()).long(self.long).action(action)
    }
}

/// The options in the help of a command. A line that lists one starts with it, or with its short
/// form.
fn options_in(help: &str) -> Vec<LabOption> {
    let listed = help.lines().filter_map(|line| {
        let line = line.trim_start();
        let line = if line.starts_with("--") { line } else { line.strip_prefix('-')?.get(3..)? };
        let line = line.strip_prefix("--")?;
        let end = line.find(|c: char| !c.is_ascii_alphanumeric() && c != '-');
        let (name, rest) = line.split_at(end.unwrap_or(line.len()));
        Some(LabOption { long: name.to_owned(), takes_value: rest.contains('<') })
    });
    listed.filter(|option| !["help", "version"].contains(&&*option.long)).collect()
}

fn program() -> PathBuf {
    let beside = std::env::current_exe().map(|here| here.with_file_name(PROGRAM));
    // If it is not there it is looked up in PATH.
    beside.ok().filter(|path| path.is_file()).unwrap_or_else(|| PathBuf::from(PROGRAM))
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

    #[test]
    fn the_options_of_a_command_are_read_from_its_help() {
        let help = "Usage: x [OPTIONS]\n\nOptions:\n      --tasks <N>\n          The tasks - \
                    many\n\n  -q, --quick         Short\n      --wait[=<TIME>]\n  -v, \
                    --verbose...\n  -h, --help\n";
        let option = |long: &str, takes_value| LabOption { long: long.to_owned(), takes_value };
        let expected = [
            option("tasks", true),
            option("quick", false),
            option("wait", true),
            option("verbose", false),
        ];
        assert_eq!(options_in(help), expected);
    }
}
