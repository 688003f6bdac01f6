//! Everything that the notices exchange says in a run, through a durable queue: outages delay it and
//! lose nothing, so a notice that is missing here was not published.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use garenne_common::broker::{BrokerError, Consumer, ConsumerSpec, Link, QueueSource};
use garenne_common::config::BrokerConfig;
use garenne_common::wire::{BatchSummary, Notice, TaskSummary};
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use super::mix::Mix;

const PREFETCH: u16 = 1_000;
/// How many strangers are remembered by name.
const NAMED_STRANGERS: usize = 20;

/// Listens until it is dropped.
pub(super) struct Listener {
    heard: Arc<Mutex<Heard>>,
    _listening: AbortOnDropHandle<()>,
}

/// What was heard.
#[derive(Debug, Default)]
pub(super) struct Heard {
    pub(super) tasks: HashMap<u64, Told<TaskSummary>>,
    pub(super) batches: HashMap<String, Told<BatchSummary>>,
    /// Notices that cannot be read, or of tasks that nobody submitted.
    pub(super) strangers: Vec<String>,
}

/// A notice, and what came of it later.
#[derive(Debug)]
pub(super) struct Told<T> {
    /// The first one.
    pub(super) summary: T,
    /// How often it came.
    pub(super) times: u32,
    /// One that came later and said something else.
    pub(super) other: Option<T>,
    pub(super) at: Instant,
}

impl Listener {
    /// Consumes the queue, which is declared.
    pub(super) async fn start(config: &BrokerConfig, mix: Mix) -> Result<Self, BrokerError> {
        let declarations = config.topology().notice_keeper();
        let spec = ConsumerSpec {
            queue: QueueSource::Named(declarations[0].name().to_owned()),
            declarations: declarations.to_vec(),
            prefetch: PREFETCH,
            tag: "garenne verify".to_owned(),
            no_ack: false,
        };
        let consumer = Consumer::start(Link::new(config, "garenne verify consume"), spec);
        consumer.ready().await?;
        let heard = Arc::<Mutex<Heard>>::default();
        let listening = TaskTracker::new().spawn(listen(consumer, Arc::clone(&heard), mix));
        Ok(Self { heard, _listening: AbortOnDropHandle::new(listening) })
    }

    /// What was heard so far.
    pub(super) fn read<R>(&self, read: impl FnOnce(&Heard) -> R) -> R {
        read(&self.heard.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

async fn listen(mut consumer: Consumer, heard: Arc<Mutex<Heard>>, mix: Mix) {
    while let Some(delivery) = consumer.next().await {
        let mut last = delivery.tag;
        let mut notices = vec![Notice::decode(&delivery.message)];
        while let Some(delivery) = consumer.try_next() {
            // A new epoch brings the old one's deliveries again; its numbers say nothing of them.
            if delivery.tag.epoch != last.epoch {
                notices.clear();
            }
            last = delivery.tag;
            notices.push(Notice::decode(&delivery.message));
        }
        {
            let mut heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
            for notice in notices {
                heard.enter(mix, notice.map_err(|error| error.to_string()));
            }
        }
        // If it fails the channel is gone, and all of this comes again as repeats.
        consumer.settler().ack(last, true);
    }
}

impl Heard {
    pub(super) fn enter(&mut self, mix: Mix, notice: Result<Notice, String>) {
        match notice {
            Ok(Notice::Task(task)) => match mix.index_of(task.task.as_str()) {
                Some(index) => tell(&mut self.tasks, index, task),
                None => self.stranger(format!("a notice of task {}", task.task)),
            },
            Ok(Notice::Batch(batch)) => tell(&mut self.batches, batch.batch.to_string(), batch),
            Err(error) => self.stranger(format!("a notice that cannot be read: {error}")),
        }
    }

    fn stranger(&mut self, what: String) {
        if self.strangers.len() < NAMED_STRANGERS {
            self.strangers.push(what);
        }
    }

    /// How many came more than once.
    pub(super) fn repeats(&self) -> u64 {
        let tasks = self.tasks.values().map(|told| told.times);
        let times = tasks.chain(self.batches.values().map(|told| told.times));
        times.map(|times| u64::from(times.saturating_sub(1))).sum()
    }
}

fn tell<K: Eq + std::hash::Hash, T: PartialEq>(to: &mut HashMap<K, Told<T>>, key: K, summary: T) {
    if let Some(told) = to.get_mut(&key) {
        told.times += 1;
        if told.summary != summary {
            told.other = Some(summary);
        }
    } else {
        to.insert(key, Told { summary, times: 1, other: None, at: Instant::now() });
    }
}
