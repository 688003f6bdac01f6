//! The broker objects of one namespace, as data: every name and every argument comes from here.
//!
//! Declaring them is `broker`'s business. The arguments are the same on every RabbitMQ version and
//! not configurable, because any difference is a 406 on a broker that already has the queue; what an
//! operator may tune (lengths, timeouts) stays free for policies. docs/topology.md explains each.

use std::time::Duration;

use crate::failpoints::Protection;
use crate::names::{Namespace, QueueName};
use crate::wire::{DELAY_MARK, HeaderValue};

/// The step in which the broker counts delays.
pub const DELAY_UNIT: Duration = Duration::from_millis(100);
/// One delay level per binary digit; 2^25 units are 38 days.
pub const DELAY_LEVELS: u32 = 25;
/// The longest delay that the levels can hold.
pub const MAX_DELAY: Duration = Duration::from_millis(100 * ((1 << DELAY_LEVELS) - 1));
/// A delay is rounded up to so many binary digits: at most 1/16 late, at most five hops.
const DELAY_DIGITS: u32 = 5;
/// A safety net only: from 4.0 on RabbitMQ drops a message after 20 returns unless told otherwise.
const DELIVERY_LIMIT: i64 = 1_000_000;

/// Names and declarations of one namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topology {
    ns: Namespace,
}

/// One object to declare.
#[derive(Debug, Clone, PartialEq)]
pub enum Declaration {
    /// An exchange.
    Exchange {
        /// Its name.
        name: String,
        /// How it routes.
        kind: ExchangeKind,
        /// Where it sends what it cannot route.
        alternate: Option<String>,
    },
    /// A durable quorum queue, or an exclusive queue that dies with its connection.
    Queue {
        /// Its name.
        name: String,
        /// `true` for a queue that belongs to the declaring connection alone.
        exclusive: bool,
        /// The `x-` arguments.
        arguments: Vec<(&'static str, HeaderValue)>,
    },
    /// A binding of a queue to an exchange.
    Binding {
        /// From where.
        exchange: String,
        /// To where.
        queue: String,
        /// With which key.
        routing_key: String,
        /// For a headers exchange: what must match.
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

/// How a message gets its delay: publish to `exchange` with these marks as headers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DelayRoute {
    /// The exchange of the highest level that the delay needs.
    pub exchange: String,
    /// One header per level that the message waits in; each is set to `true`.
    pub marks: Vec<String>,
    /// What the delay became by rounding up.
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

    /// Direct exchange; the routing key is the queue's short name.
    pub fn tasks_exchange(&self) -> String {
        format!("{}.tasks", self.ns)
    }

    /// The quorum queue behind a short name.
    pub fn task_queue(&self, queue: &QueueName) -> String {
        format!("{}.tasks.{queue}", self.ns)
    }

    /// Exchange and queue for what workers and producers tell the collector.
    pub fn results(&self) -> String {
        format!("{}.results", self.ns)
    }

    /// Exchange and queue for tasks that were given up.
    pub fn dead(&self) -> String {
        format!("{}.dead", self.ns)
    }

    /// Exchange and queue for what no queue wanted.
    pub fn unrouted(&self) -> String {
        format!("{}.unrouted", self.ns)
    }

    /// Exchange and queue for dead letters and reports that the broker itself gave up.
    ///
    /// Nobody consumes it; a person looks at it.
    pub fn unreadable(&self) -> String {
        format!("{}.unreadable", self.ns)
    }

    /// Topic exchange for done notices: `task.<id>`, `batch.<id>`.
    pub fn notices_exchange(&self) -> String {
        format!("{}.notices", self.ns)
    }

    /// Fanout exchange for what workers say of themselves. Nobody may be listening.
    pub fn heartbeats(&self) -> String {
        format!("{}.heartbeats", self.ns)
    }

    /// Topic exchange for what all workers must hear. Nobody may be listening.
    pub fn control(&self) -> String {
        format!("{}.control", self.ns)
    }

    /// The queue of questions to the collector, reached through the default exchange.
    pub fn queries(&self) -> String {
        format!("{}.queries", self.ns)
    }

    /// A fresh name for the reply queue of one connection epoch.
    pub fn reply_queue(&self, owner: &str) -> String {
        format!("{}.reply.{owner}.{}", self.ns, uuid::Uuid::now_v7().simple())
    }

    fn delay(&self, level: u32) -> String {
        format!("{}.delay.{level:02}", self.ns)
    }

    /// Where a level hands on: the next lower level, and behind the last one the tasks exchange.
    fn below(&self, level: u32) -> String {
        level.checked_sub(1).map_or_else(|| self.tasks_exchange(), |next| self.delay(next))
    }

    /// How to delay a message by at least `delay`: rounded up to 100 ms and to five binary digits.
    ///
    /// `None` for no delay at all. More than [`MAX_DELAY`] is cut to it; callers who take delays from
    /// users refuse such a delay first.
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

    /// What every process that publishes declares: all but the queues that particular workers serve.
    pub fn core(&self) -> Vec<Declaration> {
        let mut all = self.task_intake(&QueueName::default());
        all.extend(self.inbox_of_collector(self.results(), ExchangeKind::Direct));
        all.push(exchange(self.notices_exchange(), ExchangeKind::Topic, None));
        all.push(exchange(self.heartbeats(), ExchangeKind::Fanout, None));
        all.push(exchange(self.control(), ExchangeKind::Topic, None));
        all.push(Declaration::Queue {
            name: self.queries(),
            exclusive: false,
            // Questions carry their asker's deadline as expiration; the bound holds if they do not.
            arguments: quorum(vec![("x-max-length", HeaderValue::Int(10_000))]),
        });
        all.extend((0..DELAY_LEVELS).flat_map(|level| self.delay_level(level)));
        all
    }

    /// What a consumer of a queue of tasks declares: the queue, the way to it, and where tasks go that
    /// miss it or that the broker takes out of it.
    ///
    /// Much less than [`core`](Self::core), because each object costs a round trip, whenever a worker
    /// starts or comes back; the worker's publisher declares the rest.
    pub fn task_intake(&self, queue: &QueueName) -> Vec<Declaration> {
        let mut all = Self::last_resort(self.unrouted(), dead_lettering(self.dead())).to_vec();
        all.extend(Self::last_resort(self.unreadable(), vec![]));
        all.push(exchange(self.tasks_exchange(), ExchangeKind::Direct, self.last_stop()));
        all.extend(self.inbox_of_collector(self.dead(), ExchangeKind::Fanout));
        all.extend(self.task_queue_declarations(queue));
        all
    }

    /// [`core`](Self::core) and these queues of tasks, each object once.
    pub fn with_queues(&self, queues: &[QueueName]) -> Vec<Declaration> {
        let mut all = self.core();
        for declaration in queues.iter().flat_map(|queue| self.task_queue_declarations(queue)) {
            if !all.contains(&declaration) {
                all.push(declaration);
            }
        }
        all
    }

    /// What of [`core`](Self::core) has this name: an exchange, a queue, its bindings.
    pub fn named(&self, name: &str) -> Vec<Declaration> {
        self.core().into_iter().filter(|declaration| declaration.name() == name).collect()
    }

    /// The queue of tasks behind a short name, with its binding.
    pub fn task_queue_declarations(&self, queue: &QueueName) -> [Declaration; 2] {
        let name = self.task_queue(queue);
        let arguments = quorum(dead_lettering(self.dead()));
        let routing_key = queue.to_string();
        [
            Declaration::Queue { name: name.clone(), exclusive: false, arguments },
            binding(self.tasks_exchange(), name, routing_key),
        ]
    }

    /// A durable queue that keeps every done notice for `garenne verify`, through outages too, and
    /// its binding. Nobody else may declare it: what nobody reads fills the broker.
    pub fn notice_keeper(&self) -> [Declaration; 2] {
        let name = format!("{}.verify.notices", self.ns);
        [
            Declaration::Queue { name: name.clone(), exclusive: false, arguments: quorum(vec![]) },
            binding(self.notices_exchange(), name, "#".to_owned()),
        ]
    }

    /// Where an exchange sends what no queue wants.
    fn last_stop(&self) -> Option<String> {
        Protection::AlternateExchange.is_enabled().then(|| self.unrouted())
    }

    /// A queue for what found no other. The unrouted one dead-letters, since a message that brought a
    /// TTL of its own must not vanish there either.
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

    /// One level: an exchange that keeps what is marked for it and passes the rest on by its alternate.
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
    /// A queue that belongs to the declaring connection and vanishes with it.
    pub fn exclusive_queue(name: String) -> Self {
        Self::Queue { name, exclusive: true, arguments: vec![] }
    }

    /// The object's name; a binding has none of its own and answers its queue's.
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

/// Dead-lettering that waits for the target's confirm. The default strategy loses confirmed
/// messages when the broker is killed, and this one needs `reject-publish` to be in force.
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
    fn every_target_is_declared_with_what_names_it() {
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
    fn whoever_dead_letters_does_so_at_least_once() {
        for declaration in topology().core() {
            let Declaration::Queue { name, arguments, .. } = declaration else { continue };
            let has = |key: &str| arguments.iter().any(|(k, _)| *k == key);
            assert_eq!(has("x-dead-letter-exchange"), has("x-dead-letter-strategy"), "{name}");
            assert_eq!(has("x-dead-letter-exchange"), has("x-overflow"), "{name}");
            assert!(has("x-delivery-limit"), "{name}");
        }
    }

    #[test]
    fn a_delay_enters_at_its_highest_level() {
        let route = topology().delay_route(Duration::from_millis(550)).unwrap();
        assert_eq!(route.exchange, "g.delay.02");
        assert_eq!(route.marks, ["garenne-delay-02", "garenne-delay-01"]);
        assert_eq!(route.delay, Duration::from_millis(600));
        assert_eq!(topology().delay_route(Duration::ZERO), None);
    }

    proptest! {
        #[test]
        fn a_delay_is_never_short_and_at_most_a_sixteenth_long(millis in 1..=2_592_000_000_u64) {
            let asked = Duration::from_millis(millis);
            let route = topology().delay_route(asked).unwrap();
            prop_assert!(route.delay >= asked);
            prop_assert!(route.delay <= asked + asked / 16 + DELAY_UNIT);
            prop_assert!(route.marks.len() <= 5);
            let mut seen = HashSet::new();
            prop_assert!(route.marks.iter().all(|mark| seen.insert(mark)), "a level twice");
        }
    }
}
