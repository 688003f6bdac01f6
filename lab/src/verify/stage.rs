//! Setting a run up and clearing it away.

use std::time::{Duration, Instant};

use garenne_cli::context::Context;
use garenne_cli::error::CliError;
use garenne_common::Timestamp;
use garenne_common::config::{BrokerConfig, BrokerUrl};
use garenne_producer::Producer;
use tokio::time::sleep;

use super::VerifyArgs;
use super::bounds;
use super::crew::Crew;
use super::drive::{Facts, RunStage, Seen};
use super::faults::Nemesis;
use super::ledger::Ledger;
use super::listener::Listener;
use super::mix::{CRASH_BUDGET, Mix};
use super::node::Node;
use super::plan::{Kind, LeftOut, Schedule};
use super::proxy::Proxy;
use super::vitals::Vitals;
use super::workload::Workload;
use crate::cluster::{Cluster, Process};

/// Short, so that frozen processes and silent lines are noticed within a run.
const HEARTBEAT: Duration = Duration::from_secs(2);
/// How long everything may take until it is ready.
const READY_WITHIN: Duration = Duration::from_secs(30);

/// What a run will be.
pub(super) struct Setting {
    mix: Mix,
    crew: Crew,
    patience: Duration,
    kinds: Vec<Kind>,
    left_out: LeftOut,
    url: BrokerUrl,
    node: Option<Node>,
    repeat: String,
}

impl Setting {
    /// What is asked for, as far as it is possible here.
    pub(super) fn of(
        context: &Context,
        arguments: &VerifyArgs,
        seed: u64,
    ) -> Result<Self, CliError> {
        let url = context.config.broker.urls.first().cloned();
        let url = url.ok_or_else(|| CliError::unusable("no broker URL is configured"))?;
        let node = Node::behind(&url);
        let (kinds, left_out) = arguments.faults.resolve(|kind| match kind {
            Kind::Broker if node.is_none() => {
                Err("the broker is not this command's to kill: run it under \
                 `scripts/rabbitmq run -- garenne verify …`, or `make verify`")
            }
            Kind::Connection if url.is_encrypted() => {
                Err("a TLS connection cannot be led over another line: use an amqp:// URL")
            }
            Kind::Worker
            | Kind::Collector
            | Kind::Producer
            | Kind::Connection
            | Kind::Broker
            | Kind::Freeze => Ok(()),
        })?;
        let crew = Crew {
            workers: usize::from(arguments.workers),
            collectors: usize::from(arguments.collectors),
        };
        let list: Vec<_> = kinds.iter().map(|kind| kind.as_str()).collect();
        let list = if list.is_empty() { "none".to_owned() } else { list.join(",") };
        let repeat = format!(
            "garenne verify --tasks {} --seed {seed} --faults {list} --workers {} --collectors {}",
            arguments.tasks, crew.workers, crew.collectors
        );
        let mix = Mix { seed, tasks: arguments.tasks };
        let patience = arguments.patience;
        Ok(Self { mix, crew, patience, kinds, left_out, url, node, repeat })
    }

    /// Starts everything but the producers, and waits until it is ready.
    pub(super) async fn start(self, context: &Context) -> Result<RunStage, CliError> {
        let mut cluster = Cluster::start(context, "verify", "garenne-lab-worker", &[]).await?;
        match self.furnish(context, &mut cluster).await {
            Ok(parts) => Ok(parts.stage(self, cluster)),
            Err(error) => {
                cluster.close(context).await;
                Err(error)
            }
        }
    }

    async fn furnish(&self, context: &Context, cluster: &mut Cluster) -> Result<Parts, CliError> {
        let listens = |error: std::io::Error| {
            CliError::unusable(format!("cannot listen on this machine: {error}"))
        };
        let mut config = cluster.config().clone();
        config.broker.heartbeat = HEARTBEAT;
        let batch_deadline = if self.mix.tasks < 2_000 { 15 } else { 45 };
        let batch_deadline = Duration::from_secs(batch_deadline);
        cluster.declare(&config.broker.topology().notice_keeper()).await?;
        let listener = Listener::start(&config.broker, self.mix).await?;
        let vitals = Vitals::start(&config.broker).await?;
        let ledger = Ledger::start(self.mix).await.map_err(listens)?;
        let proxy = if self.url.is_encrypted() {
            None
        } else {
            Some(Proxy::start(self.url.address()).await.map_err(listens)?)
        };
        cluster.set("GARENNE__BROKER__HEARTBEAT", seconds(HEARTBEAT));
        cluster.set("GARENNE__PRODUCER__BATCH_DEADLINE", seconds(batch_deadline));
        // Bundles are part of what is tried, and the certificate counts their tasks.
        cluster.set("GARENNE__PRODUCER__BUNDLE_TASKS", "500");
        cluster.set("GARENNE__WORKER__CRASH_BUDGET", CRASH_BUDGET.to_string());
        cluster.set("GARENNE_LAB_LEDGER", ledger.address());
        if let Some(proxy) = &proxy {
            cluster.set("GARENNE__BROKER__URL", self.url.via_local_port(proxy.port()).expose());
        }
        let producer = Producer::connect_as(&config, "garenne verify").await?;
        for name in self.crew.collectors() {
            cluster.spawn_collector(&name)?;
        }
        for name in self.crew.workers() {
            self.crew.start_worker(cluster, &name)?;
        }
        self.ready(cluster, &config.broker, &producer).await?;
        let before = bounds::measure(cluster);
        let own_broker = self.node.is_some();
        let schedule = Schedule::new(self.mix.seed, self.mix.tasks, &self.kinds, own_broker);
        tracing::info!(namespace = %cluster.namespace(), "ready");
        context.output.remark(format_args!(
            "verify: seed {}, {} tasks, {} faults, namespace {}",
            self.mix.seed,
            self.mix.tasks,
            schedule.faults.len(),
            cluster.namespace()
        ));
        let facts = Facts {
            schedule: schedule.counts(),
            left_out: self.left_out.clone(),
            repeat: self.repeat.clone(),
            started_at: Timestamp::now(),
            before,
        };
        Ok(Parts { listener, vitals, ledger, proxy, producer, schedule, batch_deadline, facts })
    }

    /// Waits until the collectors answer and every worker consumes.
    async fn ready(
        &self,
        cluster: &mut Cluster,
        broker: &BrokerConfig,
        producer: &Producer,
    ) -> Result<(), CliError> {
        let begun = Instant::now();
        let (topology, admin) = (broker.topology(), cluster.admin());
        let queues = [
            (topology.results(), self.crew.collectors),
            (topology.task_queue(&garenne_common::QueueName::default()), self.crew.workers),
        ];
        for (queue, wanted) in queues {
            loop {
                let status = admin.queue_status(&queue).await?;
                let consumers = status.map_or(0, |status| status.consumers);
                if usize::try_from(consumers).is_ok_and(|consumers| consumers >= wanted) {
                    break;
                }
                let ended = cluster.processes().iter_mut().find_map(Process::complaint);
                if let Some(error) = ended {
                    return Err(error);
                }
                if begun.elapsed() > READY_WITHIN {
                    let what = format!("{consumers} of {wanted} processes consume {queue}");
                    return Err(CliError::unusable(what));
                }
                sleep(Duration::from_millis(20)).await;
            }
        }
        Ok(producer
            .query_within(garenne_common::wire::Query::Totals, READY_WITHIN)
            .await
            .map(drop)?)
    }
}

/// What was made for a run.
struct Parts {
    listener: Listener,
    vitals: Vitals,
    ledger: Ledger,
    proxy: Option<Proxy>,
    producer: Producer,
    schedule: Schedule,
    batch_deadline: Duration,
    facts: Facts,
}

impl Parts {
    fn stage(self, setting: Setting, cluster: Cluster) -> RunStage {
        let Self { listener, vitals, ledger, proxy, producer, schedule, batch_deadline, facts } =
            self;
        let Setting { mix, crew, patience, node, .. } = setting;
        let nemesis = Nemesis::new(schedule, node);
        let workload = Workload::new(mix);
        let seen = Seen {
            begun: Instant::now(),
            drained: Duration::ZERO,
            early: vec![],
            noted: vec![],
            longest_wait: Duration::ZERO,
            poisoned: 0,
        };
        RunStage {
            mix,
            cluster,
            crew,
            proxy,
            ledger,
            listener,
            vitals,
            producer,
            nemesis,
            workload,
            batch_deadline,
            patience,
            facts,
            seen,
        }
    }
}

impl RunStage {
    /// Mends what is broken and removes everything, but for the directory if it is to be kept.
    pub(super) async fn close(mut self, context: &Context, keep: bool) {
        self.nemesis.mend_all(&mut self.cluster, &self.crew, self.proxy.as_ref()).await;
        drop(self.listener);
        tokio::time::timeout(Duration::from_secs(2), self.producer.close())
            .await
            .unwrap_or_default();
        if keep {
            self.cluster.keep_directory();
            let place = self.cluster.directory().display();
            context.output.remark(format_args!("store and logs are kept in {place}"));
        }
        self.cluster.close(context).await;
    }
}

fn seconds(duration: Duration) -> String {
    format!("{}s", duration.as_secs())
}
