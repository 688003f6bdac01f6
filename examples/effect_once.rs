//! An effect that happens once although its task runs twice: key and effect in one transaction.
//!
//! Needs a RabbitMQ. Run it with `cargo run -p garenne-examples --example effect_once`.

use std::error::Error;
use std::sync::Mutex;

use garenne_common::Task;
use garenne_common::config::{Config, Sources};
use garenne_producer::{Producer, Submission};
use garenne_worker::{Context, TaskError, Worker};
use rusqlite::{Connection, params};
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize)]
struct Deposit(i64);

impl Task for Deposit {
    const NAME: &'static str = "account.deposit";
    type Output = i64;
}

fn deposit(
    account: &Mutex<Connection>,
    context: &Context,
    Deposit(amount): Deposit,
) -> Result<i64, TaskError> {
    let mut account = account.lock().map_err(|_| TaskError::retry("poisoned"))?;
    let transaction = account.transaction()?;
    // The key is the same in every execution of this task, whichever worker runs it.
    let key = context.idempotency_key();
    transaction.execute("INSERT OR IGNORE INTO deposits VALUES (?1, ?2)", params![key, amount])?;
    let balance =
        transaction.query_row("SELECT SUM(amount) FROM deposits", [], |row| row.get(0))?;
    transaction.commit()?;
    // As if the worker had died here: the effect is committed, the result is not reported.
    if context.attempt() == 1 { Err(TaskError::retry("too late")) } else { Ok(balance) }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let config = Config::load(&Sources::default())?;
    let account = Connection::open_in_memory()?;
    account.execute_batch("CREATE TABLE deposits (key TEXT PRIMARY KEY, amount INTEGER)")?;
    let account = Mutex::new(account);
    let handler = move |context: &Context, task| deposit(&account, context, task);
    let worker =
        Worker::builder(config.clone()).register_blocking::<Deposit, _>(handler).build()?;
    let running = worker.start().await?;

    let producer = Producer::connect(&config).await?;
    let balance = producer.submit(Submission::new(Deposit(100))).await?.output().await?;
    println!("balance after two executions: {balance}");
    producer.close().await;
    running.drain().await;
    Ok(())
}
