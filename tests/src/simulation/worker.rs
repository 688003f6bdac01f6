//! A worker process: the real decisions of `garenne_worker::protocol`, and a driver that may be
//! interrupted between any two of its actions.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use garenne_common::broker::{BrokerError, Outgoing};
use garenne_common::wire::lease::next_fence;
use garenne_common::wire::{Fence, HeaderValue, Message};
use garenne_common::{QueueName, ReplyGate, ReplyRule, TaskId, TaskName};
use garenne_worker::protocol::{
    Action, Arrival, Attempt, AttemptKey, DeliveryRef, KnownAttempts, Outbound, QueueIndex,
    SettleCore, Settlement, SettlementBuilder, Subject, Successor, TaskSource, Ticket,
    UnackedDeliveries, validate,
};
use garenne_worker::{Disposition, Outcome, decide};

use super::books::verify;
use super::channel::Delivery;
use super::collector::LEASE_TERM;
use super::env::Env;
use super::mutation::Mutation;
use super::script::{MAX_ATTEMPTS, Script, id_of};

const QUEUES: [&str; 2] = ["default", "cpu"];
const SETTLED_AT_ONCE: usize = 4;

pub(super) struct Worker {
    pub(super) name: String,
    pub(super) up: bool,
    pub(super) stopping: bool,
    /// One for each queue.
    pub(super) consumers: Vec<usize>,
    pub(super) publisher: usize,
    queues: [Queue; 2],
    known: Arc<KnownAttempts>,
    settlements: SettlementBuilder,
    core: SettleCore,
    concurrency: usize,
    running: Vec<Attempt>,
    inbox: VecDeque<Settlement>,
    confirms: VecDeque<(Ticket, Result<(), BrokerError>)>,
    todo: VecDeque<Action>,
    window: usize,
    /// For [`Mutation::WaitsForRoomInLine`].
    in_line: InLine,
    tickets: HashMap<u64, Ticket>,
    /// What this process has run, which it must not run again.
    seen: HashSet<AttemptKey>,
    /// What the broker wrote on messages, for [`Mutation::KeepDeathMarks`].
    deaths: HashMap<String, HeaderValue>,
}

/// The state of a driver that waits for room in line: what it has still to hand over, and publishes
/// that it has begun, with whether they have asked for room. Room goes to those that asked first, and
/// nobody but the driver lets them take it.
#[derive(Default)]
struct InLine {
    rest: VecDeque<Outbound>,
    begun: VecDeque<(Ticket, Outgoing, bool)>,
}

/// A queue that the worker serves.
struct Queue {
    name: QueueName,
    unacked: Arc<UnackedDeliveries>,
}

impl Worker {
    pub(super) fn start(env: &mut Env, name: String, script: &Script) -> Self {
        let names = QUEUES.map(|name| QueueName::new(name).unwrap());
        let share = script.prefetch;
        let full_names = names.iter().map(|name| env.topology.task_queue(name));
        let full_names = full_names.collect::<Vec<_>>();
        let consumers = full_names.iter().map(|queue| env.consume(queue, share)).collect();
        let queues = names.map(|name| Queue { name, unacked: Arc::default() });
        let known = Arc::<KnownAttempts>::default();
        let topology = (*env.topology).clone();
        let replies = ReplyGate::new(ReplyRule::new(topology.namespace(), &[]));
        let settlements = SettlementBuilder {
            topology,
            max_body: 1024 * 1024,
            replies,
            worker: Arc::from(name.as_str()),
        };
        let unacked = queues.iter().map(|queue| Arc::clone(&queue.unacked)).collect();
        let core = SettleCore::new(unacked, Arc::clone(&known), &settlements);
        Self {
            name,
            up: true,
            stopping: false,
            consumers,
            publisher: env.publisher(),
            queues,
            known,
            settlements,
            core,
            concurrency: script.concurrency,
            running: vec![],
            inbox: VecDeque::new(),
            confirms: VecDeque::new(),
            todo: VecDeque::new(),
            window: script.window,
            in_line: InLine::default(),
            tickets: HashMap::new(),
            seen: HashSet::new(),
            deaths: HashMap::new(),
        }
    }

    /// Does one small thing, or the broker does one for it; `false` if there is nothing to do.
    pub(super) fn step(&mut self, env: &mut Env) -> Result<bool, String> {
        let first = env.random.usize(..9);
        for turn in (0..9).map(|n| (first + n) % 9) {
            let done = match turn {
                0 | 1 => self.receive(turn, env)?,
                2 => self.end_attempt(env),
                3 | 4 => self.drive(env),
                5 | 6 => env.serve_consumer(self.consumers[turn - 5])?,
                7 => env.serve_publisher(self.publisher)?,
                _ => self.hear(env),
            };
            if done {
                return Ok(true);
            }
        }
        Ok(self.stopping && self.leave(env))
    }

    fn receive(&mut self, queue: usize, env: &mut Env) -> Result<bool, String> {
        if self.running.len() >= self.concurrency && !self.stopping {
            return Ok(false);
        }
        let Some(delivery) = env.broker.consumers[self.consumers[queue]].inbound.pop_front() else {
            return Ok(false);
        };
        let at = DeliveryRef { queue: QueueIndex(queue), tag: delivery.tag };
        self.queues[queue].unacked.delivered(at.tag);
        if self.stopping {
            let acks = env.is(Mutation::DrainAcks);
            let successor = if acks { Successor::Confirmed } else { Successor::Requeue };
            self.inbox.push_back(Settlement::new(Subject::task(at), successor));
            return Ok(true);
        }
        self.begin(at, delivery, env)?;
        Ok(true)
    }

    fn begin(&mut self, at: DeliveryRef, delivery: Delivery, env: &mut Env) -> Result<(), String> {
        let Delivery { message, redelivered, .. } = delivery;
        let message = Arc::unwrap_or_clone(message);
        let queue = &self.queues[at.queue.0].name;
        if env.is(Mutation::NoAdoption) {
            self.forget(&message);
        }
        let source = TaskSource::Message(Box::new(message));
        let arrival = Arrival { delivery: at, redelivered, source };
        let find = |name: &TaskName| (name.as_str() == "sim.work").then_some(());
        match validate(&arrival, queue, env.at(), find, &self.known, &self.settlements) {
            Ok((task, ())) => self.run(Attempt::new(task, arrival, env.at()), env),
            Err(settlement) => {
                self.inbox.extend(settlement.map(|settlement| *settlement));
                Ok(())
            }
        }
    }

    fn run(&mut self, mut attempt: Attempt, env: &mut Env) -> Result<(), String> {
        let task = Arc::clone(&attempt.task);
        let key = AttemptKey::of(&task, &attempt.source);
        env.note(|env| format!("{} runs {}", self.name, env.books.label(&key)));
        env.books.runs(&task.id, task.attempt, env.now)?;
        verify(self.seen.insert(key.clone()), || format!("P8: {key:?} runs again here"))?;
        let message = attempt.source.message().into_owned();
        if let Some(marks) = message.header("x-death") {
            self.deaths.insert(task.id.to_string(), marks.clone());
        }
        let leased = env.books.work(&task.id).is_some_and(|work| work.leased);
        attempt.lease = leased.then(|| Fence::begin(next_fence(&message).unwrap_or(1)));
        if let Some(fence) = &attempt.lease {
            let lease = self.settlements.lease(&task, &attempt.source, fence, LEASE_TERM);
            self.inbox.push_back(lease);
        }
        self.running.push(attempt);
        Ok(())
    }

    fn forget(&self, message: &Message) {
        let Some(id) = id_of(message).and_then(|id| TaskId::new(id).ok()) else { return };
        for attempt in 1..=MAX_ATTEMPTS {
            self.known.forget(&AttemptKey { id: id.clone(), attempt, fence: 0 });
        }
    }

    fn end_attempt(&mut self, env: &mut Env) -> bool {
        if self.running.is_empty() {
            return false;
        }
        let place = env.random.usize(..self.running.len());
        if let Attempt { task, lease: Some(fence), .. } = &self.running[place]
            && env.random.u8(..4) == 0
        {
            self.inbox.push_back(SettlementBuilder::renewal(task, fence, env.at()));
            return true;
        }
        let mut attempt = self.running.swap_remove(place);
        let task = Arc::clone(&attempt.task);
        // The grace period of a stopping worker may be over.
        let interrupted = self.stopping && env.random.bool();
        if interrupted && attempt.lease.is_some() {
            env.books.may_double(&attempt.source.message());
        }
        let work = env.books.work(&task.id);
        let outcome = match work.filter(|_| !interrupted) {
            Some(work) => work.outcome(task.attempt),
            None => Outcome::Interrupted,
        };
        let jitter = env.random.f64();
        let disposition = decide(outcome, task.attempt, &task.options.retry, jitter);
        if let Disposition::Retry { after, .. } = &disposition {
            let until = env.at().plus(*after).as_millis();
            env.books.waits(&task.id, task.attempt + 1, until);
        }
        let key = AttemptKey::of(&task, &attempt.source);
        env.note(|env| format!("{} ended {}", self.name, env.books.label(&key)));
        attempt.finished_at = env.at();
        self.inbox.push_back(self.settlements.build(&attempt, disposition));
        true
    }

    /// One turn of the settling task: carries out an action, or asks the core for more of them.
    fn drive(&mut self, env: &mut Env) -> bool {
        if let Some(action) = self.todo.pop_front() {
            self.carry_out(action, env);
            return true;
        }
        if env.is(Mutation::WaitsForRoomInLine)
            && let Some(done) = self.drive_in_line(env)
        {
            return done;
        }
        let room = self.core.wants_room() && self.has_room(env);
        let others = !self.confirms.is_empty() || !self.inbox.is_empty();
        if room && (!others || env.random.bool()) {
            if let Some(outbound) = self.core.next_message() {
                self.publish(outbound, env);
            }
            return true;
        }
        let mut actions = vec![];
        if let Some((ticket, result)) = self.confirms.pop_front() {
            self.core.confirm(ticket, &result, &mut actions);
        } else if self.inbox.is_empty() {
            return false;
        } else {
            let many = env.random.usize(1..=self.inbox.len().min(SETTLED_AT_ONCE));
            for settlement in self.inbox.drain(..many) {
                self.core.settle(settlement, &mut actions);
            }
        }
        self.core.flush(&mut actions);
        self.todo.extend(actions);
        true
    }

    fn carry_out(&mut self, action: Action, env: &mut Env) {
        match action {
            Action::Acknowledge { queue, ack } => {
                let multiple = ack.multiple || env.is(Mutation::AckTooMuch);
                let check = !env.is(Mutation::NoEpochCheck);
                env.broker.consumers[self.consumers[queue.0]].ack(ack.tag, multiple, check);
            }
            Action::Requeue(at) => {
                env.broker.consumers[self.consumers[at.queue.0]].requeue(at.tag);
            }
        }
    }

    fn has_room(&self, env: &Env) -> bool {
        env.broker.publishers[self.publisher].len() < self.window
    }

    fn publish(&mut self, outbound: Outbound, env: &mut Env) {
        let Outbound { ticket, outgoing } = outbound;
        let Some(ticket) = ticket else { return env.send_and_forget(self.publisher, outgoing) };
        let outgoing = self.spoil(outgoing, env);
        let number = env.send(self.publisher, outgoing);
        if env.is(Mutation::AckBeforeConfirm) {
            self.confirms.push_back((ticket, Ok(())));
        } else {
            self.tickets.insert(number, ticket);
        }
    }

    /// The turn of a driver that waits for room in line; `None` if it may hear of something else.
    fn drive_in_line(&mut self, env: &mut Env) -> Option<bool> {
        self.in_line.rest.extend(std::iter::from_fn(|| self.core.next_message()));
        match self.in_line.rest.pop_front() {
            Some(Outbound { ticket: Some(ticket), outgoing }) => {
                self.in_line.begun.push_back((ticket, outgoing, false));
            }
            Some(reply) if self.has_room(env) && !self.in_line.begun.iter().any(|b| b.2) => {
                self.publish(reply, env);
            }
            Some(reply) => {
                self.in_line.rest.push_front(reply);
                return Some(false);
            }
            None => {
                self.in_line.begun.iter_mut().for_each(|begun| begun.2 = true);
                if !self.has_room(env) {
                    return None;
                }
                let (ticket, outgoing, _) = self.in_line.begun.pop_front()?;
                self.publish(Outbound { ticket: Some(ticket), outgoing }, env);
            }
        }
        Some(true)
    }

    /// Plants the mistakes that are made in publishing.
    fn spoil(&self, mut outgoing: Outgoing, env: &Env) -> Outgoing {
        let message = &mut outgoing.message;
        let is_task = message.header("x-garenne-attempt").is_some()
            && outgoing.exchange != env.topology.dead();
        if is_task && env.is(Mutation::SameAttemptAgain) {
            message.set_header("x-garenne-attempt", HeaderValue::Int(1));
        }
        let marks = id_of(message).and_then(|id| self.deaths.get(id)).cloned();
        if let Some(marks) = marks.filter(|_| is_task && env.is(Mutation::KeepDeathMarks)) {
            message.set_header("x-death", marks);
        }
        outgoing
    }

    fn hear(&mut self, env: &mut Env) -> bool {
        let Some((number, _)) = env.confirm(self.publisher) else { return false };
        if let Some(ticket) = self.tickets.remove(&number) {
            self.confirms.push_back((ticket, Ok(())));
        }
        true
    }

    /// Ends a worker that was told to stop and has nothing left to do.
    fn leave(&mut self, env: &mut Env) -> bool {
        let links = self.consumers.iter().all(|consumer| env.broker.consumers[*consumer].is_idle());
        let work = self.running.is_empty() && self.inbox.is_empty() && self.todo.is_empty();
        if !links || !work || !self.core.is_idle() {
            return false;
        }
        env.note(|_| format!("{} leaves", self.name));
        self.consumers.iter().for_each(|consumer| env.lose_consumer(*consumer, true));
        self.up = false;
        true
    }

    /// The channels of the connection that publishes end; what was sent goes again.
    pub(super) fn lose_publisher(&mut self, env: &mut Env) -> Result<(), String> {
        env.lose_publisher(self.publisher)?;
        if env.is(Mutation::LostConfirmCounts) {
            let tickets = self.tickets.drain().map(|(_, ticket)| (ticket, Ok(())));
            self.confirms.extend(tickets);
        }
        Ok(())
    }

    /// The process dies.
    pub(super) fn kill(&mut self, env: &mut Env) -> Result<(), String> {
        env.lose_publisher(self.publisher)?;
        self.consumers.iter().for_each(|consumer| env.lose_consumer(*consumer, true));
        self.up = false;
        Ok(())
    }
}
