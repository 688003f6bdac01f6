//! A collector process: the real `Group` and `aggregate::apply` over a store of maps, the order of its
//! steps as in `collector/src/ingest/mod.rs`, `collector/src/outbox/mod.rs` and `collector/src/control/deadlines.rs`.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use garenne_collector::ingest::group::{Group, Source};
use garenne_collector::rules::aggregate::{Rules, apply};
use garenne_common::Timestamp;
use garenne_common::broker::{DeliveryTag, Outgoing};
use garenne_common::wire::Notice;

use super::env::{Env, label};
use super::ledger::Transaction;
use super::mutation::Mutation;
use super::script::Script;

const SOURCES: [Source; 3] = [Source::Results, Source::Dead, Source::Unrouted];
const RULES: Rules = Rules { batch_deadline: Duration::from_mins(1), task_notices: true };
/// How long a worker under a lease may be silent.
pub(super) const LEASE_TERM: Duration = Duration::from_secs(10);
const GROUPS_WAITING: usize = 2;
const PREFETCH: usize = 8;

pub(super) struct Collector {
    pub(super) name: String,
    pub(super) up: bool,
    /// Of results, dead letters and what was unrouted.
    pub(super) consumers: Vec<usize>,
    pub(super) publisher: usize,
    group_size: usize,
    gathering: Option<GatheredGroup>,
    waiting: VecDeque<GatheredGroup>,
    acks: VecDeque<(usize, DeliveryTag)>,
    /// What the relay has sent, by the publisher's number, and what of it is confirmed.
    sent: HashMap<u64, u64>,
    confirmed: Vec<u64>,
    /// Looks in a row that found the queue drained: the first and the last.
    drained: Option<(Timestamp, Timestamp)>,
    /// Notices of [`Mutation::NoOutbox`].
    beside: Vec<Notice>,
}

struct GatheredGroup {
    group: Group,
    newest: [Option<DeliveryTag>; 3],
}

impl Collector {
    pub(super) fn start(env: &mut Env, name: String, script: &Script) -> Self {
        let topology = &env.topology;
        let queues = [topology.results(), topology.dead(), topology.unrouted()];
        Self {
            name,
            up: true,
            consumers: queues.iter().map(|queue| env.consume(queue, PREFETCH)).collect(),
            publisher: env.publisher(),
            group_size: script.group_size,
            gathering: None,
            waiting: VecDeque::new(),
            acks: VecDeque::new(),
            sent: HashMap::new(),
            confirmed: vec![],
            drained: None,
            beside: vec![],
        }
    }

    pub(super) fn step(&mut self, env: &mut Env) -> Result<bool, String> {
        let first = env.random.usize(..10);
        for turn in (0..10).map(|n| (first + n) % 10) {
            let done = match turn {
                0 => self.gather(env),
                1 => self.hand_on(),
                2 | 3 => self.finish(env)?,
                4 => self.relay(env),
                5 => self.look_at_deadlines(env),
                6 => env.serve_publisher(self.publisher)?,
                more => env.serve_consumer(self.consumers[more - 7])?,
            };
            if done {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn gather(&mut self, env: &mut Env) -> bool {
        let full = |gathered: &GatheredGroup| gathered.group.is_full(self.group_size);
        if self.gathering.as_ref().is_some_and(full) {
            return false;
        }
        let first = env.random.usize(..3);
        for place in (0..3).map(|n| (first + n) % 3) {
            let inbound = &mut env.broker.consumers[self.consumers[place]].inbound;
            let Some(delivery) = inbound.pop_front() else { continue };
            let at = env.at();
            let gathered = self
                .gathering
                .get_or_insert_with(|| GatheredGroup { group: Group::new(at), newest: [None; 3] });
            let (key, message) = (&delivery.routing_key, &delivery.message);
            gathered.group.take(SOURCES[place], key, message, &self.name);
            gathered.newest[place] = gathered.newest[place].max(Some(delivery.tag));
            return true;
        }
        false
    }

    fn hand_on(&mut self) -> bool {
        if self.waiting.len() >= GROUPS_WAITING {
            return false;
        }
        let Some(gathered) = self.gathering.take() else { return false };
        self.waiting.push_back(gathered);
        true
    }

    /// Acknowledges what is committed, then commits the next group.
    fn finish(&mut self, env: &mut Env) -> Result<bool, String> {
        if let Some((consumer, tag)) = self.acks.pop_front() {
            env.broker.consumers[consumer].ack(tag, true, true);
            return Ok(true);
        }
        if !self.beside.is_empty() {
            self.beside.drain(..).for_each(|notice| env.store.announce(notice));
            return Ok(true);
        }
        let Some(gathered) = self.waiting.front() else { return Ok(false) };
        let newest: Vec<_> = self.consumers.iter().copied().zip(gathered.newest).collect();
        let acks = newest.into_iter().filter_map(|(consumer, tag)| Some((consumer, tag?)));
        if env.is(Mutation::AckBeforeCommit) {
            for (consumer, tag) in acks {
                env.broker.consumers[consumer].ack(tag, true, true);
            }
        } else {
            self.acks.extend(acks);
        }
        if env.unlucky(16) {
            env.note(|_| format!("{} cannot commit", self.name));
            self.acks.clear();
            return Ok(true);
        }
        let Some(GatheredGroup { group, .. }) = self.waiting.pop_front() else { return Ok(false) };
        self.commit(&group, env)?;
        Ok(true)
    }

    fn commit(&mut self, group: &Group, env: &mut Env) -> Result<(), String> {
        let mut transaction = Transaction {
            at: env.at(),
            store: env.store.clone(),
            last_result_wins: env.is(Mutation::LastResultWins),
            beside: env.is(Mutation::NoOutbox).then(Vec::new),
        };
        let Ok(done) = apply(&mut transaction, group, RULES);
        env.books.committed(&env.store, &transaction.store)?;
        let (fresh, repeats) = (done.fresh, done.repeats);
        env.note(|_| format!("{} commits {fresh} results, {repeats} repeats", self.name));
        env.store = transaction.store;
        self.beside.extend(transaction.beside.into_iter().flatten());
        Ok(())
    }

    /// The relay: sends all that lies in the outboxes, and forgets what is confirmed when all is.
    fn relay(&mut self, env: &mut Env) -> bool {
        if let Some((number, _)) = env.confirm(self.publisher) {
            self.confirmed.extend(self.sent.remove(&number));
            return true;
        }
        if !self.sent.is_empty() {
            return false;
        }
        if !self.confirmed.is_empty() {
            for seq in self.confirmed.drain(..) {
                env.store.notices.remove(&seq);
                env.store.resends.remove(&seq);
            }
            return true;
        }
        let exchange = env.topology.notices_exchange();
        let notices = env.store.notices.iter().map(|(seq, notice)| {
            let (exchange, routing_key) = (exchange.clone(), notice.key());
            (*seq, Outgoing { exchange, routing_key, message: notice.encode("collector") })
        });
        let resends = env.store.resends.iter().map(|(seq, resend)| {
            let (exchange, routing_key) = (resend.exchange.clone(), resend.routing_key.clone());
            (*seq, Outgoing { exchange, routing_key, message: resend.message.clone() })
        });
        let resends: Vec<_> = resends.collect();
        for (_, outgoing) in &resends {
            // The other collector may send it too.
            env.books.may_double(&outgoing.message);
        }
        let all: Vec<_> = notices.chain(resends).collect();
        for (seq, outgoing) in &all {
            let number = env.send(self.publisher, outgoing.clone());
            if env.is(Mutation::NoConfirmForNotices) {
                env.store.notices.remove(seq);
            } else {
                self.sent.insert(number, *seq);
            }
        }
        !all.is_empty()
    }

    /// Looks at a drained queue, one after the other. Between the real ones lies a second, in which
    /// whatever a collector holds is committed; here nobody may hold anything.
    fn look_at_deadlines(&mut self, env: &mut Env) -> bool {
        let now = env.at();
        let overdue = env.store.batches.values().any(|batch| batch.clone().abandon(now).is_some());
        let held = env.store.leases.values().any(|held| held.ends_at().is_some());
        if !overdue && !held {
            self.drained = None;
            return false;
        }
        let results = env.broker.layout.queue(&env.topology.results());
        let undrained = env.broker.depth(results) > 0 && !env.is(Mutation::AbandonUndrained);
        if undrained || !env.broker.consumers[self.consumers[0]].up {
            self.drained = None;
            return false;
        }
        let Some((first, last)) = self.drained else {
            self.drained = Some((now, now));
            return true;
        };
        self.drained = Some((first, now));
        let abandoned = self.abandon(last, env);
        self.lapse(first, env) || abandoned
    }

    /// When a lease may lapse that was silent since the first look.
    pub(super) fn patience_ends(&self) -> Option<u64> {
        self.drained.map(|(first, _)| first.plus(LEASE_TERM).as_millis())
    }

    fn abandon(&self, overdue_at: Timestamp, env: &mut Env) -> bool {
        let mut store = env.store.clone();
        let mut any = false;
        for mut batch in env.store.batches.clone().into_values() {
            if let Some(notice) = batch.abandon(overdue_at) {
                env.note(|_| format!("{} abandons {}", self.name, batch.id));
                store.batches.insert(batch.id.clone(), batch);
                store.announce(notice);
                any = true;
            }
        }
        env.store = store;
        any
    }

    fn lapse(&self, listening_since: Timestamp, env: &mut Env) -> bool {
        let (topology, now) = (Arc::clone(&env.topology), env.at());
        let sent = env.store.lapse(&topology, listening_since, now);
        for message in &sent {
            env.note(|_| format!("{} takes the lease of {} for lapsed", self.name, label(message)));
        }
        // A worker that goes on is as good as a fault: the task runs twice.
        env.books.faults += u32::from(!sent.is_empty());
        !sent.is_empty()
    }

    /// The process dies.
    pub(super) fn kill(&mut self, env: &mut Env) -> Result<(), String> {
        env.lose_publisher(self.publisher)?;
        self.consumers.iter().for_each(|consumer| env.lose_consumer(*consumer, true));
        self.up = false;
        Ok(())
    }
}
