//! `garenne doctor`: checks the way from here to a finished task in the order in which it can break, and
//! says for each break what to do. Mends nothing.

mod backlogs;
mod collected;
mod processes;

use std::time::{Duration, Instant};

use clap::Args;
use garenne_common::broker::{Admin, BrokerError, Link, Outgoing, Publisher};
use garenne_common::wire::{Message, Properties};
use garenne_common::{QueueName, TaskId};
use serde::Serialize;
use serde_json::json;

use super::context::Context;
use super::error::{CliError, Exit};
use super::globals::Globals;
use super::options;
use super::output::{Format, Output, Paint, line};
use super::task::span;
use super::topology::{Plan, State};

const EXAMPLES: &str = "\
Examples:
  garenne doctor
  garenne doctor --queue cpu --url amqp://me:secret@rabbit.example:5672/jobs
  garenne doctor -o json | jq -r '.checks[] | select(.state == \"bad\") | .advice'

Exit codes: 0 all is well, 1 something is missing, 2 the broker cannot be used.";

/// What the broker tells nobody over AMQP.
const POLICIES: &str =
    "Not checked: policies that limit or expire queues (rabbitmqctl list_policies).";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Arguments {
    /// Also check this queue of tasks; may be given several times [default: those of worker.queues]
    #[arg(long = "queue", short, value_name = "NAME")]
    queues: Vec<QueueName>,
    /// Name batches in which nothing has ended for so long
    #[arg(long, value_name = "TIME", value_parser = options::duration, default_value = "10m")]
    idle: Duration,
}

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    Good,
    /// It works, and deserves a look.
    Odd,
    Bad,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Check {
    #[serde(rename = "check")]
    name: String,
    state: Verdict,
    detail: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
}

impl Check {
    fn new(name: impl Into<String>, state: Verdict, detail: impl Into<String>) -> Self {
        Self { name: name.into(), state, detail: detail.into(), advice: None }
    }

    fn good(check: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::new(check, Verdict::Good, detail)
    }

    fn bad(check: impl Into<String>, error: CliError) -> Self {
        // The advice to run this very command is for the others.
        let advice = error.help.map(|help| match help.split_once("; `garenne doctor`") {
            Some((help, _)) => help.to_owned(),
            None => help,
        });
        Self { advice, ..Self::new(check, Verdict::Bad, error.message) }
    }

    fn advice(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }

    fn as_text(&self, paint: Paint) -> String {
        let mark = match self.state {
            Verdict::Good => paint.green("✓"),
            Verdict::Odd => paint.yellow("!"),
            Verdict::Bad => paint.red("✗"),
        };
        let line = format!("{mark} {:14} {}", self.name, wrapped(&self.detail, 17));
        match &self.advice {
            Some(advice) => {
                let advice = wrapped(advice, 19);
                format!("{line}\n  {:14} {} {advice}", "", paint.cyan("→"))
            }
            None => line,
        }
    }
}

/// Broken between words so that it fits a terminal of 80 columns behind this indent.
fn wrapped(text: &str, indent: usize) -> String {
    let (mut wrapped, mut column) = (String::new(), indent);
    for word in text.split(' ') {
        let width = word.chars().count();
        if column > indent && column + 1 + width > 80 {
            wrapped.push('\n');
            wrapped.extend(std::iter::repeat_n(' ', indent));
            column = indent;
        } else if column > indent {
            wrapped.push(' ');
            column += 1;
        }
        wrapped.push_str(word);
        column += width;
    }
    wrapped
}

/// Checks made so far; in text they appear as they are made.
struct Report {
    output: Output,
    paint: Paint,
    checks: Vec<Check>,
}

impl Report {
    fn add(&mut self, check: Check) -> Result<(), CliError> {
        if self.output.format == Format::Text {
            line(check.as_text(self.paint))?;
        }
        self.checks.push(check);
        Ok(())
    }

    fn finish(self, exit: Option<Exit>) -> Result<Exit, CliError> {
        let count = |state| self.checks.iter().filter(|check| check.state == state).count();
        let (bad, odd) = (count(Verdict::Bad), count(Verdict::Odd));
        let s = if bad == 1 { "" } else { "s" };
        self.output.show(
            &json!({ "checks": self.checks, "problems": bad }),
            // Over AMQP a policy shows only by its effects.
            |paint| match (bad, odd) {
                (0, 0) => format!("\n{}\n{POLICIES}", paint.green("All is well.")),
                (0, _) => {
                    let look = "No problem found; look at what is marked with !";
                    format!("\n{}\n{POLICIES}", paint.yellow(look))
                }
                _ => paint.red(&format!("\n{bad} problem{s} found.")),
            },
        )?;
        let found = if bad == 0 { Exit::Success } else { Exit::Failed };
        Ok(exit.unwrap_or(found))
    }
}

pub(crate) async fn run(globals: &Globals, arguments: &Arguments) -> Result<Exit, CliError> {
    let output = Output { format: globals.output };
    let mut report = Report { output, paint: Paint::for_stdout(), checks: vec![] };
    let context = match Context::new(globals, super::context::FILTER) {
        Ok(context) => context,
        Err(error) => {
            report.add(Check::bad("configuration", error))?;
            return report.finish(Some(Exit::Unusable));
        }
    };
    context.or_interrupt(examine(&context, arguments, report)).await
}

async fn examine(
    context: &Context,
    arguments: &Arguments,
    mut report: Report,
) -> Result<Exit, CliError> {
    let broker = &context.config.broker;
    let urls: Vec<_> = broker.urls.iter().map(ToString::to_string).collect();
    let detail = format!("{}, namespace {}", urls.join(" or "), broker.namespace);
    report.add(Check::good("configuration", detail))?;

    let link = Link::new(broker, "garenne doctor");
    let started = Instant::now();
    if let Err(error) = link.open().await {
        for check in way_to_the_broker(context, error) {
            report.add(check)?;
        }
        return report.finish(Some(Exit::Unusable));
    }
    let took = span(started.elapsed());
    report
        .add(Check::good("broker", format!("answers, login and virtual host are fine ({took})")))?;

    report.add(publishing(context).await)?;

    let admin = Admin::new(link.clone());
    let queues = if arguments.queues.is_empty() {
        context.config.worker.queues.clone()
    } else {
        arguments.queues.clone()
    };
    let topology = topology(context, &admin, &queues).await;
    let complete = topology.state == Verdict::Good;
    report.add(topology)?;
    for queue in &queues {
        report.add(workers(context, &admin, queue).await)?;
    }
    let collected = if complete {
        collected::collected(context, arguments.idle).await
    } else {
        vec![not_asked()]
    };
    for check in collected {
        report.add(check)?;
    }
    for check in backlogs::backlogs(context, &admin).await {
        report.add(check)?;
    }
    if complete {
        for check in processes::processes(context, &link, &admin, &queues).await {
            report.add(check)?;
        }
    }
    link.close().await;
    report.finish(None)
}

/// How far the connection got before it failed.
fn way_to_the_broker(context: &Context, error: BrokerError) -> Vec<Check> {
    let user =
        context.config.broker.urls.first().map(|url| url.user().to_owned()).unwrap_or_default();
    let reached = Check::good("broker", "answers");
    let logged_in = Check::good("login", format!("as {user}"));
    match &error {
        BrokerError::LoginRefused { .. } => vec![reached, Check::bad("login", error.into())],
        BrokerError::NoVhost { .. } => {
            vec![reached, logged_in, Check::bad("virtual host", error.into())]
        }
        BrokerError::Unreachable { .. }
        | BrokerError::Forbidden(_)
        | BrokerError::Conflict { .. }
        | BrokerError::Missing(_)
        | BrokerError::Blocked(_)
        | BrokerError::Rejected(_)
        | BrokerError::Unconfirmed(_)
        | BrokerError::Unreadable
        | BrokerError::TookBack(_)
        | BrokerError::Lost(_)
        | BrokerError::TooLong(_)
        | BrokerError::Closed => vec![Check::bad("broker", error.into())],
    }
}

/// An alarm shows only to who publishes; so this publishes something that no queue takes, and twice: the
/// first message of a connection passes, because it is what makes RabbitMQ block that connection.
async fn publishing(context: &Context) -> Check {
    let broker = &context.config.broker;
    let link = Link::new(broker, "garenne doctor publish");
    let publisher = Publisher::start(link, vec![], broker);
    let message =
        Message { properties: Properties::default(), headers: vec![], body: b"".to_vec().into() };
    let routing_key = format!("{}.doctor.{}", broker.namespace, TaskId::generate());
    let outgoing = || Outgoing {
        exchange: String::new(),
        routing_key: routing_key.clone(),
        message: message.clone(),
    };
    let started = Instant::now();
    let taken = match publisher.publish(outgoing()).await {
        Ok(()) => publisher.publish(outgoing()).await,
        Err(error) => Err(error),
    };
    let check = match taken {
        Ok(()) => {
            let took = span(started.elapsed());
            Check::good("publishing", format!("the broker takes messages ({took})"))
        }
        Err(error) => Check::bad("publishing", error.into()),
    };
    publisher.close(Duration::ZERO).await;
    check
}

async fn topology(context: &Context, admin: &Admin, queues: &[QueueName]) -> Check {
    let wanted = context.config.broker.topology().with_queues(queues);
    let plan = match Plan::make(admin, wanted, false).await {
        Ok(plan) => plan,
        Err(error) => return Check::bad("topology", error.into()),
    };
    if let Some(conflict) = plan.first_conflict() {
        return Check::bad("topology", conflict);
    }
    match (plan.count(&State::Missing), plan.len()) {
        (0, all) => {
            Check::good("topology", format!("all {all} exchanges, queues and bindings exist"))
        }
        (missing, all) => {
            let detail = format!("{missing} of {all} exchanges, queues and bindings are missing");
            Check::new("topology", Verdict::Bad, detail).advice(apply_advice(queues))
        }
    }
}

fn apply_advice(queues: &[QueueName]) -> String {
    let others = queues.iter().filter(|queue| **queue != QueueName::default());
    let flags: String = others.map(|queue| format!(" --queue {queue}")).collect();
    format!("garenne topology apply{flags}")
}

async fn workers(context: &Context, admin: &Admin, queue: &QueueName) -> Check {
    let name = format!("queue {queue}");
    let full = context.config.broker.topology().task_queue(queue);
    let start = format!("start a worker: garenne-worker --queues {queue}");
    match admin.queue_status(&full).await {
        Ok(Some(status)) if status.consumers > 0 => {
            let s = if status.consumers == 1 { "worker serves" } else { "workers serve" };
            Check::good(name, format!("{} {s} it, {} tasks wait", status.consumers, status.ready))
        }
        Ok(Some(status)) => {
            let detail = format!("no worker serves it, {} tasks wait", status.ready);
            Check::new(name, Verdict::Bad, detail).advice(start)
        }
        Ok(None) => Check::new(name, Verdict::Bad, "does not exist").advice(start),
        Err(error) => Check::bad(name, error.into()),
    }
}

/// To ask, one must connect as a producer does, and that would declare what is missing.
fn not_asked() -> Check {
    Check::new("collector", Verdict::Odd, "not asked: the topology is not as it should be")
        .advice("a collector declares what it needs when it starts")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_fits_eighty_columns() {
        let text = Check::good("results", "word ".repeat(40).trim()).as_text(Paint::plain());
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        assert_eq!(text.lines().nth(1).unwrap().find('w'), Some(17));
    }

    #[test]
    fn a_failed_check_says_what_to_do() {
        let check = Check::new("topology", Verdict::Bad, "3 of 82 are missing");
        let queues = ["default", "cpu"].map(|name| QueueName::new(name).unwrap());
        let text = check.advice(apply_advice(&queues)).as_text(Paint::plain());
        assert_eq!(
            text,
            "✗ topology       3 of 82 are missing\n                 → garenne topology apply --queue cpu"
        );
    }
}
