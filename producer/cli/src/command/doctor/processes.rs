//! Workers and collectors as their heartbeats describe them: each problem that a process reports is
//! a problem here, and so is a consumer without heartbeats. Only listens; sends nothing.

use std::collections::BTreeMap;
use std::time::Duration;

use garenne_common::broker::{Admin, Consumer, ConsumerSpec, Link, QueueSource};
use garenne_common::wire::{CollectorHeartbeat, Heartbeat, Message};
use garenne_common::{Problem, QueueName};

use super::check::{Check, Verdict};
use crate::context::Context;

/// Every collector and, with default settings, every worker sends a heartbeat within this time.
const HEARTBEAT_PERIOD: Duration = Duration::from_millis(2_500);
/// Heartbeats buffered here.
const BUFFER: u16 = 256;
/// The most processes that are recorded, because any client can send heartbeats.
const MAX_PROCESSES: usize = 10_000;

const LEADERLESS: &str = "it may have no leader: check with `rabbitmq-queues quorum_status`; \
                          docs/operations.md says what to do";

/// The last heartbeat of each process, by name.
#[derive(Debug, Default)]
struct Heard {
    workers: BTreeMap<String, Heartbeat>,
    collectors: BTreeMap<String, CollectorHeartbeat>,
}

impl Heard {
    fn take(&mut self, message: &Message) {
        if CollectorHeartbeat::is_one(message) {
            if let Ok(heartbeat) = CollectorHeartbeat::decode(message)
                && self.collectors.len() < MAX_PROCESSES
            {
                self.collectors.insert(heartbeat.collector.clone(), heartbeat);
            }
        } else if let Ok(heartbeat) = Heartbeat::decode(message)
            && self.workers.len() < MAX_PROCESSES
        {
            self.workers.insert(heartbeat.worker.clone(), heartbeat);
        }
    }

    /// Workers that serve this queue.
    fn serving(&self, queue: &QueueName) -> u32 {
        let serving = self.workers.values().filter(|worker| worker.queues.contains(queue));
        u32::try_from(serving.count()).unwrap_or(u32::MAX)
    }

    /// Collectors that consume results.
    fn collecting(&self) -> u32 {
        let collecting = self.collectors.values().filter(|collector| collector.consuming);
        u32::try_from(collecting.count()).unwrap_or(u32::MAX)
    }
}

/// Numbers of consumers according to the broker.
struct Consumers {
    queues: Vec<(QueueName, u32)>,
    results: u32,
}

impl Consumers {
    async fn count(context: &Context, admin: &Admin, queues: &[QueueName]) -> Self {
        let topology = context.config.broker.topology();
        let count = async |queue: &str| match admin.queue_status(queue).await {
            Ok(Some(status)) => status.consumers,
            // Reported by another check.
            Ok(None) | Err(_) => 0,
        };
        let mut counted = vec![];
        for queue in queues {
            counted.push((queue.clone(), count(&topology.task_queue(queue)).await));
        }
        Self { queues: counted, results: count(&topology.results()).await }
    }

    /// The queues without consumers that processes claim to consume: the queue, their number, and
    /// their kind.
    fn missing_consumers(&self, heard: &Heard) -> Vec<(String, u32, &'static str)> {
        let draining = heard.workers.values().any(|worker| worker.draining);
        let tasks = self.queues.iter().filter(|_| !draining).map(|(queue, consumers)| {
            (format!("queue {queue}"), *consumers, heard.serving(queue), "worker")
        });
        let results = ("results".to_owned(), self.results, heard.collecting(), "collector");
        tasks
            .chain([results])
            .filter(|(_, consumers, said, _)| *consumers == 0 && *said > 0)
            .map(|(queue, _, said, who)| (queue, said, who))
            .collect()
    }

    fn all_heard(&self, heard: &Heard) -> bool {
        heard.collecting() >= self.results
            && self.queues.iter().all(|(queue, consumers)| heard.serving(queue) >= *consumers)
    }
}

/// Listens until every consumer's process was heard, at least one heartbeat period and at most two.
pub(super) async fn processes(
    context: &Context,
    link: &Link,
    admin: &Admin,
    queues: &[QueueName],
) -> Vec<Check> {
    let mut consumers = Consumers::count(context, admin, queues).await;
    let mut heartbeats = listen(context, link);
    if let Err(error) = heartbeats.ready().await {
        return vec![Check::bad("heartbeats", error.into())];
    }
    let mut heard = Heard::default();
    let least = tokio::time::Instant::now() + HEARTBEAT_PERIOD;
    let most = least + HEARTBEAT_PERIOD.max(2 * context.config.worker.heartbeat);
    loop {
        // At least one period even then, because a collector that stands back does not consume and
        // so is not expected.
        let until = if consumers.all_heard(&heard) { least } else { most };
        match tokio::time::timeout_at(until, heartbeats.next()).await {
            Ok(Some(delivery)) => heard.take(&delivery.message),
            Ok(None) => break,
            Err(_) if until == most || consumers.all_heard(&heard) => break,
            Err(_) => {}
        }
    }
    if !consumers.missing_consumers(&heard).is_empty() {
        // Consumers may have appeared meanwhile.
        consumers = Consumers::count(context, admin, queues).await;
    }
    evaluate(&heard, &consumers)
}

fn listen(context: &Context, link: &Link) -> Consumer {
    let topology = context.config.broker.topology();
    let bindings = vec![(topology.heartbeats(), String::new())];
    let name = Box::new(move || topology.reply_queue("doctor"));
    let queue = QueueSource::Exclusive { name, bindings };
    let (tag, prefetch) = ("garenne doctor heartbeats".to_owned(), BUFFER);
    let spec = ConsumerSpec { declarations: vec![], queue, prefetch, tag, no_ack: true };
    Consumer::start(link.clone(), spec)
}

fn evaluate(heard: &Heard, consumers: &Consumers) -> Vec<Check> {
    let mut checks = vec![];
    for worker in heard.workers.values() {
        checks.extend(problems("worker", &worker.worker, &worker.problems));
    }
    for collector in heard.collectors.values() {
        checks.extend(problems("collector", &collector.collector, &collector.problems));
    }
    for (queue, consumers) in &consumers.queues {
        let what = format!("consumers of the queue {queue}");
        checks.extend(silent("worker", &what, *consumers, heard.serving(queue)));
    }
    checks.extend(silent("collector", "collectors", consumers.results, heard.collecting()));
    for (queue, said, who) in consumers.missing_consumers(heard) {
        let who =
            if said == 1 { format!("1 {who} reports") } else { format!("{said} {who}s report") };
        let detail = format!("{who} consuming it, but RabbitMQ counts no consumer");
        checks.push(Check::new(queue, Verdict::Bad, detail).advice(LEADERLESS));
    }
    if checks.is_empty() {
        let (workers, collectors) = (heard.workers.len(), heard.collectors.len());
        let detail = format!("workers: {workers}, collectors: {collectors}; no problems reported");
        checks.push(Check::good("processes", detail));
    }
    checks
}

fn problems(kind: &str, process: &str, problems: &[Problem]) -> Vec<Check> {
    let bad = |problem: &Problem| {
        let Problem { code, detail, since } = problem;
        let detail = format!("{process}: {code} since {since}: {detail}");
        Check::new(kind, Verdict::Bad, detail)
            .advice("docs/operations.md explains the problem; the log of that process has details")
    };
    problems.iter().map(bad).collect()
}

fn silent(kind: &str, what: &str, consumers: u32, heard: u32) -> Option<Check> {
    (consumers > heard).then(|| {
        let detail = format!("{} of {consumers} {what} sent no heartbeat", consumers - heard);
        Check::new(kind, Verdict::Bad, detail)
            .advice("a process is frozen, disconnected or of an older version; look at its log")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use garenne_common::Timestamp;

    fn collector(problems: Vec<Problem>) -> CollectorHeartbeat {
        CollectorHeartbeat {
            collector: "host:9".to_owned(),
            version: "1".to_owned(),
            store: "s".to_owned(),
            store_created: Timestamp::from_millis(0),
            consuming: true,
            uncommitted: 0,
            problems,
            every_ms: 2_000,
            at: Timestamp::from_millis(0),
        }
    }

    fn verdicts(heard: &Heard, consumers: &Consumers) -> Vec<(String, Verdict)> {
        let named = |check: Check| (check.name, check.state);
        evaluate(heard, consumers).into_iter().map(named).collect()
    }

    #[test]
    fn each_reported_problem_and_each_silent_consumer_is_bad() {
        let mut heard = Heard::default();
        let cpu = QueueName::new("cpu").unwrap();
        let mut consumers = Consumers { queues: vec![], results: 1 };
        heard.take(&collector(vec![]).encode());
        assert_eq!(verdicts(&heard, &consumers), [("processes".to_owned(), Verdict::Good)]);
        let problem = Problem {
            code: "store_failing".to_owned(),
            detail: "full".to_owned(),
            since: Timestamp::from_millis(0),
        };
        heard.take(&collector(vec![problem]).encode());
        assert_eq!(verdicts(&heard, &consumers), [("collector".to_owned(), Verdict::Bad)]);
        consumers.queues.push((cpu, 2));
        consumers.results = 2;
        let bad = ["collector", "worker", "collector"].map(|name| (name.to_owned(), Verdict::Bad));
        assert_eq!(verdicts(&heard, &consumers), bad);
        (consumers.queues, consumers.results) = (vec![], 0);
        heard.take(&collector(vec![]).encode());
        assert_eq!(verdicts(&heard, &consumers), [("results".to_owned(), Verdict::Bad)]);
    }
}
