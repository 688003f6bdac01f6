//! The objects of the model broker, taken from `Topology`, and how a message finds its queues.

use std::collections::HashMap;

use garenne_common::QueueName;
use garenne_common::topology::{Declaration, ExchangeKind, Topology};
use garenne_common::wire::{HeaderValue, Message};

/// Exchanges, bindings and the arguments of queues; the same for all schedules.
pub(super) struct Layout {
    exchanges: HashMap<String, Exchange>,
    pub(super) queues: Vec<QueueSpec>,
    by_name: HashMap<String, usize>,
}

struct Exchange {
    kind: ExchangeKind,
    alternate: Option<String>,
    bindings: Vec<Binding>,
}

#[derive(PartialEq)]
struct Binding {
    queue: usize,
    routing_key: String,
    arguments: Vec<(String, HeaderValue)>,
}

pub(super) struct QueueSpec {
    pub(super) name: String,
    pub(super) ttl: Option<u64>,
    pub(super) dead_letters_to: Option<String>,
}

impl Layout {
    pub(super) fn new(declarations: &[Declaration]) -> Self {
        let mut layout =
            Self { exchanges: HashMap::new(), queues: vec![], by_name: HashMap::new() };
        for declaration in declarations {
            layout.declare(declaration);
        }
        layout
    }

    fn declare(&mut self, declaration: &Declaration) {
        match declaration {
            Declaration::Exchange { name, kind, alternate } => {
                let alternate = alternate.clone();
                let exchange = Exchange { kind: *kind, alternate, bindings: vec![] };
                self.exchanges.insert(name.clone(), exchange);
            }
            Declaration::Queue { name, arguments, .. } => {
                if self.by_name.contains_key(name) {
                    return;
                }
                let argument = |key| arguments.iter().find(|(k, _)| *k == key).map(|(_, v)| v);
                let ttl = match argument("x-message-ttl") {
                    Some(HeaderValue::Int(ttl)) => u64::try_from(*ttl).ok(),
                    _ => None,
                };
                let dead_letters_to = match argument("x-dead-letter-exchange") {
                    Some(HeaderValue::Text(exchange)) => Some(exchange.clone()),
                    _ => None,
                };
                self.by_name.insert(name.clone(), self.queues.len());
                self.queues.push(QueueSpec { name: name.clone(), ttl, dead_letters_to });
            }
            Declaration::Binding { exchange, queue, routing_key, arguments } => {
                let (queue, routing_key) = (self.by_name[queue], routing_key.clone());
                let binding = Binding { queue, routing_key, arguments: arguments.clone() };
                let bindings = &mut self.exchanges.get_mut(exchange).unwrap().bindings;
                if !bindings.contains(&binding) {
                    bindings.push(binding);
                }
            }
        }
    }

    pub(super) fn without_alternate(mut self, exchange: &str) -> Self {
        self.exchanges.get_mut(exchange).unwrap().alternate = None;
        self
    }

    pub(super) fn queue(&self, name: &str) -> usize {
        self.by_name[name]
    }

    /// Every queue that a message reaches.
    pub(super) fn route(&self, exchange: &str, key: &str, message: &Message) -> Vec<usize> {
        let mut name = exchange;
        if name.is_empty() {
            return self.by_name.get(key).copied().into_iter().collect();
        }
        loop {
            let exchange = &self.exchanges[name];
            let matches = |binding: &&Binding| match exchange.kind {
                ExchangeKind::Direct => binding.routing_key == key,
                // The one topic binding here is `#`.
                ExchangeKind::Fanout | ExchangeKind::Topic => true,
                ExchangeKind::Headers => {
                    let mut wanted = binding.arguments.iter().filter(|(key, _)| key != "x-match");
                    wanted.all(|(key, value)| message.header(key) == Some(value))
                }
            };
            let reached = exchange.bindings.iter().filter(matches).map(|binding| binding.queue);
            let reached: Vec<_> = reached.collect();
            match &exchange.alternate {
                Some(alternate) if reached.is_empty() => name = alternate,
                _ => return reached,
            }
        }
    }
}

/// The objects of the namespace, with a second queue of tasks and one that listens to all notices.
pub(super) fn declarations(topology: &Topology) -> Vec<Declaration> {
    let mut all = topology.core();
    let cpu = QueueName::new("cpu").unwrap();
    all.extend(topology.task_queue_declarations(&cpu));
    all.push(Declaration::Queue {
        name: "listener".to_owned(),
        exclusive: false,
        arguments: vec![],
    });
    all.push(Declaration::Binding {
        exchange: topology.notices_exchange(),
        queue: "listener".to_owned(),
        routing_key: "#".to_owned(),
        arguments: vec![],
    });
    all
}
