//! `garenne topology`: compares Garenne's exchanges, queues and bindings with the broker, and
//! declares what is missing.
//!
//! Names and arguments come from `garenne_common::topology`, the comparison from [`plan`]; this
//! file is the command and its output. Nothing is deleted or changed.

mod plan;

use clap::{Args, Subcommand};
use comfy_table::Color;
use garenne_common::QueueName;
use garenne_common::broker::{Admin, Link};
use garenne_common::topology::{Declaration, ExchangeKind, Topology};
use garenne_common::wire::HeaderValue;
use serde_json::{Map, Value, json};

use crate::context::Context;
use crate::difference::Difference;
use crate::error::{CliError, Exit};
use crate::output::{Paint, cell, keep_whole, rendered, table};
pub(super) use plan::{ObjectState, Plan};

const EXAMPLES: &str = "\
Examples:
  garenne topology plan                 what exists, what is missing or differs
  garenne topology apply --queue cpu    declare everything, and the queue `cpu`
  garenne topology plan -o json | jq '.objects[] | select(.state != \"exists\")'

`plan` exits with 1 if something is missing, with 2 if something differs.
`apply` declares what is missing and changes nothing that exists; it exits with
2 if something differs.";

/// Arguments that all queues have, and what is deliberately left open.
const FOOTNOTE: &str = "\
Every queue: x-queue-type=quorum x-delivery-limit=1000000
Dead letters: x-dead-letter-strategy=at-least-once x-overflow=reject-publish
The lowest delay level leads to the tasks. Other arguments are a conflict.
Left to policies: consumer-timeout; never set lengths or TTLs";

#[derive(Debug, Subcommand)]
#[command(after_help = EXAMPLES)]
pub(crate) enum TopologyCommand {
    /// Show what would be declared and what exists
    #[command(after_help = EXAMPLES)]
    Plan(TopologyArgs),
    /// Declare what is missing
    #[command(after_help = EXAMPLES)]
    Apply(TopologyArgs),
}

#[derive(Debug, Args)]
pub(crate) struct TopologyArgs {
    /// Also this task queue, besides `default`; may be repeated
    #[arg(long = "queue", short, value_name = "NAME")]
    queues: Vec<QueueName>,
}

pub(crate) async fn run(context: &Context, command: TopologyCommand) -> Result<Exit, CliError> {
    let (arguments, apply) = match &command {
        TopologyCommand::Plan(arguments) => (arguments, false),
        TopologyCommand::Apply(arguments) => (arguments, true),
    };
    context.or_interrupt(compare(context, arguments, apply)).await
}

async fn compare(
    context: &Context,
    arguments: &TopologyArgs,
    apply: bool,
) -> Result<Exit, CliError> {
    let link = Link::new(&context.config.broker, "garenne topology");
    link.open().await?;
    let topology = context.config.broker.topology();
    let wanted = topology.with_queues(&arguments.queues);
    let plan = Plan::make(&Admin::new(link.clone()), wanted, apply).await;
    link.close().await;
    let plan = plan?;
    context.output.show(&as_json(&plan, &topology), |paint| as_text(&plan, &topology, paint))?;
    match plan.first_conflict() {
        Some(conflict) => Err(conflict),
        None if plan.count(&ObjectState::Missing) > 0 => Ok(Exit::Failed),
        None => Ok(Exit::Success),
    }
}

fn as_json(plan: &Plan, topology: &Topology) -> Value {
    let objects: Vec<_> = plan.0.iter().map(|(object, state)| object_json(object, state)).collect();
    json!({ "namespace": topology.namespace(), "objects": objects })
}

/// Two tables. Bindings follow from the names and are listed in JSON only.
fn as_text(plan: &Plan, topology: &Topology, paint: Paint) -> String {
    let mut exchanges = table(["EXCHANGE", "KIND", "UNROUTABLE TO", "STATE"], paint);
    let mut queues = table(["QUEUE", "DEAD LETTERS TO", "ARGUMENTS", "STATE"], paint);
    keep_whole(&mut exchanges, 3);
    keep_whole(&mut queues, 3);
    for (declaration, state) in rows(&plan.0, topology) {
        let (word, colour) = state_word(state);
        let row = |cells: [String; 3]| {
            cells.map(|text| cell(text, None, paint)).into_iter().chain([cell(
                word,
                Some(colour),
                paint,
            )])
        };
        match declaration {
            Declaration::Exchange { name, kind, alternate } => {
                let to = alternate.unwrap_or_else(|| "nowhere".to_owned());
                exchanges.add_row(row([name, kind_word(kind).to_owned(), to]));
            }
            Declaration::Queue { name, arguments, .. } => {
                let to = arguments.iter().find(|(key, _)| *key == "x-dead-letter-exchange");
                let to = to.map_or_else(String::new, |(_, name)| plain(name));
                queues.add_row(row([name, to, own_arguments(&arguments)]));
            }
            Declaration::Binding { .. } => {}
        }
    }
    format!("{}\n\n{}\n\n{FOOTNOTE}\n\n{}", rendered(&exchanges), rendered(&queues), totals(plan))
}

/// The rows to print. Consecutive delay levels in the same state are one row, whose name contains
/// the first and the last level.
fn rows<'a>(
    objects: &'a [(Declaration, ObjectState)],
    topology: &Topology,
) -> Vec<(Declaration, &'a ObjectState)> {
    let prefix = format!("{}.delay.", topology.namespace());
    let mut rows: Vec<(Declaration, &ObjectState)> = vec![];
    let shown = |queues: bool, object: &Declaration| match object {
        Declaration::Exchange { .. } => !queues,
        Declaration::Queue { .. } => queues,
        Declaration::Binding { .. } => false,
    };
    for queues in [false, true] {
        // The first level of the run that the last row represents.
        let mut run: Option<&str> = None;
        for (object, state) in objects.iter().filter(|(object, _)| shown(queues, object)) {
            let level = object.name().strip_prefix(&prefix);
            match (run, level, rows.last_mut()) {
                (Some(first), Some(last), Some((row, same))) if *same == state => {
                    rename_to_range(row, &format!("{prefix}{first} to {last}"));
                }
                _ => {
                    run = level;
                    rows.push((object.clone(), state));
                }
            }
        }
    }
    rows
}

/// Renames a row that represents several delay levels, and replaces the arguments that differ
/// between them by a description.
fn rename_to_range(declaration: &mut Declaration, to: &str) {
    let below = "the level below";
    match declaration {
        Declaration::Exchange { name, alternate, .. } => {
            to.clone_into(name);
            *alternate = Some(below.to_owned());
        }
        Declaration::Queue { name, arguments, .. } => {
            to.clone_into(name);
            for (key, value) in arguments {
                match *key {
                    "x-dead-letter-exchange" => *value = HeaderValue::Text(below.to_owned()),
                    "x-message-ttl" => {
                        *value = HeaderValue::Text("100, doubled per level".to_owned());
                    }
                    _ => {}
                }
            }
        }
        Declaration::Binding { .. } => {}
    }
}

fn totals(plan: &Plan) -> String {
    let conflicts =
        plan.0.iter().filter(|(_, state)| matches!(state, ObjectState::Conflict(_))).count();
    let counts = [
        (plan.count(&ObjectState::Exists), "exist"),
        (plan.count(&ObjectState::Created), "created"),
        (plan.count(&ObjectState::Missing), "missing"),
        (conflicts, "in conflict"),
    ];
    let parts = counts.iter().filter(|(count, _)| *count > 0);
    let parts: Vec<_> = parts.map(|(count, what)| format!("{count} {what}")).collect();
    format!("{} exchanges, queues and bindings: {}", plan.len(), parts.join(", "))
}

fn state_word(state: &ObjectState) -> (String, Color) {
    match state {
        ObjectState::Exists => ("exists".to_owned(), Color::Green),
        ObjectState::Created => ("created".to_owned(), Color::Green),
        ObjectState::Missing => ("missing".to_owned(), Color::Yellow),
        ObjectState::Conflict(Difference { argument: Some(argument), .. }) => {
            (format!("conflict: {argument}"), Color::Red)
        }
        ObjectState::Conflict(Difference { argument: None, .. }) => {
            ("conflict".to_owned(), Color::Red)
        }
    }
}

const fn kind_word(kind: ExchangeKind) -> &'static str {
    match kind {
        ExchangeKind::Direct => "direct",
        ExchangeKind::Fanout => "fanout",
        ExchangeKind::Topic => "topic",
        ExchangeKind::Headers => "headers",
    }
}

fn object_json(declaration: &Declaration, state: &ObjectState) -> Value {
    let mut object = match declaration {
        Declaration::Exchange { name, kind, alternate } => json!({
            "object": "exchange", "name": name, "kind": kind_word(*kind), "durable": true,
            "alternate": alternate,
        }),
        Declaration::Queue { name, exclusive, arguments } => json!({
            "object": "queue", "name": name, "durable": !exclusive,
            "arguments": arguments_json(arguments.iter().map(|(key, value)| (*key, value))),
        }),
        Declaration::Binding { exchange, queue, routing_key, arguments } => json!({
            "object": "binding", "exchange": exchange, "queue": queue, "routing_key": routing_key,
            "arguments": arguments_json(arguments.iter().map(|(key, value)| (key.as_str(), value))),
        }),
    };
    let (word, difference) = match state {
        ObjectState::Exists => ("exists", None),
        ObjectState::Created => ("created", None),
        ObjectState::Missing => ("missing", None),
        ObjectState::Conflict(difference) => ("conflict", Some(difference)),
    };
    object["state"] = json!(word);
    if let Some(difference) = difference {
        object["difference"] = json!(difference);
    }
    object
}

fn arguments_json<'a>(arguments: impl Iterator<Item = (&'a str, &'a HeaderValue)>) -> Value {
    let pairs = arguments.map(|(key, value)| (key.to_owned(), value_json(value)));
    Value::Object(pairs.collect::<Map<_, _>>())
}

fn value_json(value: &HeaderValue) -> Value {
    match value {
        HeaderValue::Text(text) => json!(text),
        HeaderValue::Int(number) => json!(number),
        HeaderValue::Float(number) => json!(number),
        HeaderValue::Bool(truth) => json!(truth),
        HeaderValue::Foreign(_) => json!(value.to_string()),
    }
}

/// The arguments that are not listed in the footnote.
fn own_arguments(arguments: &[(&'static str, HeaderValue)]) -> String {
    let own = arguments.iter().filter(|(key, _)| ["x-message-ttl", "x-max-length"].contains(key));
    own.map(|(key, value)| format!("{key}={}", plain(value))).collect::<Vec<_>>().join(" ")
}

fn plain(value: &HeaderValue) -> String {
    match value {
        HeaderValue::Text(text) => text.clone(),
        HeaderValue::Int(_)
        | HeaderValue::Float(_)
        | HeaderValue::Bool(_)
        | HeaderValue::Foreign(_) => value_json(value).to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use garenne_common::Namespace;

    fn topology() -> Topology {
        Topology::new(Namespace::new("g").unwrap())
    }

    fn plan() -> Plan {
        Plan(topology().core().into_iter().map(|d| (d, ObjectState::Missing)).collect())
    }

    #[test]
    fn consecutive_delay_levels_in_the_same_state_are_one_row() {
        let mut plan = plan();
        let text = as_text(&plan, &topology(), Paint::plain());
        assert_eq!(text.matches("g.delay.00 to 24").count(), 2, "{text}");
        let seventh = |(d, _): &&mut (Declaration, ObjectState)| {
            d.name() == "g.delay.07" && matches!(d, Declaration::Queue { .. })
        };
        plan.0.iter_mut().find(seventh).unwrap().1 = ObjectState::Exists;
        let text = as_text(&plan, &topology(), Paint::plain());
        for row in ["g.delay.00 to 24", "g.delay.00 to 06", "g.delay.07 ", "g.delay.08 to 24"] {
            assert_eq!(text.matches(row).count(), 1, "{row}: {text}");
        }
    }

    #[test]
    fn the_footnote_and_the_table_cover_every_argument() {
        for declaration in topology().core() {
            let Declaration::Queue { name, arguments, .. } = declaration else { continue };
            for (key, value) in arguments {
                let noted = FOOTNOTE.contains(&format!("{key}={}", plain(&value)));
                let own =
                    ["x-message-ttl", "x-max-length", "x-dead-letter-exchange"].contains(&key);
                assert!(noted || own, "{name}: {key}");
            }
        }
    }

    #[test]
    fn json_also_lists_bindings_and_arguments() {
        let json = as_json(&plan(), &topology());
        let objects = json["objects"].as_array().unwrap();
        assert!(objects.iter().any(|o| o["object"] == "binding" && o["routing_key"] == "default"));
        let default = |o: &&Value| o["name"] == "g.tasks.default" && o["object"] == "queue";
        let queue = objects.iter().find(default).unwrap();
        assert_eq!(queue["arguments"]["x-overflow"], "reject-publish");
    }
}
