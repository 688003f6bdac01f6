//! Options that several commands share, and the parsers of their values.

use std::time::Duration;

use clap::Args;
use garenne_common::QueueName;
use garenne_common::config::LogFormat;

/// The options of a task.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Task options")]
pub struct TaskOptions {
    /// The queue to send it to [default: default]
    #[arg(long, short, value_name = "NAME")]
    pub queue: Option<QueueName>,
    /// Start it no earlier than this after its submission: 90s, 2h, 3days
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub delay: Option<Duration>,
    /// Number of further attempts after a failure [default: 3]
    #[arg(long, value_name = "N")]
    pub retries: Option<u32>,
    /// Time limit of one attempt [default: the worker's]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub timeout: Option<Duration>,
    /// Ask a running attempt to end after this time; it may still return until --timeout
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub soft_timeout: Option<Duration>,
    /// Fail it if it has not started within this time
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub expires: Option<Duration>,
    /// Tasks of higher priority go first (RabbitMQ 4 and later; older ones ignore it)
    #[arg(long, value_name = "0-255")]
    pub priority: Option<u8>,
}

/// Parses `90s`, `2h 30m`, `250ms`.
pub fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|error| {
        if text.parse::<f64>().is_ok() {
            format!("the unit is missing; write {text}s, {text}m or {text}h")
        } else {
            format!("{error}; examples: 250ms, 90s, 5m, 2h, 3days")
        }
    })
}

/// Parses `human` or `json`.
pub fn log_format(text: &str) -> Result<LogFormat, String> {
    match text {
        "human" => Ok(LogFormat::Human),
        "json" => Ok(LogFormat::Json),
        _ => Err("write human or json".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_without_a_unit_is_refused_with_examples() {
        assert_eq!(duration("1h 30m"), Ok(Duration::from_mins(90)));
        assert!(duration("5").unwrap_err().contains("5s"));
        assert!(duration("soon").unwrap_err().contains("90s"));
    }
}
