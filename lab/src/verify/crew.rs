//! The processes of a run by name, and how each is started.

use super::producers::PRODUCERS;
use crate::cluster::{Cluster, WorkerSpec};
use garenne_cli::error::CliError;
use garenne_common::QueueName;

/// How many tasks a worker of a run takes at once. Enough for deliveries to be under way when it dies.
const CONCURRENCY: usize = 24;

/// Who works in a run.
#[derive(Debug, Clone, Copy)]
pub(super) struct Crew {
    pub(super) workers: usize,
    pub(super) collectors: usize,
}

impl Crew {
    pub(super) fn workers(&self) -> Vec<String> {
        (1..=self.workers).map(|number| format!("Worker-{number}")).collect()
    }

    pub(super) fn collectors(&self) -> Vec<String> {
        (1..=self.collectors).map(|number| format!("Collector-{number}")).collect()
    }

    #[expect(clippy::unused_self, reason = "the crew is asked alike for all its parts")]
    pub(super) fn producers(&self) -> Vec<String> {
        (1..=PRODUCERS).map(|number| format!("Producer {number}")).collect()
    }

    #[expect(clippy::unused_self, reason = "see above")]
    pub(super) fn start_worker(&self, cluster: &mut Cluster, name: &str) -> Result<(), CliError> {
        cluster.spawn_worker(&WorkerSpec {
            // Without a space: it is a word in the ledger's lines.
            name: name.to_owned(),
            queues: vec![QueueName::default()],
            concurrency: CONCURRENCY,
            prefetch: 2 * CONCURRENCY,
        })
    }
}
