//! Broker objects that somebody deletes while everything runs are declared again, and nothing is lost
//! but what was deleted (promises 1 and 7).

use std::time::Duration;

use garenne_common::broker::{Admin, Link};
use garenne_common::config::Config;
use garenne_common::topology::{Declaration, Topology};
use garenne_common::wire::HeaderValue;
use garenne_common::{QueueName, TaskId};
use garenne_producer::{Producer, Submission};
use serde_json::Value;

use crate::harness::{Process, SOON, Service, Soon, Warren, eventually, soon, time_passes};

const COMES_BACK: Duration = Duration::from_mins(2);

fn echo(args: impl serde::Serialize) -> Submission<Value> {
    Submission::dynamic("garenne.echo", args).unwrap()
}

fn topology(config: &Config) -> Topology {
    config.broker.topology()
}

/// The declaration of this kind and name.
fn object(config: &Config, name: &str, of: fn(&Declaration) -> bool) -> Declaration {
    let mut all = topology(config).core().into_iter();
    all.find(|declaration| of(declaration) && declaration.name() == name).unwrap()
}

fn is_exchange(declaration: &Declaration) -> bool {
    matches!(declaration, Declaration::Exchange { .. })
}

fn is_queue(declaration: &Declaration) -> bool {
    matches!(declaration, Declaration::Queue { .. })
}

fn is_binding(declaration: &Declaration) -> bool {
    matches!(declaration, Declaration::Binding { .. })
}

/// A worker and a collector that soon mend what went wrong without a word.
///
/// A queue may be deleted while somebody declares it, as a collector does when it starts. RabbitMQ 3.10
/// then registers the consumer at the new queue without a word, and may drop what that delivers.
/// Tasks are short, so that none needs a lease.
async fn watchful_crew(warren: &Warren) -> (Process, Process) {
    fn watchful(service: Service<'_>) -> Service<'_> {
        service.set("broker.heartbeat", "2s").set("broker.consumer_timeout", "12s")
    }
    let worker = watchful(warren.worker()).set("worker.task_timeout", "5s");
    tokio::join!(worker.start(), watchful(warren.collector()).start())
}

/// Submits `count` tasks one after the other; the ids of those that the broker has confirmed.
async fn stream(producer: &Producer, count: usize) -> Vec<TaskId> {
    let mut ids = vec![];
    for n in 0..count {
        let id = producer.submit_detached(echo(n)).await.expect("it goes on");
        ids.push(id);
    }
    ids
}

/// Waits until the collector knows an end of all of them; how many of them ended as dead letters.
async fn ended(producer: &Producer, ids: &[TaskId]) -> usize {
    let results = eventually(COMES_BACK, "all of them ended", async || {
        let results = producer.results(ids).await.ok()?;
        (results.len() == ids.len()).then_some(results)
    });
    results.await.iter().filter(|result| result.reason.is_some()).count()
}

async fn tasks_end_again(producer: &Producer) {
    eventually(COMES_BACK, "tasks find their queue and run", async || {
        let ids = stream(producer, 10).await;
        (ended(producer, &ids).await == 0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn exchanges_and_queues_deleted_under_load_come_back() {
    let warren = Warren::new().await;
    let (_worker, _collector) = watchful_crew(&warren).await;
    let (producer, amqp, config) = (warren.producer().await, warren.amqp().await, warren.config());
    let names = topology(&config);
    for gone in [
        object(&config, &names.tasks_exchange(), is_exchange),
        object(&config, &names.results(), is_exchange),
        object(&config, &names.dead(), is_exchange),
        object(&config, &names.unrouted(), is_exchange),
        object(&config, &names.notices_exchange(), is_exchange),
        object(&config, &names.queries(), is_queue),
        object(&config, &names.dead(), is_queue),
        object(&config, &names.unrouted(), is_queue),
    ] {
        let delete = async {
            amqp.admin.delete(&gone).await.unwrap();
        };
        let (ids, ()) = tokio::join!(stream(&producer, 200), delete);
        // What met a hole on its way to a queue is a dead letter, and told.
        ended(&producer, &ids).await;
        let ids = stream(&producer, 50).await;
        assert_eq!(ended(&producer, &ids).await, 0, "all is as it was: {gone:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_queue_costs_what_was_in_it_and_no_more() {
    let warren = Warren::new().await;
    let (_worker, _collector) = watchful_crew(&warren).await;
    let (producer, amqp, config) = (warren.producer().await, warren.amqp().await, warren.config());
    let queue = topology(&config).task_queue(&QueueName::default());
    let queue = object(&config, &queue, is_queue);
    amqp.admin.delete(&queue).await.unwrap();
    tasks_end_again(&producer).await;
    let ids = stream(&producer, 100).await;
    assert_eq!(ended(&producer, &ids).await, 0);

    let results = object(&config, &topology(&config).results(), is_queue);
    amqp.admin.delete(&results).await.unwrap();
    soon("the collector reads a new one", async || {
        let found = amqp.admin.queue_status(results.name()).await.ok()??;
        (found.consumers > 0).then_some(())
    })
    .await;
    let ids = stream(&producer, 100).await;
    assert_eq!(ended(&producer, &ids).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_binding_is_put_back_and_what_missed_it_is_a_dead_letter() {
    let warren = Warren::new().await;
    let worker = warren.worker().set("broker.heartbeat", "2s").start();
    let (_worker, _collector) = tokio::join!(worker, warren.collector().start());
    let (producer, amqp, config) = (warren.producer().await, warren.amqp().await, warren.config());
    let queue = topology(&config).task_queue(&QueueName::default());
    let binding = object(&config, &queue, is_binding);
    // More than once, should the worker look in this very moment.
    eventually(COMES_BACK, "they found no queue, and nobody lost them", async || {
        amqp.admin.unbind(&binding).await.unwrap();
        let ids = stream(&producer, 20).await;
        (ended(&producer, &ids).await > 0).then_some(())
    })
    .await;
    tasks_end_again(&producer).await;
}

/// `declaration` as somebody else would have made it.
fn differently(declaration: &Declaration) -> Declaration {
    match declaration.clone() {
        Declaration::Exchange { name, kind, .. } => {
            Declaration::Exchange { name, kind, alternate: None }
        }
        Declaration::Queue { name, exclusive, .. } => {
            let kind = HeaderValue::Text("quorum".to_owned());
            Declaration::Queue { name, exclusive, arguments: vec![("x-queue-type", kind)] }
        }
        binding @ Declaration::Binding { .. } => binding,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conflicting_object_is_named_with_what_differs_and_what_to_do() {
    for what in ["exchange", "queue"] {
        let warren = Warren::new().await;
        let config = warren.config();
        let admin = Admin::new(Link::new(&config.broker, "garenne-tests conflict"));
        let names = topology(&config);
        let (wanted, argument) = match what {
            "exchange" => {
                (object(&config, &names.tasks_exchange(), is_exchange), "alternate-exchange")
            }
            _ => (
                object(&config, &names.task_queue(&QueueName::default()), is_queue),
                "x-dead-letter",
            ),
        };
        admin.delete(&wanted).await.unwrap();
        let different = differently(&wanted);
        let alternate = object(&config, &names.unrouted(), is_exchange);
        admin.declare(&[alternate, different]).await.unwrap();
        let object = format!("{what} {}", wanted.name());

        for service in [warren.worker(), warren.collector()] {
            let ended = service.fail(SOON).await;
            assert_eq!(ended.code, Some(2), "{ended:#?}");
            for said in [&object, argument, "delete it"] {
                assert!(ended.stderr.contains(said), "{said}: {ended:#?}");
            }
        }
        let error = Producer::connect(&config).soon("an answer").await.err().unwrap();
        assert!(!error.is_transient(), "{error:?}");
        assert!(error.to_string().contains(argument), "{error}");
        let commands: [&[&str]; 3] =
            [&["submit", "garenne.echo", "1"], &["doctor"], &["topology", "plan"]];
        for command in commands {
            let ended = warren.garenne(command).await;
            let said = format!("{}{}", ended.stdout, ended.stderr);
            assert_ne!(ended.code, Some(0), "{ended:#?}");
            assert!(said.contains(wanted.name()) && said.contains(argument), "{ended:#?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conflict_that_appears_under_a_worker_is_said_once_and_waited_out() {
    let warren = Warren::new().await;
    let (mut worker, _collector) = watchful_crew(&warren).await;
    let (producer, amqp, config) = (warren.producer().await, warren.amqp().await, warren.config());
    let queue = object(&config, &topology(&config).task_queue(&QueueName::default()), is_queue);
    // The worker is quick to declare it again; somebody has to be quicker.
    soon("somebody else's queue is there", async || {
        amqp.admin.delete(&queue).await.ok()?;
        amqp.admin.declare(&[differently(&queue)]).await.ok()
    })
    .await;
    // The broker may move the consumer to the new queue without a word; its own look finds out.
    worker.logged("exists with other properties").await;
    // Some more attempts fail.
    time_passes(Duration::from_secs(5)).await;
    let said = worker.stderr().matches("exists with other properties").count();
    assert!(said <= 4, "not once per attempt, but {said} times");
    amqp.admin.delete(&queue).await.unwrap();
    tasks_end_again(&producer).await;
}
