//! 100,000 delayed tasks while the broker is killed ten times: none lost, none early (promises 1 to 3).

use std::collections::HashMap;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use garenne_common::{TaskId, Timestamp};
use garenne_producer::Submission;
use serde_json::json;

use super::{figure, size};
use crate::harness::{PrivateNode, Warren, eventually};

const TASKS: usize = 100_000;
const KILLS: usize = 10;
/// Between kills, so that dead-lettering is under way again each time.
const CALM: Duration = Duration::from_secs(6);

/// When a task may start at the earliest.
type Due = HashMap<TaskId, Timestamp>;

#[tokio::test(flavor = "multi_thread")]
async fn delayed_tasks_outlive_ten_kills_of_the_broker_and_none_is_early() {
    let node = PrivateNode::take().await;
    let warren = Warren::on(&node.url()).await;
    let worker = warren.worker().set("worker.concurrency", 64).set("worker.prefetch", 264);
    let worker = worker.set("broker.heartbeat", "2s");
    let (_worker, _collector) = tokio::join!(worker.start(), warren.collector().start());
    let tasks = size(TASKS);
    let due = submit(&warren, tasks).await;
    for _ in 0..size(KILLS) {
        tokio::time::sleep(CALM).await;
        node.kill().await;
        node.start();
    }
    let ended = async || {
        let ended = warren.rows::<u32>("SELECT value FROM counters WHERE name = 'results'");
        (ended.iter().sum::<u32>() as usize == tasks).then_some(())
    };
    eventually(Duration::from_mins(10), "every task has ended", ended).await;
    check(&warren, &due);
}

/// Delays of 20 to 100 seconds: some are due during every kill, at no more than 2,000 a second.
async fn submit(warren: &Warren, tasks: usize) -> Due {
    let producer = warren.producer().await;
    let delays = (0..tasks).map(|task| Duration::from_millis(20_000 + task as u64 * 7919 % 80_000));
    let submissions = delays.map(|delay| {
        let id = TaskId::generate();
        let due = Timestamp::now().plus(delay);
        let submission = Submission::<serde_json::Value>::dynamic("garenne.echo", json!(0));
        (id.clone(), due, submission.unwrap().id(id).delay(delay))
    });
    let submitting = submissions.map(|(id, due, submission)| {
        let producer = producer.clone();
        async move {
            producer.submit_detached(submission).await.unwrap();
            (id, due)
        }
    });
    stream::iter(submitting).buffer_unordered(500).collect().await
}

fn check(warren: &Warren, due: &Due) {
    let ids = warren.rows::<String>("SELECT id FROM results ORDER BY rowid");
    let starts = warren.rows::<i64>("SELECT started_at FROM results ORDER BY rowid");
    let repeats = warren.rows::<u32>("SELECT SUM(repeats) FROM results")[0] as usize;
    let mut late: Vec<u64> = vec![];
    for (id, start) in ids.iter().zip(starts) {
        let due = due[&TaskId::new(id).unwrap()];
        let start = Timestamp::from_millis(start.try_into().unwrap());
        assert!(start >= due, "{id} started {:?} early", due.since(start));
        late.push(start.since(due).as_millis().try_into().unwrap());
    }
    assert_eq!(late.len(), due.len(), "none is lost");
    assert!(repeats * 200 <= due.len(), "{repeats} duplicates are more than 0.5 %");
    late.sort_unstable();
    let share = |percent: usize| late[(late.len() - 1) * percent / 100];
    figure(
        "delays",
        &[
            ("tasks", late.len().to_string()),
            ("kills", size(KILLS).to_string()),
            ("lost", "0".to_owned()),
            ("early", "0".to_owned()),
            ("duplicates", repeats.to_string()),
            ("late_p50_ms", share(50).to_string()),
            ("late_p99_ms", share(99).to_string()),
            ("late_max_ms", share(100).to_string()),
        ],
    );
}
