//! The configuration as written: every key with its default. Nothing is validated here but the type
//! of each value.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use super::settings::{CommandOutput, LogFormat};
use super::strict::{self, Word};
use crate::wire::Codec;

/// All keys, by section.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct RawConfig {
    pub(super) broker: RawBroker,
    pub(super) producer: RawProducer,
    pub(super) worker: RawWorker,
    pub(super) collector: RawCollector,
    pub(super) log: RawLog,
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct RawBroker {
    #[serde(deserialize_with = "strict::text")]
    pub(super) url: String,
    #[serde(deserialize_with = "strict::text")]
    pub(super) namespace: String,
    #[serde(with = "humantime_serde")]
    pub(super) heartbeat: Duration,
    #[serde(with = "humantime_serde")]
    pub(super) connect_timeout: Duration,
    #[serde(with = "humantime_serde")]
    pub(super) publish_timeout: Duration,
    #[serde(deserialize_with = "strict::whole")]
    pub(super) publish_window: usize,
    #[serde(with = "humantime_serde")]
    pub(super) consumer_timeout: Duration,
}

impl Default for RawBroker {
    fn default() -> Self {
        Self {
            url: "amqp://guest:guest@127.0.0.1:5672/%2f".to_owned(),
            namespace: "garenne".to_owned(),
            heartbeat: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(5),
            publish_timeout: Duration::from_secs(15),
            publish_window: 512,
            consumer_timeout: Duration::from_mins(30),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct RawProducer {
    pub(super) codec: Codec,
    #[serde(with = "humantime_serde")]
    pub(super) batch_deadline: Duration,
    #[serde(deserialize_with = "strict::whole")]
    pub(super) bundle_tasks: usize,
    #[serde(with = "humantime_serde")]
    pub(super) bundle_work: Duration,
}

impl Default for RawProducer {
    fn default() -> Self {
        Self {
            codec: Codec::Json,
            batch_deadline: Duration::from_hours(24),
            bundle_tasks: 500,
            bundle_work: Duration::from_millis(20),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct RawWorker {
    #[serde(deserialize_with = "strict::maybe_text")]
    pub(super) name: Option<String>,
    #[serde(deserialize_with = "strict::list")]
    pub(super) queues: Vec<String>,
    #[serde(deserialize_with = "strict::maybe_whole")]
    pub(super) concurrency: Option<usize>,
    #[serde(deserialize_with = "strict::maybe_whole")]
    pub(super) prefetch: Option<usize>,
    #[serde(with = "humantime_serde")]
    pub(super) task_timeout: Duration,
    #[serde(with = "humantime_serde")]
    pub(super) lease_term: Duration,
    #[serde(with = "humantime_serde")]
    pub(super) grace: Duration,
    #[serde(with = "humantime_serde")]
    pub(super) cancel_grace: Duration,
    #[serde(with = "humantime_serde")]
    pub(super) cancel_sync_timeout: Duration,
    #[serde(with = "humantime_serde")]
    pub(super) heartbeat: Duration,
    #[serde(with = "humantime_serde")]
    pub(super) kill_grace: Duration,
    #[serde(deserialize_with = "strict::whole")]
    pub(super) crash_budget: u32,
    #[serde(deserialize_with = "strict::whole")]
    pub(super) max_attempts: u32,
    #[serde(with = "humantime_serde")]
    pub(super) min_retry_delay: Duration,
    #[serde(with = "humantime_serde")]
    pub(super) max_task_age: Duration,
    #[serde(deserialize_with = "strict::flag")]
    pub(super) faults: bool,
    #[serde(deserialize_with = "strict::flag")]
    pub(super) builtins: bool,
    #[serde(deserialize_with = "strict::maybe_text")]
    pub(super) file_root: Option<PathBuf>,
    #[serde(deserialize_with = "strict::whole")]
    pub(super) max_body: usize,
    #[serde(deserialize_with = "strict::list")]
    pub(super) reply_queues: Vec<String>,
    pub(super) commands: BTreeMap<String, RawCommand>,
}

impl Default for RawWorker {
    fn default() -> Self {
        Self {
            name: None,
            queues: vec![crate::names::DEFAULT_QUEUE.to_owned()],
            concurrency: None,
            prefetch: None,
            task_timeout: Duration::from_mins(20),
            lease_term: Duration::from_mins(1),
            grace: Duration::from_secs(30),
            cancel_grace: Duration::from_secs(5),
            cancel_sync_timeout: Duration::from_secs(3),
            heartbeat: Duration::from_secs(2),
            kill_grace: Duration::from_secs(5),
            crash_budget: 3,
            max_attempts: 1_000,
            min_retry_delay: Duration::from_secs(1),
            max_task_age: Duration::from_hours(7 * 24),
            faults: false,
            builtins: true,
            file_root: None,
            max_body: 1024 * 1024,
            reply_queues: vec![],
            commands: BTreeMap::new(),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawCommand {
    #[serde(deserialize_with = "strict::words")]
    pub(super) argv: Vec<String>,
    #[serde(default, deserialize_with = "strict::flag")]
    pub(super) stdin: bool,
    #[serde(default)]
    pub(super) output: CommandOutput,
    #[serde(default)]
    pub(super) env: BTreeMap<String, Word>,
    #[serde(default, deserialize_with = "strict::maybe_text")]
    pub(super) directory: Option<PathBuf>,
}

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct RawCollector {
    #[serde(deserialize_with = "strict::maybe_text")]
    pub(super) name: Option<String>,
    #[serde(deserialize_with = "strict::text")]
    pub(super) store: PathBuf,
    #[serde(with = "humantime_serde")]
    pub(super) retention: Duration,
    #[serde(deserialize_with = "strict::flag")]
    pub(super) task_notices: bool,
    #[serde(deserialize_with = "strict::whole")]
    pub(super) group_size: usize,
    #[serde(with = "humantime_serde")]
    pub(super) group_linger: Duration,
}

impl Default for RawCollector {
    fn default() -> Self {
        Self {
            name: None,
            store: PathBuf::from("garenne.sqlite3"),
            retention: Duration::from_hours(7 * 24),
            task_notices: true,
            group_size: 2_000,
            group_linger: Duration::from_millis(5),
        }
    }
}

/// lapin logs every lost connection several times; Garenne logs it once.
const DEFAULT_FILTER: &str = "info,lapin=off";

#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct RawLog {
    pub(super) format: LogFormat,
    #[serde(deserialize_with = "strict::text")]
    pub(super) filter: String,
}

impl Default for RawLog {
    fn default() -> Self {
        Self { format: LogFormat::Human, filter: DEFAULT_FILTER.to_owned() }
    }
}
