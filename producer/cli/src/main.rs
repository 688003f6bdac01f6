//! The program `garenne`; its code is in the library.

use std::process::ExitCode;

/// See docs/decisions/0021-mimalloc.md.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().collect();
    garenne_cli::main(&arguments)
}
