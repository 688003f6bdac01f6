//! A batch: many tasks, and one notice when all of them have ended.
//!
//! Needs a RabbitMQ, a `garenne-worker` and a `garenne-collector`. Run it with
//! `cargo run -p garenne-examples --example batch`.

use std::error::Error;

use futures_util::{TryStreamExt, stream};
use garenne_common::config::{Config, Sources};
use garenne_producer::{Producer, Submission};
use serde_json::json;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let config = Config::load(&Sources::default())?;
    let producer = Producer::connect(&config).await?;

    // The built-in task `text.count_words`, submitted by name; no Rust type is needed.
    let texts = ["to be or not to be", "that is the question", "whether 'tis nobler"];
    let task = |text| Submission::dynamic("text.count_words", json!({ "text": text }));
    let tasks = texts.into_iter().map(task).collect::<Result<Vec<_>, _>>()?;

    let batch = producer.batch().await?;
    let handles: Vec<_> = batch.submit_all(stream::iter(tasks)).try_collect().await?;

    let summary = batch.seal().await?.wait().await?;
    println!("{} of {} succeeded", summary.succeeded, handles.len());
    for (text, handle) in texts.iter().zip(handles) {
        println!("{:>3} words: {text}", handle.output().await?["words"]);
    }
    producer.close().await;
    Ok(())
}
