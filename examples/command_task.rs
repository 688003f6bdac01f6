//! A command task: an external program as a handler, by configuration alone.
//!
//! The configuration is `command_task.toml` beside this file; the shipped `garenne-worker --config`
//! serves it in just the same way. Run it with `cargo run -p garenne-examples --example command_task`
//! next to a RabbitMQ.

use std::error::Error;
use std::path::Path;

use garenne_common::config::{Config, Sources};
use garenne_producer::{Producer, Submission};
use garenne_worker::Worker;
use serde_json::json;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("command_task.toml");
    let config = Config::load(&Sources { file: Some(file), overrides: vec![] })?;
    let running = Worker::builder(config.clone()).build()?.start().await?;

    let producer = Producer::connect(&config).await?;
    for (task, args) in [
        ("text.sort", json!(["pear", "apple", "fig"])),
        ("date.format", json!({ "when": "2026-11-23", "format": "+%A" })),
    ] {
        let output = producer.submit(Submission::dynamic(task, args)?).await?.output().await?;
        println!("{task}: {output}");
    }

    running.drain().await;
    producer.close().await;
    Ok(())
}
