//! Every process is killed once in the middle of the work, the broker included, and restarted; then
//! every confirmed task has exactly one outcome, nothing that nobody submitted has any, and every batch
//! had its notice.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use garenne_common::TaskId;
use garenne_common::config::{Config, Sources};
use garenne_common::wire::{BatchState, Notice};
use garenne_producer::{Producer, Submission};
use serde_json::json;

use crate::harness::{PrivateNode, Process, Warren, eventually};

const PATIENCE: Duration = Duration::from_secs(90);
const TASKS: usize = 3_000;
const LOG: &str = "GARENNE_TESTS_LOG";

#[tokio::test(flavor = "multi_thread")]
async fn every_confirmed_task_ends_exactly_once_whatever_is_killed() {
    let node = PrivateNode::take().await;
    let warren = Warren::on(&node.url()).await;
    let mut observer = Observer { warren: &warren, seen: 0 };
    let collector =
        || warren.collector().set("broker.heartbeat", "2s").arg("--notify-stdout").start();
    let first_collector = collector().await;
    let worker = |n: usize| {
        let worker =
            warren.worker().arg(format!("--name=worker-{n}")).set("broker.heartbeat", "2s");
        worker.set("worker.concurrency", 8).start()
    };
    let mut workers = [worker(0).await, worker(1).await, worker(2).await];

    let (first, first_log) = produce(&warren, "first", "20s");
    at_least(&first_log, "confirmed", TASKS / 6).await;
    first.kill().await;
    let (mut second, second_log) = produce(&warren, "second", "10m");

    for (n, running) in workers.iter_mut().enumerate() {
        observer.more_results(TASKS / 20).await;
        std::mem::replace(running, worker(n).await).kill().await;
    }
    observer.more_results(TASKS / 20).await;
    first_collector.kill().await;
    let collector = collector().await;
    observer.more_results(TASKS / 20).await;
    node.kill().await;
    node.start();
    observer.more_results(TASKS / 20).await;

    assert!(second.ended(PATIENCE).await.success(), "the second producer submitted everything");
    let (tried, confirmed) = (told(&first_log, "tried"), told(&first_log, "confirmed"));
    assert!(confirmed.len() < TASKS, "the first producer was killed in the middle");
    assert_eq!(told(&second_log, "confirmed").len(), TASKS);
    let all_tried = &tried | &told(&second_log, "tried");
    let all_confirmed = &confirmed | &told(&second_log, "confirmed");
    observer.all_ended(&all_confirmed).await;
    observer.no_phantoms(&all_tried);
    let batch = |log: &PathBuf| told(log, "batch").into_iter().next().unwrap();
    notice(&collector, &batch(&second_log), BatchState::Done, Some(TASKS as u64)).await;
    notice(&collector, &batch(&first_log), BatchState::Abandoned, None).await;
    drop(workers);
}

/// Waits until the collector says that it has published this batch's notice.
async fn notice(collector: &Process, batch: &str, state: BatchState, total: Option<u64>) {
    let what = format!("the notice of batch {batch} is published");
    let summary = eventually(PATIENCE, &what, async || {
        let printed = collector.stdout();
        let notices = printed.lines().filter_map(|line| serde_json::from_str(line).ok());
        notices.into_iter().find_map(|notice| match notice {
            Notice::Batch(summary) if summary.batch.as_str() == batch => Some(summary),
            Notice::Batch(_) | Notice::Task(_) => None,
        })
    });
    let summary = summary.await;
    assert_eq!((summary.state, summary.total), (state, total), "{summary:?}");
}

/// Starts a real producer process: this test binary, told to run the function below.
/// Its batch is over after `deadline`, sealed or not.
fn produce(warren: &Warren, name: &str, deadline: &str) -> (Process, PathBuf) {
    let log = warren.path(name);
    let mut command = warren.command_at(&std::env::current_exe().unwrap());
    command.env(LOG, &log).env("GARENNE__PRODUCER__BATCH_DEADLINE", deadline);
    command.args(["--ignored", "--exact", "kill_everything::a_producer_process"]);
    (warren.start("producer", command), log)
}

/// Not a test: what `produce` starts as a process of its own. It logs each id before it is submitted
/// and when it is confirmed, and submits again, under the same id, what was not.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "no test of its own: the producer process of the test above"]
async fn a_producer_process() {
    let config = Config::load(&Sources::default()).unwrap();
    let log = std::env::var_os(LOG).expect("started by `produce`");
    let log = fs::File::options().create(true).append(true).open(log).unwrap();
    let say = |what: &str, id: &str| (&log).write_all(format!("{what} {id}\n").as_bytes()).unwrap();
    let producer = Producer::connect(&config).await.unwrap();
    let batch = producer.batch().await.unwrap();
    say("batch", batch.id().as_str());
    let submit = async |n: usize| {
        let id = TaskId::generate();
        say("tried", id.as_str());
        loop {
            let args = json!({ "millis": n % 40 });
            let task = Submission::dynamic("garenne.sleep", args).unwrap().id(id.clone());
            match batch.submit_detached(task).await {
                Ok(_) => return say("confirmed", id.as_str()),
                Err(error) => assert!(error.is_transient(), "{error:?}"),
            }
        }
    };
    stream::iter(0..TASKS).map(submit).buffer_unordered(16).collect::<()>().await;
    batch.seal().await.unwrap();
}

/// The ids that a producer has logged under a word; a line cut by the kill does not count.
fn told(log: &PathBuf, what: &str) -> BTreeSet<String> {
    let text = fs::read_to_string(log).unwrap_or_default();
    let whole = text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n'));
    let told = whole.filter_map(|line| line.split_once(' ')).filter(|(word, _)| *word == what);
    told.map(|(_, id)| id.to_owned()).collect()
}

async fn at_least(log: &PathBuf, what: &str, count: usize) {
    let waiting_for = format!("{count} ids are {what}");
    eventually(PATIENCE, &waiting_for, async || (told(log, what).len() >= count).then_some(()))
        .await;
}

/// Looks at the store.
struct Observer<'a> {
    warren: &'a Warren,
    seen: usize,
}

impl Observer<'_> {
    fn ids(&self, query: &str) -> BTreeSet<String> {
        self.warren.rows(query).into_iter().collect()
    }

    fn results(&self) -> BTreeSet<String> {
        self.ids("SELECT id FROM results")
    }

    /// Waits until so many more results are stored than at the last call.
    async fn more_results(&mut self, count: usize) {
        let enough = self.seen + count;
        let what = format!("{enough} results are stored");
        self.seen = eventually(PATIENCE, &what, async || {
            let stored = self.results().len();
            (stored >= enough).then_some(stored)
        })
        .await;
    }

    async fn all_ended(&self, confirmed: &BTreeSet<String>) {
        let what = format!("all {} confirmed tasks have an outcome", confirmed.len());
        eventually(PATIENCE, &what, async || confirmed.is_subset(&self.results()).then_some(()))
            .await;
        let failed = self.ids("SELECT id FROM results WHERE status <> 'succeeded'");
        assert_eq!(failed, BTreeSet::new(), "kills are no failures");
        let attempts = self.ids("SELECT id FROM results WHERE attempt <> 1");
        assert_eq!(attempts, BTreeSet::new(), "and cost no attempts");
    }

    fn no_phantoms(&self, tried: &BTreeSet<String>) {
        let phantoms: Vec<_> = self.results().difference(tried).cloned().collect();
        assert_eq!(phantoms, Vec::<String>::new());
    }
}
