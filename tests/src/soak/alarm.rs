//! Two minutes of a memory alarm with producers at full speed: memory stays, callers hear in time, and
//! the rate is back at once.

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use garenne_producer::{Producer, Submission};
use serde_json::Value;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::figure;
use crate::harness::{PrivateNode, Warren};

const CALLERS: usize = 1_000;
const BODY: usize = 1_000;
const DEADLINE: Duration = Duration::from_secs(5);
/// A timer on a busy machine.
const LATE: Duration = Duration::from_secs(1);
const WARM_UP: usize = 10;
const BEFORE: usize = 10;
const ALARM: usize = 120;
const AFTER: usize = 5;
const MOST_GROWTH: usize = 64 * 1024;

/// Kilobytes of this process that are in memory: the producers run in it.
fn resident() -> usize {
    let status = fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find(|line| line.starts_with("VmRSS")).expect("it has one");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("a number")
}

#[derive(Default)]
struct Seen {
    confirmed: AtomicUsize,
    failed: AtomicUsize,
    over: AtomicBool,
    /// How long callers waited for their errors, at most.
    latest: Mutex<Duration>,
    /// Errors that are not the one expected.
    odd: Mutex<Vec<String>>,
}

impl Seen {
    async fn submit_on_and_on(&self, producer: &Producer) {
        let text = "x".repeat(BODY);
        while !self.over.load(Ordering::Relaxed) {
            let begun = Instant::now();
            let echo = Submission::<Value>::dynamic("garenne.echo", &text).expect("sound");
            let Err(error) = producer.submit_detached(echo).await else {
                self.confirmed.fetch_add(1, Ordering::Relaxed);
                continue;
            };
            self.failed.fetch_add(1, Ordering::Relaxed);
            let mut latest = self.latest.lock().expect("nobody panics with it");
            *latest = begun.elapsed().max(*latest);
            if !error.to_string().contains("memory or disk alarm") {
                self.odd.lock().expect("nobody panics with it").push(error.to_string());
            }
        }
    }

    /// Confirmed tasks in each of the next seconds, and the most memory meanwhile.
    async fn rates(&self, seconds: usize) -> (Vec<usize>, usize) {
        let (mut rates, mut most) = (vec![], 0);
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        tick.tick().await;
        for _ in 0..seconds {
            let before = self.confirmed.load(Ordering::Relaxed);
            tick.tick().await;
            rates.push(self.confirmed.load(Ordering::Relaxed) - before);
            most = most.max(resident());
        }
        (rates, most)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_alarm_of_two_minutes_costs_no_memory_and_no_speed() {
    let node = PrivateNode::take().await;
    let warren = Warren::on(&node.url()).await;
    let (_worker, _collector) = warren.crew().await;
    let mut config = warren.config();
    config.broker.publish_timeout = DEADLINE;
    let producer = Producer::connect(&config).await.unwrap();
    let seen = Arc::<Seen>::default();
    let mut callers = JoinSet::new();
    for _ in 0..CALLERS {
        let (seen, producer) = (Arc::clone(&seen), producer.clone());
        callers.spawn(async move { seen.submit_on_and_on(&producer).await });
    }
    seen.rates(WARM_UP).await;
    let (mut before, usual) = seen.rates(BEFORE).await;
    node.alarm();
    let (during, most) = seen.rates(ALARM).await;
    node.calm();
    let (after, _) = seen.rates(AFTER).await;
    seen.over.store(true, Ordering::Relaxed);
    while callers.join_next().await.is_some() {}

    before.sort_unstable();
    let median = before[before.len() / 2];
    let growth = most.saturating_sub(usual);
    let latest = *seen.latest.lock().unwrap();
    let errors = seen.failed.load(Ordering::Relaxed);
    figure(
        "alarm",
        &[
            ("median_before_per_s", median.to_string()),
            ("confirmed_during", during.iter().sum::<usize>().to_string()),
            ("errors", errors.to_string()),
            ("latest_error", format!("{latest:?}")),
            ("growth_kib", growth.to_string()),
            ("after_per_s", format!("{after:?}")),
        ],
    );
    assert!(errors > CALLERS, "everybody heard of it");
    assert!(latest <= DEADLINE + LATE, "{latest:?}");
    assert!(growth <= MOST_GROWTH, "{growth} KiB");
    let best = after.iter().max().unwrap();
    assert!(best * 10 >= median * 8, "{after:?} after a median of {median}");
    // What began before the broker had said that it is blocked, it may have answered late.
    let odd = seen.odd.lock().unwrap();
    assert!(odd.len() < CALLERS, "{} {:?}", odd.len(), odd.first());
}
