//! One schedule from its seed to its end: whose turn it is, what breaks, and when it is over.

use std::sync::Arc;

use garenne_common::topology::Topology;
use garenne_common::{Namespace, Timestamp};

use super::books::{Books, verify};
use super::broker::Broker;
use super::collector::Collector;
use super::env::Env;
use super::layout::{Layout, declarations};
use super::ledger::{HeldLease, Store};
use super::mutation::Mutation;
use super::producer::Producer;
use super::script::{BEGIN, Script};
use super::worker::Worker;

/// No schedule needs nearly as many steps.
const MAX_STEPS: u32 = 60_000;

/// What all schedules share: the objects of the broker.
#[derive(Clone)]
pub(super) struct Stage {
    topology: Arc<Topology>,
    layout: Arc<Layout>,
    without_alternate: Arc<Layout>,
}

impl Stage {
    pub(super) fn new() -> Self {
        let topology = Topology::new(Namespace::new("sim").unwrap());
        let declarations = declarations(&topology);
        let without = Layout::new(&declarations).without_alternate(&topology.tasks_exchange());
        Self {
            layout: Arc::new(Layout::new(&declarations)),
            without_alternate: Arc::new(without),
            topology: Arc::new(topology),
        }
    }
}

/// How much a schedule did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Done {
    pub(super) steps: u64,
    pub(super) tasks: u64,
    pub(super) faults: u64,
}

pub(super) struct World {
    env: Env,
    script: Script,
    workers: Vec<Worker>,
    collectors: Vec<Collector>,
    producers: Vec<Producer>,
    faults_left: u32,
    processes: u32,
    steps: u32,
}

impl World {
    pub(super) fn new(stage: &Stage, seed: u64, mutation: Option<Mutation>, trace: bool) -> Self {
        let mut random = fastrand::Rng::with_seed(seed);
        let script = Script::new(&mut random);
        let unrouted = mutation == Some(Mutation::NoAlternateExchange);
        let layout = if unrouted { &stage.without_alternate } else { &stage.layout };
        let mut env = Env {
            random,
            now: BEGIN,
            topology: Arc::clone(&stage.topology),
            broker: Broker::new(Arc::clone(layout)),
            store: Store::default(),
            books: Books::new(&script),
            mutation,
            calm: script.faults == 0,
            trace: trace.then(Vec::new),
        };
        let items = script.producers.iter().cloned();
        let producers = items.map(|items| Producer::start(&mut env, items)).collect();
        let (workers, collectors) = (vec![], vec![]);
        let faults_left = script.faults;
        let (processes, steps) = (0, 0);
        let mut world =
            Self { env, script, workers, collectors, producers, faults_left, processes, steps };
        for _ in 0..world.script.workers {
            let worker = world.new_worker();
            world.workers.push(worker);
        }
        for _ in 0..world.script.collectors {
            let collector = world.new_collector();
            world.collectors.push(collector);
        }
        world
    }

    /// Runs to the end and holds every promise against the books.
    pub(super) fn run(&mut self) -> Result<Done, String> {
        while self.step()? {
            verify(self.steps < MAX_STEPS, || "I8: it does not come to rest".to_owned())?;
        }
        self.is_empty()?;
        self.env.books.finish(&self.script, &self.env.store)?;
        Ok(Done {
            steps: self.steps.into(),
            tasks: self.script.work().count() as u64,
            faults: self.env.books.faults.into(),
        })
    }

    pub(super) fn trace(&self) -> &[String] {
        self.env.trace.as_deref().unwrap_or_default()
    }

    /// I6: nothing is left lying anywhere.
    fn is_empty(&self) -> Result<(), String> {
        let broker = &self.env.broker;
        for queue in (0..broker.queues.len()).filter(|queue| broker.name(*queue) != "listener") {
            let (name, depth) = (broker.name(queue), broker.depth(queue));
            verify(depth == 0, || format!("I6: {depth} messages are left in {name}"))?;
        }
        let store = &self.env.store;
        let left = store.notices.len() + store.resends.len();
        verify(left == 0, || format!("I6: {left} entries are left in the outboxes"))
    }

    fn step(&mut self) -> Result<bool, String> {
        self.steps += 1;
        if self.steps == self.script.chaos_steps || self.faults_left == 0 {
            self.env.calm = true;
        }
        let may_break = !self.env.calm && self.env.random.u32(..1_000) < self.script.fault_rate;
        if may_break && self.fault()? {
            self.faults_left -= 1;
            self.env.books.faults += 1;
            return Ok(true);
        }
        if self.env.random.u8(..64) == 0 && self.pass_time() {
            return Ok(true);
        }
        let total = self.workers.len() + self.collectors.len() + self.producers.len() + 1;
        let first = self.env.random.usize(..total);
        for turn in (0..total).map(|n| (first + n) % total) {
            if self.turn(turn)? {
                return Ok(true);
            }
        }
        if self.pass_time() {
            return Ok(true);
        }
        // Whoever is down for now may come back by chance only.
        let waiting = !self.is_whole();
        Ok(waiting)
    }

    fn is_whole(&self) -> bool {
        let (workers, collectors) = (&self.workers, &self.collectors);
        let consumers = workers.iter().flat_map(|worker| &worker.consumers);
        let mut consumers = consumers.chain(collectors.iter().flat_map(|c| &c.consumers));
        let broker = &self.env.broker;
        let mut publishers = workers.iter().map(|worker| worker.publisher);
        workers.iter().all(|worker| worker.up && !worker.stopping)
            && collectors.iter().all(|collector| collector.up)
            && consumers.all(|consumer| broker.consumers[*consumer].up)
            && publishers.all(|publisher| broker.publishers[publisher].up)
            && self.collectors.iter().all(|c| broker.publishers[c.publisher].up)
            && self.producers.iter().all(Producer::is_done)
    }

    fn turn(&mut self, turn: usize) -> Result<bool, String> {
        let (workers, collectors) = (self.workers.len(), self.collectors.len());
        if turn < workers {
            if self.workers[turn].up {
                return self.workers[turn].step(&mut self.env);
            }
            let comes_back = self.env.random.u8(..4) == 0;
            if comes_back {
                self.workers[turn] = self.new_worker();
            }
            return Ok(comes_back);
        }
        let turn = turn - workers;
        if turn < collectors {
            if self.collectors[turn].up {
                return self.collectors[turn].step(&mut self.env);
            }
            let comes_back = self.env.random.u8(..4) == 0;
            if comes_back {
                self.collectors[turn] = self.new_collector();
            }
            return Ok(comes_back);
        }
        match self.producers.get_mut(turn - collectors) {
            Some(producer) => Ok(producer.up && producer.step(&mut self.env)?),
            None => self.expire(),
        }
    }

    /// A queue dead-letters its head. In between the broker may die.
    fn expire(&mut self) -> Result<bool, String> {
        let env = &mut self.env;
        let Some(queue) = env.broker.expired(env.now) else { return Ok(false) };
        let dies = env.unlucky(16);
        let drop = dies && env.is(Mutation::AtMostOnceDeadLettering);
        let arrived = env.broker.expire(queue, env.now, dies && !drop, drop);
        if dies {
            env.books.faults += 1;
            for (_, message) in &arrived {
                env.books.may_double(message);
            }
        }
        env.arrived(arrived)?;
        Ok(true)
    }

    /// The clock goes to the next moment at which something is due.
    fn pass_time(&mut self) -> bool {
        let env = &mut self.env;
        let open = env.store.batches.values().filter(|batch| !batch.state.is_final());
        let open = open.filter(|batch| batch.total.is_none());
        let deadline =
            open.map(|batch| batch.deadline.as_millis()).filter(|at| *at > env.now).min();
        let leases = env.store.leases.values().filter_map(HeldLease::ends_at);
        let patience = self.collectors.iter().filter_map(Collector::patience_ends);
        let lapse = leases.map(Timestamp::as_millis).chain(patience).filter(|at| *at > env.now);
        let next = [env.broker.next_expiry().filter(|at| *at > env.now), deadline, lapse.min()];
        match next.into_iter().flatten().min() {
            Some(at) => env.now = at,
            None => return false,
        }
        true
    }

    /// Something breaks; `false` if it was broken already.
    fn fault(&mut self) -> Result<bool, String> {
        let env = &mut self.env;
        let worker = env.random.usize(..self.workers.len());
        let collector = env.random.usize(..self.collectors.len());
        let producer = env.random.usize(..self.producers.len());
        let kind = env.random.u8(..16);
        let (worker, collector) = (&mut self.workers[worker], &mut self.collectors[collector]);
        let producer = &mut self.producers[producer];
        let up = match kind {
            0..9 => worker.up,
            9..13 => collector.up,
            13 => producer.up,
            _ => true,
        };
        if !up {
            return Ok(false);
        }
        env.note(|_| format!("FAULT {kind} on {}, {} or a producer", worker.name, collector.name));
        match kind {
            0 | 1 => worker.kill(env)?,
            2 => {
                worker.stopping = true;
                for consumer in &worker.consumers {
                    env.broker.consumers[*consumer].cancelled = true;
                }
            }
            3 | 4 => {
                let consumer = worker.consumers[env.random.usize(..worker.consumers.len())];
                env.lose_consumer(consumer, false);
            }
            5 | 6 => worker.consumers.iter().for_each(|c| env.lose_consumer(*c, false)),
            7 | 8 => worker.lose_publisher(env)?,
            9 | 10 => collector.kill(env)?,
            11 => collector.consumers.iter().for_each(|c| env.lose_consumer(*c, false)),
            12 => env.lose_publisher(collector.publisher)?,
            13 => producer.kill(env)?,
            14 => env.lose_publisher(producer.publisher)?,
            _ => self.kill_broker()?,
        }
        Ok(true)
    }

    /// The broker dies and starts again: every connection is gone, what it had confirmed is not.
    fn kill_broker(&mut self) -> Result<(), String> {
        let env = &mut self.env;
        for worker in self.workers.iter_mut().filter(|worker| worker.up) {
            worker.lose_publisher(env)?;
            worker.consumers.iter().for_each(|consumer| env.lose_consumer(*consumer, false));
        }
        for collector in self.collectors.iter().filter(|collector| collector.up) {
            env.lose_publisher(collector.publisher)?;
            collector.consumers.iter().for_each(|consumer| env.lose_consumer(*consumer, false));
        }
        for producer in self.producers.iter().filter(|producer| producer.up) {
            env.lose_publisher(producer.publisher)?;
        }
        Ok(())
    }

    fn new_worker(&mut self) -> Worker {
        self.processes += 1;
        Worker::start(&mut self.env, format!("worker-{}", self.processes), &self.script)
    }

    fn new_collector(&mut self) -> Collector {
        self.processes += 1;
        Collector::start(&mut self.env, format!("collector-{}", self.processes), &self.script)
    }
}
