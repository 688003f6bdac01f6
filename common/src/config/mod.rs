//! The configuration of a process: [`Config`], read and validated by [`Config::load`].
//!
//! Layers, later ones take precedence: defaults < file < `AMQP_URL` < `GARENNE__SECTION__KEY` <
//! flags. Unknown keys are refused, and all problems are reported together. Nothing outside this
//! directory reads the environment. docs/configuration.md lists every key; a test holds the two
//! together.

mod check;
mod environment;
mod layers;
mod problem;
mod raw;
mod settings;
mod strict;
mod url;

pub use environment::{ISOLATED_ON, broker_pid, isolated_on, management_url, no_color};
pub use layers::Sources;
pub use problem::{ConfigError, without_arguments, without_logins};
pub use settings::{
    BrokerConfig, CollectorConfig, CommandConfig, CommandOutput, Config, LogConfig, LogFormat,
    ProducerConfig, WorkerConfig,
};
pub use url::BrokerUrl;
