//! A producer process: submits its script, believes confirms alone, and submits again under the same
//! id when one does not come.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use garenne_common::BatchId;
use garenne_common::broker::Outgoing;
use garenne_common::wire::{self, Report};

use super::env::Env;
use super::mutation::Mutation;
use super::script::{Item, Work};

const WINDOW: usize = 4;
/// How long a batch may stay unsealed.
const BATCH_DEADLINE: Duration = Duration::from_secs(30);

pub(super) struct Producer {
    pub(super) up: bool,
    pub(super) publisher: usize,
    items: VecDeque<Item>,
    pending: BTreeMap<u64, Pending>,
    /// Tasks of a batch that are not confirmed.
    open: HashMap<BatchId, u32>,
}

enum Pending {
    Opened(BatchId),
    Task(Work),
    Sealed(BatchId, u64),
}

impl Producer {
    pub(super) fn start(env: &mut Env, items: Vec<Item>) -> Self {
        let publisher = env.publisher();
        let items = items.into();
        Self { up: true, publisher, items, pending: BTreeMap::new(), open: HashMap::new() }
    }

    pub(super) fn is_done(&self) -> bool {
        !self.up || (self.items.is_empty() && self.pending.is_empty())
    }

    pub(super) fn step(&mut self, env: &mut Env) -> Result<bool, String> {
        let first = env.random.usize(..4);
        for turn in (0..4).map(|n| (first + n) % 4) {
            let done = match turn {
                0 | 1 => self.next(env),
                2 => env.serve_publisher(self.publisher)?,
                _ => self.hear(env),
            };
            if done {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn next(&mut self, env: &mut Env) -> bool {
        if self.pending.len() >= WINDOW {
            return self.lose_patience(env);
        }
        let opening = self.pending.values().any(|pending| matches!(pending, Pending::Opened(_)));
        let Some(item) = self.items.front().filter(|_| !opening) else { return false };
        if let Item::Seal(batch, _) = item
            && self.open.get(batch).is_some_and(|open| *open > 0)
        {
            return self.lose_patience(env);
        }
        let at = env.at();
        let (pending, outgoing) = match item.clone() {
            Item::Open(batch) => {
                let deadline = at.plus(BATCH_DEADLINE);
                let report = Report::BatchOpened { batch: batch.clone(), at, deadline };
                (Pending::Opened(batch), to_collector(&report, env))
            }
            Item::Seal(batch, count) => {
                let report = Report::BatchSealed { batch: batch.clone(), count, at };
                (Pending::Sealed(batch, count), to_collector(&report, env))
            }
            Item::Submit(work) => {
                work.batch.iter().for_each(|id| *self.open.entry(id.clone()).or_default() += 1);
                let outgoing = to_tasks(&work, env);
                (Pending::Task(work), outgoing)
            }
        };
        self.items.pop_front();
        let number = env.send(self.publisher, outgoing);
        self.pending.insert(number, pending);
        if env.is(Mutation::NoConfirmWait) {
            self.believe(number, env);
        }
        true
    }

    /// A confirm does not come in time: the same task again, and the first may arrive as well.
    fn lose_patience(&mut self, env: &mut Env) -> bool {
        if !env.unlucky(8) {
            return false;
        }
        let oldest = self.pending.iter().find_map(|(number, pending)| match pending {
            Pending::Task(work) => Some((*number, work.clone())),
            Pending::Opened(_) | Pending::Sealed(..) => None,
        });
        let Some((number, work)) = oldest else { return false };
        self.pending.remove(&number);
        env.broker.publishers[self.publisher].withdraw(number);
        let outgoing = to_tasks(&work, env);
        env.note(|_| format!("a producer submits {} again", work.number));
        env.books.faults += 1;
        env.books.may_double(&outgoing.message);
        let number = env.send(self.publisher, outgoing);
        self.pending.insert(number, Pending::Task(work));
        true
    }

    fn hear(&mut self, env: &mut Env) -> bool {
        let Some((number, waits)) = env.confirm(self.publisher) else { return false };
        if waits {
            self.believe(number, env);
        }
        true
    }

    fn believe(&mut self, number: u64, env: &mut Env) {
        match self.pending.remove(&number) {
            Some(Pending::Task(work)) => {
                env.books.submitted(&work);
                if let Some(open) = work.batch.and_then(|batch| self.open.get_mut(&batch)) {
                    *open -= 1;
                }
            }
            Some(Pending::Opened(batch)) => env.books.was_opened(batch),
            Some(Pending::Sealed(batch, count)) => env.books.was_sealed(batch, count, env.now),
            None => {}
        }
    }

    /// The process dies and nobody starts it again.
    pub(super) fn kill(&mut self, env: &mut Env) -> Result<(), String> {
        self.up = false;
        env.lose_publisher(self.publisher)
    }
}

fn to_tasks(work: &Work, env: &Env) -> Outgoing {
    let exchange = env.topology.tasks_exchange();
    Outgoing { exchange, routing_key: work.queue.to_owned(), message: work.message() }
}

fn to_collector(report: &Report, env: &Env) -> Outgoing {
    let results = env.topology.results();
    let message = wire::report::encode(std::slice::from_ref(report), "producer").unwrap();
    Outgoing { exchange: results.clone(), routing_key: results, message }
}
