//! What the processes of a run say of themselves: the problems that their heartbeats tell of.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use garenne_common::broker::{BrokerError, Consumer, ConsumerSpec, Link, QueueSource};
use garenne_common::config::BrokerConfig;
use garenne_common::wire::{CollectorHeartbeat, Heartbeat, Message};
use garenne_common::{Problem, TaskId};
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use super::liveness::Waiting;

/// Heartbeats on their way here.
const BUFFER: u16 = 256;

/// Listens until it is dropped.
pub(super) struct Vitals {
    problems: Arc<Mutex<Problems>>,
    _listening: AbortOnDropHandle<()>,
}

/// By process and code: in which words, and since when.
type Problems = HashMap<(String, String), (String, Instant)>;

impl Vitals {
    pub(super) async fn start(config: &BrokerConfig) -> Result<Self, BrokerError> {
        let topology = config.topology();
        let name = topology.reply_queue(&format!("verify-{}", TaskId::generate()));
        let spec = ConsumerSpec {
            declarations: topology.named(&topology.heartbeats()),
            queue: QueueSource::Exclusive {
                name: Box::new(move || name.clone()),
                bindings: vec![(topology.heartbeats(), String::new())],
            },
            prefetch: BUFFER,
            tag: "garenne verify heartbeats".to_owned(),
            no_ack: true,
        };
        let consumer = Consumer::start(Link::new(config, "garenne verify heartbeats"), spec);
        consumer.ready().await?;
        let problems = Arc::<Mutex<Problems>>::default();
        let listening = TaskTracker::new().spawn(listen(consumer, Arc::clone(&problems)));
        Ok(Self { problems, _listening: AbortOnDropHandle::new(listening) })
    }

    /// The problems that are known now.
    pub(super) fn waiting(&self) -> Vec<Waiting> {
        let problems = self.problems.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = problems.iter().map(|((process, code), (detail, since))| Waiting {
            subject: process.clone(),
            what: format!("{code}: {detail}"),
            since: *since,
        });
        waiting.collect()
    }
}

async fn listen(mut consumer: Consumer, problems: Arc<Mutex<Problems>>) {
    while let Some(delivery) = consumer.next().await {
        let Some((process, told)) = read(&delivery.message) else { continue };
        let mut problems = problems.lock().unwrap_or_else(PoisonError::into_inner);
        note(&mut problems, &process, told, Instant::now());
    }
}

/// Who says what of itself.
fn read(message: &Message) -> Option<(String, Vec<Problem>)> {
    if CollectorHeartbeat::is_one(message) {
        let heartbeat = CollectorHeartbeat::decode(message).ok()?;
        return Some((heartbeat.collector, heartbeat.problems));
    }
    let heartbeat = Heartbeat::decode(message).ok()?;
    Some((heartbeat.worker, heartbeat.problems))
}

fn note(known: &mut Problems, process: &str, told: Vec<Problem>, now: Instant) {
    let lasts = |code: &str| told.iter().any(|problem| problem.code == code);
    known.retain(|(name, code), _| name != process || lasts(code));
    for Problem { code, detail, .. } in told {
        let entry = known.entry((process.to_owned(), code)).or_insert((String::new(), now));
        entry.0 = detail;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use garenne_common::Timestamp;

    #[test]
    fn a_problem_lasts_from_the_first_heartbeat_that_tells_of_it_to_the_first_that_does_not() {
        let (mut known, now) = (Problems::default(), Instant::now());
        let problem = |code: &str| Problem {
            code: code.to_owned(),
            detail: "so".to_owned(),
            since: Timestamp::from_millis(0),
        };
        note(&mut known, "w", vec![problem("a"), problem("b")], now);
        note(&mut known, "other", vec![problem("a")], now);
        let later = now + std::time::Duration::from_secs(1);
        note(&mut known, "w", vec![problem("b")], later);
        assert_eq!(known.len(), 2);
        assert_eq!(known[&("w".to_owned(), "b".to_owned())].1, now);
    }
}
