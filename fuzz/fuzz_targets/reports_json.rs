//! Runs `targets::reports_json` under libFuzzer.
#![no_main]

#[allow(dead_code, reason = "each program has one of the targets")]
#[path = "../targets.rs"]
mod targets;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| targets::reports_json(bytes));
