//! `garenne doctor`: checks the way from here to a finished task, in the order in which it can
//! break, and says for each problem what to do.
//!
//! The configuration comes in; checks go to standard output. Nothing is repaired or declared.

mod backlogs;
mod check;
mod collected;
mod processes;

use std::time::{Duration, Instant};

use clap::Args;
use garenne_common::broker::{Admin, BrokerError, Link, Outgoing, Publisher};
use garenne_common::config::BrokerUrl;
use garenne_common::wire::{Message, Properties};
use garenne_common::{QueueName, TaskId};
use serde_json::json;

use crate::command::topology::{ObjectState, Plan};
use crate::context::Context;
use crate::error::{CliError, Exit};
use crate::globals::Globals;
use crate::options;
use crate::output::{Format, Output, Paint, line};
use crate::times::span;
use check::{Check, Verdict};

const EXAMPLES: &str = "\
Examples:
  garenne doctor
  garenne doctor --queue cpu --url amqp://me:secret@rabbit.example:5672/jobs
  garenne doctor -o json | jq -r '.checks[] | select(.state == \"bad\") | .advice'

Marks: ✓ fine, ! works but should be looked at, ✗ a problem.

Exit codes: 0 no problem, 1 a problem was found, 2 the broker cannot be used.";

/// What cannot be checked over AMQP: a policy shows only by its effects.
const POLICIES: &str =
    "Not checked: policies that limit or expire queues (rabbitmqctl list_policies).";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct DoctorArgs {
    /// Check this task queue; may be repeated [default: those of worker.queues]
    #[arg(long = "queue", short, value_name = "NAME")]
    queues: Vec<QueueName>,
    /// Report batches in which nothing has ended for this long
    #[arg(long, value_name = "TIME", value_parser = options::duration, default_value = "10m")]
    idle: Duration,
}

/// The checks so far; in text format each is printed as soon as it is made.
struct DoctorReport {
    output: Output,
    paint: Paint,
    checks: Vec<Check>,
}

impl DoctorReport {
    fn add(&mut self, check: Check) -> Result<(), CliError> {
        if self.output.format == Format::Text {
            line(check.as_text(self.paint))?;
        }
        self.checks.push(check);
        Ok(())
    }

    fn add_all(&mut self, checks: Vec<Check>) -> Result<(), CliError> {
        checks.into_iter().try_for_each(|check| self.add(check))
    }

    fn finish(self, exit: Option<Exit>) -> Result<Exit, CliError> {
        let count = |state| self.checks.iter().filter(|check| check.state == state).count();
        let (bad, odd) = (count(Verdict::Bad), count(Verdict::Odd));
        let s = if bad == 1 { "" } else { "s" };
        self.output.show(&json!({ "checks": self.checks, "problems": bad }), |paint| {
            match (bad, odd) {
                (0, 0) => format!("\n{}\n{POLICIES}", paint.green("All is well.")),
                (0, _) => {
                    let look = "No problem found; look at the checks marked with !";
                    format!("\n{}\n{POLICIES}", paint.yellow(look))
                }
                _ => paint.red(&format!("\n{bad} problem{s} found.")),
            }
        })?;
        let found = if bad == 0 { Exit::Success } else { Exit::Failed };
        Ok(exit.unwrap_or(found))
    }
}

pub(crate) async fn run(globals: &Globals, arguments: &DoctorArgs) -> Result<Exit, CliError> {
    let output = Output { format: globals.output };
    let mut report = DoctorReport { output, paint: Paint::for_stdout(), checks: vec![] };
    let context = match Context::new(globals, crate::context::FILTER) {
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
    arguments: &DoctorArgs,
    mut report: DoctorReport,
) -> Result<Exit, CliError> {
    let broker = &context.config.broker;
    let urls: Vec<_> = broker.urls.iter().map(ToString::to_string).collect();
    let detail = format!("{}, namespace {}", urls.join(" or "), broker.namespace);
    report.add(Check::good("configuration", detail))?;

    let link = Link::new(broker, "garenne doctor");
    let started = Instant::now();
    if let Err(error) = link.open().await {
        report.add_all(connection_checks(context, error))?;
        return report.finish(Some(Exit::Unusable));
    }
    let took = span(started.elapsed());
    report
        .add(Check::good("broker", format!("answers, login and virtual host are fine ({took})")))?;

    report.add(publishing(context).await)?;
    let checked = examine_queues(context, arguments, &link, &mut report).await;
    link.close().await;
    checked?;
    report.finish(None)
}

/// The checks over a connection that works.
async fn examine_queues(
    context: &Context,
    arguments: &DoctorArgs,
    link: &Link,
    report: &mut DoctorReport,
) -> Result<(), CliError> {
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
    if complete {
        report.add_all(collected::collected(context, arguments.idle).await)?;
    } else {
        report.add(collector_skipped())?;
    }
    report.add_all(backlogs::backlogs(context, &admin).await)?;
    if complete {
        report.add_all(processes::processes(context, link, &admin, &queues).await)?;
    }
    Ok(())
}

/// The checks that succeeded before the connection failed, and the one that failed.
fn connection_checks(context: &Context, error: BrokerError) -> Vec<Check> {
    let user = context.config.broker.urls.first().map(BrokerUrl::user).unwrap_or_default();
    let reached = Check::good("broker", "answers");
    let logged_in = Check::good("login", format!("as {user}"));
    match &error {
        BrokerError::LoginRefused { .. } => vec![reached, Check::bad("login", error.into())],
        BrokerError::NoVhost { .. } => {
            vec![reached, logged_in, Check::bad("virtual host", error.into())]
        }
        BrokerError::Unreachable { .. }
        | BrokerError::Tls { .. }
        | BrokerError::TlsRequired { .. }
        | BrokerError::ParametersRefused { .. }
        | BrokerError::Refused { .. }
        | BrokerError::LimitReached { .. }
        | BrokerError::Forbidden(_)
        | BrokerError::Conflict { .. }
        | BrokerError::Locked(_)
        | BrokerError::Missing(_)
        | BrokerError::Blocked(_)
        | BrokerError::Rejected(_)
        | BrokerError::Unconfirmed(_)
        | BrokerError::Protocol
        | BrokerError::ConsumerTimeout(_)
        | BrokerError::Lost(_)
        | BrokerError::TooLong(_)
        | BrokerError::Closed => vec![Check::bad("broker", error.into())],
    }
}

/// Whether the broker takes messages. An alarm only affects connections that publish, so this
/// publishes a message that no queue takes, and does so twice: the first message of a connection
/// passes, because it is what makes RabbitMQ block that connection.
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
    match (plan.count(&ObjectState::Missing), plan.len()) {
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

/// Querying the collector needs a producer, and that would declare what is missing.
fn collector_skipped() -> Check {
    Check::new("collector", Verdict::Odd, "not checked, because the topology is incomplete")
        .advice("a collector declares what it needs when it starts")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_check_is_printed_with_its_advice() {
        let check = Check::new("topology", Verdict::Bad, "3 of 82 are missing");
        let queues = ["default", "cpu"].map(|name| QueueName::new(name).unwrap());
        let text = check.advice(apply_advice(&queues)).as_text(Paint::plain());
        assert_eq!(
            text,
            "✗ topology       3 of 82 are missing\n                 → garenne topology apply \
             --queue cpu"
        );
    }
}
