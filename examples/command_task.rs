//! A command task: an external program as the handler, by configuration only.
//!
//! The configuration is `command_task.toml` in this directory; `garenne-worker --config` serves it as
//! well. Needs a RabbitMQ. Run it with `cargo run -p garenne-examples --example command_task`.

use std::error::Error;
use std::path::Path;

use garenne_common::config::{Config, Sources};
use garenne_producer::{Producer, Submission};
use garenne_worker::Worker;
use serde_json::json;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("command_task.toml");
    let sources = Sources { file: Some(file), overrides: vec![] };
    let config = Config::load(&sources.set("worker.queues", Some("commands")))?;
    let running = Worker::builder(config.clone()).build()?.start().await?;

    let producer = Producer::connect(&config).await?;
    for (name, args) in [
        ("text.sort", json!(["pear", "apple", "fig"])),
        ("date.format", json!({ "when": "2026-11-23", "format": "+%A" })),
    ] {
        let task = Submission::dynamic(name, args)?.queue("commands")?;
        let output = producer.submit(task).await?.output().await?;
        println!("{name}: {output}");
    }

    running.drain().await;
    producer.close().await;
    Ok(())
}
