//! Decides which queues replies may be published to, since any sender can name a queue.
//!
//! [`ReplyRule::admits`] is pure and is the only rule: workers and collectors check it before they
//! publish to a queue that a message names. [`ReplyGate`] counts and logs refusals. Nothing is
//! published here.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::names::Namespace;
use crate::printable::neutral;

/// Prefix of queue names that RabbitMQ generates; clients cannot declare a queue with such a name.
const SERVER_NAMED: &str = "amq.gen-";
/// Prefix of direct reply-to addresses, which RabbitMQ generates and which lead to the sender's
/// channel only.
const DIRECT: &str = "amq.rabbitmq.reply-to.";
/// Most refused queues that are logged by name. Senders choose the names, so there may be any
/// number.
const MOST_LOGGED: usize = 1_000;

/// A queue, or all queues with a prefix: `orders.replies`, `orders.*`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum QueuePattern {
    /// The queue with this name.
    Name(String),
    /// Every queue whose name starts with this prefix.
    Prefix(String),
}

impl QueuePattern {
    /// Parses a pattern. The only special character is a `*` at the end.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (stem, is_prefix) = text.strip_suffix('*').map_or((text, false), |stem| (stem, true));
        if text.is_empty() || text.len() > 255 {
            return Err("a queue name has 1 to 255 bytes".to_owned());
        }
        if stem.contains('*') {
            return Err(format!("{text:?}: `*` is allowed at the end only"));
        }
        Ok(if is_prefix { Self::Prefix(stem.to_owned()) } else { Self::Name(stem.to_owned()) })
    }

    fn matches(&self, queue: &str) -> bool {
        match self {
            Self::Name(name) => queue == name,
            Self::Prefix(prefix) => queue.starts_with(prefix.as_str()),
        }
    }
}

/// The rule which queues may receive replies.
#[derive(Debug, Clone)]
pub struct ReplyRule {
    namespace: Namespace,
    allowed: Vec<QueuePattern>,
}

impl ReplyRule {
    /// The rule of a namespace; `allowed` are the additional queues of `worker.reply_queues`.
    pub fn new(namespace: &Namespace, allowed: &[QueuePattern]) -> Self {
        Self { namespace: namespace.clone(), allowed: allowed.to_vec() }
    }

    /// Whether replies may be published to this queue.
    ///
    /// Allowed are the reply queues of the namespace, queues named by the server, direct reply-to
    /// addresses, and the additional queues. The shared queues of the namespace are never allowed:
    /// a reply there would be read as a task, a report or a dead letter.
    pub fn admits(&self, queue: &str) -> bool {
        let own = queue.strip_prefix(self.namespace.as_str());
        match own.and_then(|rest| rest.strip_prefix('.')) {
            Some(rest) => rest.starts_with("reply."),
            None => {
                queue.starts_with(SERVER_NAMED)
                    || queue.starts_with(DIRECT)
                    || self.allowed.iter().any(|pattern| pattern.matches(queue))
            }
        }
    }
}

/// A [`ReplyRule`] that counts and logs its refusals. Clones share the count.
#[derive(Debug, Clone)]
pub struct ReplyGate(Arc<Gate>);

#[derive(Debug)]
struct Gate {
    rule: ReplyRule,
    refused: AtomicU64,
    /// Hashes of the names of logged queues.
    logged: Mutex<HashSet<u64>>,
    hashes: RandomState,
}

impl ReplyGate {
    /// A gate for this rule.
    pub fn new(rule: ReplyRule) -> Self {
        let (refused, logged) = (AtomicU64::default(), Mutex::default());
        Self(Arc::new(Gate { rule, refused, logged, hashes: RandomState::new() }))
    }

    /// [`ReplyRule::admits`]; a refusal is counted, and logged the first time for each queue.
    pub fn admits(&self, queue: &str) -> bool {
        let admitted = self.0.rule.admits(queue);
        if !admitted {
            self.refuse(queue);
        }
        admitted
    }

    /// Number of replies that were not sent because of their queue.
    pub fn refused(&self) -> u64 {
        self.0.refused.load(Ordering::Relaxed)
    }

    fn refuse(&self, queue: &str) {
        let refused = self.0.refused.fetch_add(1, Ordering::Relaxed) + 1;
        let mut logged = self.0.logged.lock();
        if logged.len() > MOST_LOGGED || !logged.insert(self.0.hashes.hash_one(queue)) {
            return;
        }
        if logged.len() > MOST_LOGGED {
            return tracing::warn!(
                refused,
                "ignoring reply_to of more queues; further ones are not logged"
            );
        }
        let queue = neutral(queue);
        tracing::warn!(
            refused,
            "ignoring reply_to: {queue:?} is not a reply queue; to allow it, \
             add it to worker.reply_queues"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(allowed: &[&str]) -> ReplyRule {
        let allowed: Vec<_> =
            allowed.iter().map(|text| QueuePattern::parse(text).unwrap()).collect();
        ReplyRule::new(&Namespace::new("g").unwrap(), &allowed)
    }

    #[test]
    fn only_reply_queues_are_allowed() {
        let rule = rule(&[]);
        for queue in ["g.reply.p.1", "amq.gen-x", "amq.rabbitmq.reply-to.g1h2AA"] {
            assert!(rule.admits(queue), "{queue}");
        }
        for queue in [
            "g.results",
            "g.dead",
            "g.tasks.default",
            "g.queries",
            "h.results",
            "h.dead",
            "h.reply.1",
            "orders",
            "amq.rabbitmq.reply-to",
            "amq.gen",
            "",
            "g",
            "g.reply",
        ] {
            assert!(!rule.admits(queue), "{queue}");
        }
    }

    #[test]
    fn the_configuration_cannot_allow_a_shared_queue_of_the_namespace() {
        let rule = rule(&["orders", "shop.*"]);
        assert!(rule.admits("orders") && rule.admits("shop.1") && !rule.admits("orders.1"));
        let rule = self::rule(&["*"]);
        assert!(rule.admits("anything") && !rule.admits("g.results"));
        assert!(QueuePattern::parse("a*b").is_err() && QueuePattern::parse("").is_err());
    }

    #[test]
    fn refusals_are_counted_within_bounded_memory() {
        let gate = ReplyGate::new(rule(&[]));
        for number in 0..5_000 {
            assert!(!gate.admits(&format!("q{}", number / 2)));
        }
        assert_eq!(gate.refused(), 5_000);
        assert_eq!(gate.0.logged.lock().len(), MOST_LOGGED + 1);
    }
}
