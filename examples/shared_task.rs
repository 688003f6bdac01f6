//! One task type, shared by producer and worker.
//!
//! Needs a RabbitMQ. Run it with `cargo run -p garenne-examples --example shared_task`.

use std::error::Error;

use garenne_common::Task;
use garenne_common::config::{Config, Sources};
use garenne_producer::Producer;
use garenne_worker::{Context, TaskError, Worker};
use serde::{Deserialize, Serialize};

/// The task type, which both programs import from a shared crate.
#[derive(Serialize, Deserialize)]
struct Greet {
    name: String,
}

impl Task for Greet {
    const NAME: &'static str = "example.greet";
    const QUEUE: &'static str = "example";
    type Output = String;
}

async fn greet(_: Context, task: Greet) -> Result<String, TaskError> {
    Ok(format!("Hello, {}!", task.name))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let config = Config::load(&Sources::default().set("worker.queues", Some(Greet::QUEUE)))?;
    let worker = Worker::builder(config.clone()).register::<Greet, _, _>(greet).build()?;
    let running = worker.start().await?;

    // The producer.
    let producer = Producer::connect(&config).await?;
    let handle = producer.submit(Greet { name: "Garenne".to_owned() }).await?;
    println!("{}", handle.output().await?);
    running.drain().await;
    producer.close().await;
    Ok(())
}
