//! A cluster of three nodes loses one, by a kill or by a cut of its network, and nobody loses a task.
//!
//! Runs inside `scripts/rabbitmq-cluster run` (`make test-cluster`), which makes the nodes.

use std::collections::HashSet;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use garenne_common::{QueueName, TaskId};
use garenne_producer::{Producer, Submission};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::harness::{Process, Service, Warren, eventually, root};

const NODES: [&str; 3] = ["1", "2", "3"];
const CALLERS: usize = 4;
/// The nodes of a cluster notice a cut after about 9 s.
const CUT: Duration = Duration::from_secs(15);
const COMES_BACK: Duration = Duration::from_secs(90);

/// Runs a command of the script that made the cluster.
fn cluster(arguments: &[&str]) {
    let done = Command::new(root().join("scripts/rabbitmq-cluster")).args(arguments).output();
    let done = done.expect("scripts/rabbitmq-cluster can run");
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{arguments:?} (run `make test-cluster`):\n{said}");
}

/// Producers that never rest, and what the broker has confirmed to them.
struct Load {
    confirmed: Arc<Mutex<Confirmed>>,
    over: Arc<AtomicBool>,
    callers: JoinSet<()>,
}

struct Confirmed {
    ids: Vec<TaskId>,
    last: Instant,
    worst_stall: Duration,
    errors: usize,
}

impl Load {
    fn start(producer: &Producer) -> Self {
        let confirmed =
            Confirmed { ids: vec![], last: Instant::now(), worst_stall: Duration::ZERO, errors: 0 };
        let (confirmed, over) = (Arc::new(Mutex::new(confirmed)), Arc::<AtomicBool>::default());
        let mut callers = JoinSet::new();
        for _ in 0..CALLERS {
            let (producer, confirmed) = (producer.clone(), Arc::clone(&confirmed));
            let over = Arc::clone(&over);
            callers.spawn(async move {
                while !over.load(Ordering::Relaxed) {
                    submit(&producer, &confirmed).await;
                }
            });
        }
        Self { confirmed, over, callers }
    }

    fn count(&self) -> usize {
        self.confirmed.lock().unwrap().ids.len()
    }

    /// Waits until so many more tasks are confirmed.
    async fn goes_on(&self, more: usize) {
        let enough = self.count() + more;
        eventually(COMES_BACK, "the load goes on", async || (self.count() >= enough).then_some(()))
            .await;
    }

    async fn stop(mut self) -> Confirmed {
        self.over.store(true, Ordering::Relaxed);
        while self.callers.join_next().await.is_some() {}
        let confirmed = Arc::into_inner(self.confirmed).expect("the callers have ended");
        confirmed.into_inner().unwrap()
    }
}

/// One task of a few milliseconds; an error is no promise, so its task is not counted.
async fn submit(producer: &Producer, confirmed: &Mutex<Confirmed>) {
    let sleep = Submission::<Value>::dynamic("garenne.sleep", json!({ "millis": 5 })).unwrap();
    let submitted = producer.submit_detached(sleep).await;
    let mut confirmed = confirmed.lock().unwrap();
    match submitted {
        Ok(id) => {
            confirmed.ids.push(id);
            confirmed.worst_stall = confirmed.last.elapsed().max(confirmed.worst_stall);
            confirmed.last = Instant::now();
        }
        Err(error) => {
            assert!(error.is_transient(), "{error:?}");
            confirmed.errors += 1;
        }
    }
}

fn impatient(service: Service<'_>) -> Service<'_> {
    service.set("broker.heartbeat", "2s").set("broker.connect_timeout", "2s")
}

async fn crew(warren: &Warren) -> (Process, Process, Producer) {
    let mut config = warren.config();
    config.broker.heartbeat = Duration::from_secs(2);
    config.broker.connect_timeout = Duration::from_secs(2);
    config.broker.publish_timeout = Duration::from_secs(5);
    let (worker, collector) = tokio::join!(
        impatient(warren.worker().set("worker.concurrency", 32)).start(),
        impatient(warren.collector()).start()
    );
    (worker, collector, Producer::connect(&config).await.unwrap())
}

/// Every confirmed task has ended, each once, none as a dead letter.
#[expect(clippy::print_stderr, reason = "figures for people")]
async fn nothing_was_lost(warren: &Warren, what: &str, confirmed: Confirmed) {
    let Confirmed { ids, worst_stall, errors, .. } = confirmed;
    let amqp = warren.amqp().await;
    let names = warren.config().broker.topology();
    let (mut missing, mut progress) = (ids.len(), Instant::now());
    while missing > 0 {
        let rows: Vec<String> = warren.rows("SELECT id FROM results");
        let ended: HashSet<String> = rows.into_iter().collect();
        let left = ids.iter().filter(|id| !ended.contains(id.as_str())).count();
        if left < missing {
            (missing, progress) = (left, Instant::now());
        }
        // A backlog may take long on a busy machine; only standing still is a failure.
        if progress.elapsed() > COMES_BACK {
            let tasks = amqp.admin.queue_status(&names.task_queue(&QueueName::default())).await;
            let results = amqp.admin.queue_status(&names.results()).await;
            panic!("{missing} of {} never ended; tasks {tasks:?}, results {results:?}", ids.len());
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let dead: i64 = warren.rows("SELECT count(*) FROM dead_letters").pop().unwrap();
    eprintln!(
        "{what}: {} confirmed tasks, 0 lost, {dead} dead letters, {errors} errors to callers, worst \
         stall {worst_stall:?}",
        ids.len()
    );
    assert_eq!(dead, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn any_node_may_be_killed() {
    let warren = Warren::new().await;
    let (_worker, _collector, producer) = crew(&warren).await;
    let load = Load::start(&producer);
    load.goes_on(500).await;
    for node in NODES {
        cluster(&["kill", node]);
        load.goes_on(500).await;
        cluster(&["start", node]);
        load.goes_on(500).await;
    }
    nothing_was_lost(&warren, "kill -9 of each node", load.stop().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn any_node_may_be_cut_off() {
    let warren = Warren::new().await;
    let (_worker, _collector, producer) = crew(&warren).await;
    let load = Load::start(&producer);
    load.goes_on(500).await;
    for node in NODES {
        cluster(&["cut", node]);
        let cut = Instant::now();
        load.goes_on(500).await;
        eventually(2 * CUT, "the cut lasts", async || (cut.elapsed() > CUT).then_some(())).await;
        cluster(&["heal", node]);
        // RabbitMQ 3.10 does not resume by itself after a partition.
        cluster(&["kill", node]);
        cluster(&["start", node]);
        load.goes_on(500).await;
    }
    nothing_was_lost(&warren, "a network cut of each node", load.stop().await).await;
}
