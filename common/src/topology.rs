//! The broker objects of one namespace as data: the only source of their names and arguments.
//!
//! `broker` declares them. The arguments are the same for every RabbitMQ version and not
//! configurable, because the broker refuses a declaration that differs from an existing queue
//! (406). Operators set lengths and timeouts by policies instead. docs/topology.md explains every
//! object.

use std::time::Duration;

use crate::failpoints::Protection;
use crate::names::{Namespace, QueueName};
use crate::wire::{DELAY_MARK, HeaderValue};

/// Delays are multiples of this.
pub const DELAY_UNIT: Duration = Duration::from_millis(100);
/// Number of delay levels, one per binary digit. 2^25 units are 38 days.
pub const DELAY_LEVELS: u32 = 25;
/// The longest possible delay.
pub const MAX_DELAY: Duration = Duration::from_millis(100 * ((1 << DELAY_LEVELS) - 1));
/// A delay is rounded up to this many binary digits: at most 1/16 late, and at most five hops.
const DELAY_DIGITS: u32 = 5;
/// Effectively unlimited: from 4.0 on RabbitMQ dead-letters a message after 20 returns by default.
const DELIVERY_LIMIT: i64 = 1_000_000;

/// The names and declarations of one namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topology {
    ns: Namespace,
}

/// An object to declare.
#[derive(Debug, Clone, PartialEq)]
pub enum Declaration {
    /// An exchange.
    Exchange {
        /// The name of the exchange.
        name: String,
        /// How it routes.
        kind: ExchangeKind,
        /// The exchange that receives messages which match no binding.
        alternate: Option<String>,
    },
    /// A durable quorum queue, or an exclusive queue that is deleted with its connection.
    Queue {
        /// The name of the queue.
        name: String,
        /// Whether the queue belongs to the declaring connection only.
        exclusive: bool,
        /// The `x-` arguments.
        arguments: Vec<(&'static str, HeaderValue)>,
    },
    /// A binding of a queue to an exchange.
    Binding {
        /// The exchange.
        exchange: String,
        /// The queue.
        queue: String,
        /// The routing key or pattern.
        routing_key: String,
        /// The headers that must match, for a headers exchange.
        arguments: Vec<(String, HeaderValue)>,
    },
}

/// How an exchange routes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExchangeKind {
    /// By the exact routing key.
    Direct,
    /// To every bound queue.
    Fanout,
    /// By a pattern over the routing key.
    Topic,
    /// By header values.
    Headers,
}

/// How a message is delayed: it is published to `exchange` with the marks as headers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DelayRoute {
    /// The exchange of the highest level of the delay.
    pub exchange: String,
    /// Names of the headers, one per level in which the message waits. Each is set to `true`.
    pub marks: Vec<String>,
    /// The delay after rounding up.
    pub delay: Duration,
}

impl Topology {
    /// The topology of this namespace.
    pub fn new(ns: Namespace) -> Self {
        Self { ns }
    }

    /// The namespace.
    pub fn namespace(&self) -> &Namespace {
        &self.ns
    }

    /// Direct exchange for tasks; the routing key is the short name of the queue.
    pub fn tasks_exchange(&self) -> String {
        format!("{}.tasks", self.ns)
    }

    /// Full name of the queue of tasks with this short name.
    pub fn task_queue(&self, queue: &QueueName) -> String {
        format!("{}.tasks.{queue}", self.ns)
    }

    /// Exchange and queue for reports of workers and producers to the collector.
    pub fn results(&self) -> String {
        format!("{}.results", self.ns)
    }

    /// Exchange and queue for dead letters.
    pub fn dead(&self) -> String {
        format!("{}.dead", self.ns)
    }

    /// Exchange and queue for tasks whose queue does not exist.
    pub fn unrouted(&self) -> String {
        format!("{}.unrouted", self.ns)
    }

    /// Exchange and queue for dead letters and reports that the broker dead-letters, by a policy
    /// for instance. No process consumes it; an operator inspects it.
    pub fn unreadable(&self) -> String {
        format!("{}.unreadable", self.ns)
    }

    /// Topic exchange for done notices: `task.<id>`, `batch.<id>`.
    pub fn notices_exchange(&self) -> String {
        format!("{}.notices", self.ns)
    }

    /// Fanout exchange for heartbeats of workers and collectors. It may have no bindings.
    pub fn heartbeats(&self) -> String {
        format!("{}.heartbeats", self.ns)
    }

    /// Topic exchange for control messages to all workers. It may have no bindings.
    pub fn control(&self) -> String {
        format!("{}.control", self.ns)
    }

    /// The queue of queries to the collector, published to through the default exchange.
    pub fn queries(&self) -> String {
        format!("{}.queries", self.ns)
    }

    /// A new, unique name for the reply queue of one connection.
    pub fn reply_queue(&self, owner: &str) -> String {
        format!("{}.reply.{owner}.{}", self.ns, uuid::Uuid::now_v7().simple())
    }

    fn delay(&self, level: u32) -> String {
        format!("{}.delay.{level:02}", self.ns)
    }

    /// The exchange below a level: that of the next lower level, or the tasks exchange.
    fn below(&self, level: u32) -> String {
        level.checked_sub(1).map_or_else(|| self.tasks_exchange(), |next| self.delay(next))
    }

    /// How to delay a message by at least `delay`: rounded up to 100 ms and to five binary digits.
    ///
    /// `None` for a delay of zero. A delay of more than [`MAX_DELAY`] is reduced to it; callers
    /// that accept delays from users refuse such a delay before.
    pub fn delay_route(&self, delay: Duration) -> Option<DelayRoute> {
        let units = delay.as_millis().div_ceil(DELAY_UNIT.as_millis());
        let units = u64::try_from(units).unwrap_or(u64::MAX).min((1 << DELAY_LEVELS) - 1);
        let top = units.checked_ilog2()?;
        let units = round_up(units, top.saturating_sub(DELAY_DIGITS - 1));
        let units = units.min((1 << DELAY_LEVELS) - 1);
        let top = units.checked_ilog2()?;
        let levels = (0..=top).rev().filter(|level| units >> level & 1 == 1);
        Some(DelayRoute {
            exchange: self.delay(top),
            marks: levels.map(delay_mark).collect(),
            delay: DELAY_UNIT * u32::try_from(units).unwrap_or(u32::MAX),
        })
    }

    /// What every publishing process declares: all objects except the queues of particular workers.
    pub fn core(&self) -> Vec<Declaration> {
        let mut all = self.task_intake(&QueueName::default());
        all.extend(self.inbox_of_collector(self.results(), ExchangeKind::Direct));
        all.push(exchange(self.notices_exchange(), ExchangeKind::Topic, None));
        all.push(exchange(self.heartbeats(), ExchangeKind::Fanout, None));
        all.push(exchange(self.control(), ExchangeKind::Topic, None));
        all.push(Declaration::Queue {
            name: self.queries(),
            exclusive: false,
            // Queries expire with the deadline of their sender; the limit is for those that do not.
            arguments: quorum(vec![("x-max-length", HeaderValue::Int(10_000))]),
        });
        all.extend((0..DELAY_LEVELS).flat_map(|level| self.delay_level(level)));
        all
    }

    /// What a consumer of a queue of tasks declares: the queue, its exchange, and the objects that
    /// receive unrouted and dead-lettered tasks.
    ///
    /// Much less than [`core`](Self::core), because each object costs a round trip whenever a
    /// worker connects. The worker's publisher declares the rest.
    pub fn task_intake(&self, queue: &QueueName) -> Vec<Declaration> {
        let mut all = Self::last_resort(self.unrouted(), dead_lettering(self.dead())).to_vec();
        all.extend(Self::last_resort(self.unreadable(), vec![]));
        all.push(exchange(self.tasks_exchange(), ExchangeKind::Direct, self.last_stop()));
        all.extend(self.inbox_of_collector(self.dead(), ExchangeKind::Fanout));
        all.extend(self.task_queue_declarations(queue));
        all
    }

    /// [`core`](Self::core) and these queues of tasks, without duplicates.
    pub fn with_queues(&self, queues: &[QueueName]) -> Vec<Declaration> {
        let mut all = self.core();
        for declaration in queues.iter().flat_map(|queue| self.task_queue_declarations(queue)) {
            if !all.contains(&declaration) {
                all.push(declaration);
            }
        }
        all
    }

    /// The objects of [`core`](Self::core) with this name: an exchange, a queue, its bindings.
    pub fn named(&self, name: &str) -> Vec<Declaration> {
        self.core().into_iter().filter(|declaration| declaration.name() == name).collect()
    }

    /// The queue of tasks with this short name, and its binding.
    pub fn task_queue_declarations(&self, queue: &QueueName) -> [Declaration; 2] {
        let name = self.task_queue(queue);
        let arguments = quorum(dead_lettering(self.dead()));
        let routing_key = queue.to_string();
        [
            Declaration::Queue { name: name.clone(), exclusive: false, arguments },
            binding(self.tasks_exchange(), name, routing_key),
        ]
    }

    /// A durable queue that keeps every done notice for `garenne verify`, also during outages, and
    /// its binding. For that command only, since a queue without a consumer fills the broker.
    pub fn notice_keeper(&self) -> [Declaration; 2] {
        let name = format!("{}.verify.notices", self.ns);
        [
            Declaration::Queue { name: name.clone(), exclusive: false, arguments: quorum(vec![]) },
            binding(self.notices_exchange(), name, "#".to_owned()),
        ]
    }

    /// The alternate exchange of exchanges that carry tasks, results or dead letters.
    fn last_stop(&self) -> Option<String> {
        Protection::AlternateExchange.is_enabled().then(|| self.unrouted())
    }

    /// A fanout exchange with a queue. The queue for unrouted tasks dead-letters, so that a message
    /// with a TTL of its own is not deleted there.
    fn last_resort(
        name: String,
        dead_lettering: Vec<(&'static str, HeaderValue)>,
    ) -> [Declaration; 3] {
        [
            exchange(name.clone(), ExchangeKind::Fanout, None),
            Declaration::Queue {
                name: name.clone(),
                exclusive: false,
                arguments: quorum(dead_lettering),
            },
            binding(name.clone(), name, String::new()),
        ]
    }

    fn inbox_of_collector(&self, name: String, kind: ExchangeKind) -> [Declaration; 3] {
        [
            exchange(name.clone(), kind, self.last_stop()),
            Declaration::Queue {
                name: name.clone(),
                exclusive: false,
                arguments: quorum(dead_lettering(self.unreadable())),
            },
            // A direct exchange needs the key; a fanout ignores it.
            binding(name.clone(), name.clone(), name),
        ]
    }

    /// One delay level: a headers exchange that routes messages with its mark to its queue, and
    /// others to the level below, its alternate exchange.
    fn delay_level(&self, level: u32) -> [Declaration; 3] {
        let name = self.delay(level);
        let ttl = i64::try_from(DELAY_UNIT.as_millis()).unwrap_or(i64::MAX) << level;
        let mut arguments = dead_lettering(self.below(level));
        arguments.push(("x-message-ttl", HeaderValue::Int(ttl)));
        [
            exchange(name.clone(), ExchangeKind::Headers, Some(self.below(level))),
            Declaration::Queue {
                name: name.clone(),
                exclusive: false,
                arguments: quorum(arguments),
            },
            Declaration::Binding {
                exchange: name.clone(),
                queue: name,
                routing_key: String::new(),
                arguments: vec![
                    ("x-match".to_owned(), HeaderValue::Text("all".to_owned())),
                    (delay_mark(level), HeaderValue::Bool(true)),
                ],
            },
        ]
    }
}

impl Declaration {
    /// A queue that belongs to the declaring connection and is deleted with it.
    pub fn exclusive_queue(name: String) -> Self {
        Self::Queue { name, exclusive: true, arguments: vec![] }
    }

    /// The name of the object; for a binding, that of its queue.
    pub fn name(&self) -> &str {
        match self {
            Self::Exchange { name, .. } | Self::Queue { name, .. } => name,
            Self::Binding { queue, .. } => queue,
        }
    }
}

fn delay_mark(level: u32) -> String {
    format!("{DELAY_MARK}{level:02}")
}

fn round_up(units: u64, zero_digits: u32) -> u64 {
    units.div_ceil(1 << zero_digits) << zero_digits
}

fn exchange(name: String, kind: ExchangeKind, alternate: Option<String>) -> Declaration {
    Declaration::Exchange { name, kind, alternate }
}

fn binding(exchange: String, queue: String, routing_key: String) -> Declaration {
    Declaration::Binding { exchange, queue, routing_key, arguments: vec![] }
}

fn quorum(mut more: Vec<(&'static str, HeaderValue)>) -> Vec<(&'static str, HeaderValue)> {
    more.push(("x-queue-type", HeaderValue::Text("quorum".to_owned())));
    more.push(("x-delivery-limit", HeaderValue::Int(DELIVERY_LIMIT)));
    more
}

/// Arguments for dead-lettering that waits for the confirm of the target queue. The default
/// strategy loses confirmed messages when the broker is killed. RabbitMQ falls back to it unless
/// the queue has the overflow behaviour `reject-publish`.
fn dead_lettering(target: String) -> Vec<(&'static str, HeaderValue)> {
    if !Protection::AtLeastOnceDeadLettering.is_enabled() {
        return vec![("x-dead-letter-exchange", HeaderValue::Text(target))];
    }
    vec![
        ("x-dead-letter-exchange", HeaderValue::Text(target)),
        ("x-dead-letter-strategy", HeaderValue::Text("at-least-once".to_owned())),
        ("x-overflow", HeaderValue::Text("reject-publish".to_owned())),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    fn topology() -> Topology {
        Topology::new(Namespace::new("g").unwrap())
    }

    #[test]
    fn every_referenced_exchange_is_declared() {
        targets_are_declared(&topology().core());
        targets_are_declared(&topology().task_intake(&QueueName::new("cpu").unwrap()));
    }

    fn targets_are_declared(all: &[Declaration]) {
        let exchanges: HashSet<&str> = all
            .iter()
            .filter(|d| matches!(d, Declaration::Exchange { .. }))
            .map(Declaration::name)
            .collect();
        for declaration in all {
            match declaration {
                Declaration::Exchange { alternate, .. } => {
                    assert!(alternate.as_deref().is_none_or(|name| exchanges.contains(name)));
                }
                Declaration::Queue { arguments, .. } => {
                    for (key, value) in arguments {
                        if *key == "x-dead-letter-exchange" {
                            let HeaderValue::Text(target) = value else { panic!("{value:?}") };
                            assert!(exchanges.contains(target.as_str()), "{target}");
                        }
                    }
                }
                Declaration::Binding { exchange, .. } => {
                    assert!(exchanges.contains(exchange.as_str()));
                }
            }
        }
    }

    #[test]
    fn queues_that_dead_letter_do_so_at_least_once() {
        for declaration in topology().core() {
            let Declaration::Queue { name, arguments, .. } = declaration else { continue };
            let has = |key: &str| arguments.iter().any(|(k, _)| *k == key);
            assert_eq!(has("x-dead-letter-exchange"), has("x-dead-letter-strategy"), "{name}");
            assert_eq!(has("x-dead-letter-exchange"), has("x-overflow"), "{name}");
            assert!(has("x-delivery-limit"), "{name}");
        }
    }

    #[test]
    fn a_delay_starts_at_its_highest_level() {
        let route = topology().delay_route(Duration::from_millis(550)).unwrap();
        assert_eq!(route.exchange, "g.delay.02");
        assert_eq!(route.marks, ["garenne-delay-02", "garenne-delay-01"]);
        assert_eq!(route.delay, Duration::from_millis(600));
        assert_eq!(topology().delay_route(Duration::ZERO), None);
    }

    proptest! {
        #[test]
        fn a_delay_is_never_too_short_and_at_most_a_sixteenth_too_long(
            millis in 1..=2_592_000_000_u64,
        ) {
            let delay = Duration::from_millis(millis);
            let route = topology().delay_route(delay).unwrap();
            prop_assert!(route.delay >= delay);
            prop_assert!(route.delay <= delay + delay / 16 + DELAY_UNIT);
            prop_assert!(route.marks.len() <= 5);
            let mut seen = HashSet::new();
            prop_assert!(route.marks.iter().all(|mark| seen.insert(mark)), "a level twice");
        }
    }
}
