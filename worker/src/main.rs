//! The program `garenne-worker`: built-in and configured command tasks, no Rust needed.

use std::process::ExitCode;

/// See docs/decisions/0021-mimalloc.md.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    garenne_worker::program::main(|worker| worker)
}
