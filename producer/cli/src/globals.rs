//! The options that every command takes.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use garenne_common::config::LogFormat;

use crate::options;
use crate::output::Format;

/// Options that every command takes.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Global options")]
pub struct Globals {
    /// A configuration file (TOML)
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// The broker
    #[arg(help = "The broker: amqp://user:password@host:5672/vhost [default: AMQP_URL, or this \
                machine]")]
    #[arg(long, global = true, value_name = "URL")]
    pub(crate) url: Option<String>,
    /// Prefix of the names of all broker objects [default: garenne]
    #[arg(long, global = true, value_name = "NS")]
    pub(crate) namespace: Option<String>,
    /// Format of results and errors: text or json
    #[arg(long, short, global = true, value_enum, default_value_t, value_name = "FORMAT")]
    #[arg(hide_possible_values = true)]
    pub output: Format,
    /// Time limit of each step that needs the broker or the collector
    #[arg(long, global = true, value_name = "TIME", default_value = "5s")]
    #[arg(value_parser = options::duration)]
    pub(crate) deadline: Duration,
    /// More log lines on standard error: -v info, -vv debug, -vvv trace
    #[arg(long, short, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
    /// Format of log lines: human or json
    #[arg(long, global = true, value_name = "FORMAT", value_parser = options::log_format)]
    pub(crate) log_format: Option<LogFormat>,
}
