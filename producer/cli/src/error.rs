//! How a command ends: exit codes, and errors with one sentence about what is wrong and one about
//! what to do.
//!
//! Errors of the libraries come in and get their advice here, because only this crate knows the
//! command's own subcommands and flags. How errors are printed is up to [`output`](crate::output).

use std::process::ExitCode;

use garenne_common::QueueName;
use garenne_common::broker::BrokerError;
use garenne_common::config::ConfigError;
use garenne_producer::{OutputError, QueryError, SubmitError};

use crate::difference::Difference;

/// Exit codes. `garenne --help` lists them for users.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Success.
    Success,
    /// Completed with a negative result: a task failed, or a check found a problem.
    Failed,
    /// Not possible: wrong usage, bad input, no broker, no collector.
    Unusable,
    /// The given time passed before the end, or the collector does not know the id (yet).
    NotYet,
    /// Ended by Ctrl-C (SIGINT).
    Interrupted,
    /// Ended by SIGTERM.
    Terminated,
    /// Ended by SIGHUP: the terminal was closed.
    HungUp,
    /// Standard output was closed by its reader; the code of a process that SIGPIPE has killed.
    BrokenPipe,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

impl Exit {
    /// The number that the shell sees.
    pub const fn code(self) -> u8 {
        match self {
            Self::Success => 0,
            Self::Failed => 1,
            Self::Unusable => 2,
            Self::NotYet => 3,
            Self::HungUp => 129,
            Self::Interrupted => 130,
            Self::BrokenPipe => 141,
            Self::Terminated => 143,
        }
    }
}

/// Why a command ended early.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CliError {
    /// What is wrong: one sentence, without a full stop.
    pub message: String,
    /// What to do about it.
    pub help: Option<String>,
    /// The exit code.
    pub exit: Exit,
}

impl CliError {
    /// An error with [`Exit::Unusable`] (exit code 2).
    pub fn unusable(message: impl Into<String>) -> Self {
        Self { message: message.into(), help: None, exit: Exit::Unusable }
    }

    /// Splits the message of a library into what is wrong and, after the last semicolon, what to
    /// do.
    fn from_sentence(sentence: &str) -> Self {
        match sentence.rsplit_once("; ") {
            Some((message, help)) => Self::unusable(message).help(help),
            None => Self::unusable(sentence),
        }
    }

    /// The collector's response does not have the type that the query asks for.
    pub fn unexpected_response() -> Self {
        Self::unusable("the collector sent a response of an unexpected type")
            .help("are garenne and garenne-collector of the same version?")
    }

    /// Sets what to do about it.
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// Sets another exit code.
    pub const fn exit(mut self, exit: Exit) -> Self {
        self.exit = exit;
        self
    }
}

impl From<ConfigError> for CliError {
    fn from(error: ConfigError) -> Self {
        Self::unusable(error.to_string())
    }
}

impl From<BrokerError> for CliError {
    fn from(error: BrokerError) -> Self {
        let help = help_for(&error);
        if let BrokerError::Conflict { object, cause } = &error {
            let difference = Difference::read(cause);
            let message = format!("the {object} exists, but {difference}");
            return Self { message, help, exit: Exit::Unusable };
        }
        // The library's message ends with its own advice, which `help` replaces.
        let message = error.to_string();
        let message = message.split_once("; ").map_or(message.as_str(), |(what, _)| what);
        Self { message: message.to_owned(), help, exit: Exit::Unusable }
    }
}

impl From<SubmitError> for CliError {
    fn from(error: SubmitError) -> Self {
        match error {
            SubmitError::Broker(error) => error.into(),
            SubmitError::Unconfirmed { id, source } => {
                let cause = Self::from(source).message;
                Self::unusable(format!("task {id} may or may not be with the broker: {cause}"))
                    .help(format!(
                        "submit it again with --id {id}; only the first result of an id counts"
                    ))
            }
            SubmitError::UnknownQueue { ref queue } => {
                Self::from_sentence(&error.to_string()).help(create_queue(queue))
            }
            SubmitError::Invalid(_) | SubmitError::TooLarge { .. } => {
                Self::from_sentence(&error.to_string())
            }
        }
    }
}

impl From<QueryError> for CliError {
    fn from(error: QueryError) -> Self {
        match error {
            QueryError::Broker(error) => error.into(),
            QueryError::NoCollector { .. } => Self::from_sentence(&error.to_string()).help(
                "start `garenne-collector` on this broker and namespace; `garenne doctor` \
                       checks more",
            ),
            QueryError::NotDone { ref batch, .. } => Self::from_sentence(&error.to_string())
                .help(format!("wait longer, or look at it: garenne batch show {batch}"))
                .exit(Exit::NotYet),
            QueryError::UnknownQueue { ref queue } => {
                Self::from_sentence(&error.to_string()).help(create_queue(queue))
            }
            QueryError::Refused(_) | QueryError::Malformed(_) => {
                Self::from_sentence(&error.to_string())
            }
        }
    }
}

impl From<OutputError> for CliError {
    fn from(error: OutputError) -> Self {
        let exit = match error {
            OutputError::NoAnswer { .. } => Exit::NotYet,
            OutputError::Failed { .. } | OutputError::Cancelled { .. } => Exit::Failed,
            OutputError::Decode { .. }
            | OutputError::Conflict { .. }
            | OutputError::Closed { .. } => Exit::Unusable,
        };
        let look = match &error {
            OutputError::NoAnswer { id, .. } => {
                Some(format!("wait longer, or look at it: garenne task show {id}"))
            }
            OutputError::Closed { id } => Some(format!("look at it: garenne task show {id}")),
            OutputError::Failed { .. }
            | OutputError::Cancelled { .. }
            | OutputError::Decode { .. }
            | OutputError::Conflict { .. } => None,
        };
        let error = Self::from_sentence(&error.to_string()).exit(exit);
        Self { help: look.or(error.help), ..error }
    }
}

fn create_queue(queue: &QueueName) -> String {
    format!(
        "start a worker that serves it (garenne-worker --queues {queue}), or create it (garenne \
         topology apply --queue {queue})"
    )
}

fn help_for(error: &BrokerError) -> Option<String> {
    let help = match error {
        BrokerError::Unreachable { .. } => {
            "is RabbitMQ running there? Set another address with --url \
             amqp://user:password@host:5672/vhost or AMQP_URL"
        }
        BrokerError::Tls { fault, .. } => fault.remedy(),
        BrokerError::TlsRequired { .. } => {
            "use an amqps:// URL, or the port for plain connections (5672)"
        }
        BrokerError::ParametersRefused { .. } => "change frame_max or channel_max in the URL",
        BrokerError::Refused { .. } => "the broker's log has the details",
        BrokerError::LimitReached { limit, .. } => limit.remedy(),
        BrokerError::Locked(_) => {
            "close the connection that declared it, or use another --namespace"
        }
        BrokerError::LoginRefused { .. } => "check the user name and password in --url or AMQP_URL",
        BrokerError::NoVhost { .. } => {
            "create it with `rabbitmqctl add_vhost`, grant the user permissions there, or correct \
             the URL's path (/%2f is the default vhost)"
        }
        BrokerError::Forbidden(_) => {
            "grant the permission with `rabbitmqctl set_permissions`, or use another user"
        }
        BrokerError::Conflict { .. } => {
            "`garenne topology plan` shows the difference; delete the object, or use another \
             --namespace"
        }
        BrokerError::Missing(_) => "`garenne topology apply` declares what is missing",
        BrokerError::Blocked(_) => {
            "free memory or disk on the broker; its management UI names the alarm"
        }
        BrokerError::Rejected(_) => {
            "the queue may have reached a maximum length set by a policy; check it in the \
             management UI"
        }
        BrokerError::Unconfirmed(_) => {
            "try again with the same --id, which is safe; --deadline 30s allows more time"
        }
        BrokerError::Lost(_) | BrokerError::Protocol => {
            "try again; `garenne doctor` checks the connection to the broker"
        }
        BrokerError::ConsumerTimeout(_) => {
            "raise consumer_timeout on the broker and broker.consumer_timeout, or set a shorter \
             --timeout for tasks"
        }
        BrokerError::TooLong(_) | BrokerError::Closed => return None,
    };
    Some(help.to_owned())
}
