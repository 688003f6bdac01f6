//! Runs `targets::task_bundle` under libFuzzer.
#![no_main]

#[allow(dead_code, reason = "each program has one of the targets")]
#[path = "../targets.rs"]
mod targets;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| targets::task_bundle(bytes));
