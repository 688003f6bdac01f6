//! Options that several commands share, and how their values are read.

use std::time::Duration;

use clap::Args;
use garenne_common::QueueName;
use garenne_common::config::LogFormat;

/// How a task wants to be treated.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Task options")]
pub struct TaskOptions {
    /// The queue of workers to send it to
    #[arg(long, short, value_name = "NAME")]
    pub queue: Option<QueueName>,
    /// Start it no earlier than this from now: 90s, 2h, 3days
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub delay: Option<Duration>,
    /// How often to try again after a failure [default: 3]
    #[arg(long, value_name = "N")]
    pub retries: Option<u32>,
    /// The longest one attempt may run [default: the worker's]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub timeout: Option<Duration>,
    /// Tell a running attempt to come to an end by then; it may return until --timeout
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub soft_timeout: Option<Duration>,
    /// Give it up if it has not started by then from now
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub expires: Option<Duration>,
    /// Higher goes first (RabbitMQ 4 and later; older ones ignore it)
    #[arg(long, value_name = "0-255")]
    pub priority: Option<u8>,
}

/// Reads `90s`, `2h 30m`, `250ms`.
pub fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|error| {
        if text.parse::<f64>().is_ok() {
            format!("the unit is missing; write {text}s, {text}m or {text}h")
        } else {
            format!("{error}; write for instance 250ms, 90s, 5m, 2h or 3days")
        }
    })
}

/// Reads `human` or `json`.
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
    fn a_time_without_a_unit_says_so() {
        assert_eq!(duration("1h 30m"), Ok(Duration::from_mins(90)));
        assert!(duration("5").unwrap_err().contains("5s"));
        assert!(duration("soon").unwrap_err().contains("90s"));
    }
}
