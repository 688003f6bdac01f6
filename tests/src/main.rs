//! Garenne against a real RabbitMQ, with real processes and real kills.
//!
//! One module per promise; the harness under them starts what they need. `make test` runs everything.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "in a test a panic is the way to fail, and the whole crate is tests"
)]
#![allow(
    clippy::wildcard_enum_match_arm,
    reason = "a test names what it expects, and whatever else comes is a failure"
)]
#![allow(clippy::large_futures, reason = "no future here is moved often enough to matter")]

mod harness;

mod alarm;
mod batch_and_notices;
mod batch_keys;
mod bench_beside;
mod broker_outage;
mod bundles;
mod cancel;
mod ceilings;
mod cli;
#[cfg(feature = "cluster")]
mod cluster;
mod coalesce;
mod collector_store;
mod command_tasks;
mod dead_letter;
mod dead_letters_again;
mod deep_and_large;
mod demo_and_bench;
mod doctor;
mod errors;
mod examples;
mod failpoints;
mod file_tasks;
mod foreign_client;
mod fuzz;
mod hostile;
mod ill_collector;
mod kill_everything;
mod liveness;
mod long_tasks;
mod malformed;
mod options;
mod permissions;
mod poison;
mod printed;
mod process_one;
mod random_configurations;
mod redelivery;
mod reply_queues;
mod reruns;
mod retry_and_delay;
mod round_trip;
mod secrets;
mod several_urls;
mod shutdown;
mod sick_worker;
mod signals;
mod simulation;
#[cfg(feature = "soak")]
mod soak;
mod standard_error;
mod tidy;
mod time_limits;
mod topology_loss;
mod unknown_task;
mod unpolled;
mod verify;
