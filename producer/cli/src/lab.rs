//! `garenne demo`, `bench` and `verify` are served by `garenne-lab`, a program that lies beside this one:
//! whoever only submits tasks needs none of what starts and kills whole systems.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use clap::Args;

use super::error::{CliError, Exit};
use super::output::{Format, print_error};

const PROGRAM: &str = "garenne-lab";

/// What these commands are given is read by that program.
#[derive(Debug, Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Arguments {
    /// See `--help`
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    _rest: Vec<OsString>,
}

/// `garenne help demo` as that program understands it.
pub(crate) fn asked_for_help(arguments: &[OsString]) -> Option<[OsString; 2]> {
    match arguments {
        [_, help, command] if help == "help" => {
            let elsewhere = ["demo", "bench", "verify"].iter().any(|name| command == name);
            elsewhere.then(|| [command.clone(), "--help".into()])
        }
        _ => None,
    }
}

/// Replaces this process by that program; returns only if that fails, which has been explained then.
pub(crate) fn become_lab(arguments: &[OsString], format: Format) -> Exit {
    let beside = std::env::current_exe().map(|here| here.with_file_name(PROGRAM));
    let program = beside.ok().filter(|path| path.is_file());
    // As a shell would find it.
    let program = program.unwrap_or_else(|| PathBuf::from(PROGRAM));
    let cause = Command::new(program).args(arguments).exec();
    let error = CliError::unusable(format!("cannot start {PROGRAM}: {cause}")).help(
        "this command is a program of its own: build all with `cargo build --release --bins`, and keep \
         them in one directory",
    );
    print_error(&error, format);
    error.exit
}
