//! What really happened, written down beside the system, and the promises held against it.
//!
//! The books see what the broker made durable, what the handlers ran and what producers were told.
//! A promise that breaks is an `Err` that names it.

use std::collections::{BTreeMap, HashMap, HashSet};

use garenne_common::outcome::{DeadReason, Status};
use garenne_common::wire::lease::execution_of;
use garenne_common::wire::{self, BatchState, DeadLetter, HeaderValue, Lease, Message, Report};
use garenne_common::{BatchId, TaskId};
use garenne_worker::protocol::AttemptKey;

use super::ledger::Store;
use super::script::{Behaviour, Script, Work, id_of};

/// A task and an attempt, as far as a message says.
type Key = (String, u32);

#[derive(Default)]
pub(super) struct Books {
    work: HashMap<String, Work>,
    /// Submissions that were told `Ok`, by number.
    confirmed: HashSet<u32>,
    /// Batches whose seal was told `Ok`, with their size and when.
    sealed: BTreeMap<BatchId, (u64, u64)>,
    opened: HashSet<BatchId>,
    /// Durable once: results, tasks, dead letters.
    results: HashSet<Key>,
    tasks: HashSet<Key>,
    dead: HashSet<Key>,
    leases: HashSet<Key>,
    /// Ids that tasks without one got, by the number of the task.
    named: HashMap<u32, Vec<String>>,
    /// How often a message got into a queue of tasks, and how often that may happen needlessly.
    copies: HashMap<Key, u32>,
    spare: HashMap<Key, u32>,
    returns: HashMap<Key, u32>,
    executions: HashMap<Key, u32>,
    not_before: HashMap<Key, u64>,
    told: HashSet<String>,
    /// Faults that may make something happen twice.
    pub(super) faults: u32,
}

fn key(message: &Message) -> Option<Key> {
    let attempt = match message.header("x-garenne-attempt") {
        Some(HeaderValue::Int(attempt)) => u32::try_from(*attempt).unwrap_or(1),
        _ => 1,
    };
    id_of(message).map(|id| (id.to_owned(), attempt))
}

/// The number of a task, which is its arguments.
pub(super) fn number(message: &Message) -> Option<u32> {
    std::str::from_utf8(&message.body).ok()?.parse().ok()
}

impl Books {
    pub(super) fn new(script: &Script) -> Self {
        let named = script.work().filter(|work| work.behaviour != Behaviour::Nameless);
        let work = named.map(|work| (work.id().to_string(), work.clone())).collect();
        Self { work, ..Self::default() }
    }

    pub(super) fn work(&self, id: &TaskId) -> Option<&Work> {
        self.work.get(id.as_str())
    }

    /// What to call an attempt.
    pub(super) fn label(&self, key: &AttemptKey) -> String {
        let number = self.work(&key.id).map_or(0, |work| work.number);
        format!("task {number} attempt {} fence {}", key.attempt, key.fence)
    }

    /// A message became durable.
    pub(super) fn durable(&mut self, queue: &str, message: &Message) -> Result<(), String> {
        if Lease::is_one(message) && !DeadLetter::is_one(message) {
            self.leases.extend(key(message));
            return Ok(());
        }
        if queue == "sim.results" {
            for report in wire::report::decode(message).map_err(|error| error.to_string())? {
                if let Report::Finished(result) | Report::FinishedUnderLease { result, .. } = report
                {
                    self.results.insert((result.id.to_string(), result.attempt));
                }
            }
            return Ok(());
        }
        let Some(key) = key(message) else { return Ok(()) };
        if queue == "sim.dead" {
            self.dead.insert(key);
            return Ok(());
        }
        if queue.contains(".tasks.") {
            *self.copies.entry(key.clone()).or_default() += 1;
            // A worker has given an id to a task without one.
            if !self.work.contains_key(&key.0)
                && let Some(number) = number(message)
            {
                self.named.entry(number).or_default().push(key.0.clone());
                let work = Work {
                    number,
                    behaviour: Behaviour::Nameless,
                    max_attempts: 1,
                    batch: None,
                    queue: "default",
                    leased: false,
                    replied: false,
                };
                self.work.insert(key.0.clone(), work);
            }
        }
        self.tasks.insert(key);
        Ok(())
    }

    /// A notice reached those who listen.
    pub(super) fn notice(&mut self, message: &Message, store: &Store) -> Result<(), String> {
        let id = id_of(message).unwrap_or_default().to_owned();
        let over = match id.split_once('.') {
            Some(("batch", id)) => BatchId::new(id).ok().is_some_and(|id| {
                store.batches.get(&id).is_some_and(|batch| batch.state.is_final())
            }),
            Some((_, id)) => TaskId::new(id).is_ok_and(|id| store.results.contains_key(&id)),
            None => false,
        };
        self.told.insert(id.clone());
        if over { Ok(()) } else { Err(format!("I5: the notice {id} tells what is not so")) }
    }

    /// The broker forgot a message because a client acknowledged it.
    pub(super) fn gone(&self, queue: &str, message: &Message, store: &Store) -> Result<(), String> {
        if queue.contains(".tasks.") {
            let succeeded = match key(message) {
                Some((id, attempt)) => {
                    let next = (id.clone(), attempt + 1);
                    let this = (id, attempt);
                    self.tasks.contains(&next)
                        || self.results.contains(&this)
                        || self.dead.contains(&this)
                        || self.leases.contains(&this)
                }
                None => number(message).is_some_and(|number| self.named.contains_key(&number)),
            };
            let key = key(message);
            return verify(succeeded, || format!("{key:?} is gone without a successor"));
        }
        if Lease::is_one(message) && !DeadLetter::is_one(message) {
            let Lease { id, fence, .. } = Lease::decode(message).map_err(|e| e.to_string())?;
            let known = store.leases.get(&id);
            let kept = known.is_some_and(|known| known.lease.fence.number >= fence.number);
            return verify(kept || store.results.contains_key(&id), || format!("{id}: no lease"));
        }
        if queue == "sim.results" {
            let reports = wire::report::decode(message).map_err(|error| error.to_string())?;
            let lost = reports.iter().find(|report| !is_kept(report, store));
            return verify(lost.is_none(), || format!("{lost:?} is gone and not in the store"));
        }
        let id = DeadLetter::decode(message).id;
        // The word of an execution whose lease has passed on counts for nothing.
        let outdated = execution_of(message).is_some() && store.leases.contains_key(&id);
        let kept = outdated || store.letters.contains_key(&id);
        verify(kept, || format!("the letter of {id} is gone"))
    }

    pub(super) fn returned(&mut self, message: &Message) {
        count(&mut self.returns, key(message));
    }

    /// A message may come once more than its sender meant.
    pub(super) fn may_double(&mut self, message: &Message) {
        count(&mut self.spare, key(message));
    }

    /// A handler runs.
    pub(super) fn runs(&mut self, id: &TaskId, attempt: u32, now: u64) -> Result<(), String> {
        let key = (id.to_string(), attempt);
        let Some(work) = self.work.get(&key.0) else { return Err(format!("I2: {id} is nobody's")) };
        verify(attempt <= work.max_attempts, || format!("I9: attempt {attempt} of {work:?}"))?;
        let early = self.not_before.get(&key).is_some_and(|at| now < *at);
        verify(!early, || format!("attempt {attempt} of {id} started too early"))?;
        *self.executions.entry(key.clone()).or_default() += 1;
        let of = |map: &HashMap<Key, u32>, key: &Key| map.get(key).copied().unwrap_or_default();
        let (executions, copies) = (of(&self.executions, &key), of(&self.copies, &key));
        verify(executions <= copies + of(&self.returns, &key), || {
            format!("I9: {executions} executions of {key:?}, {copies} copies")
        })?;
        let before = (key.0.clone(), attempt.saturating_sub(1));
        let reasons = if attempt == 1 { 1 } else { of(&self.executions, &before) };
        let nameless = work.behaviour == Behaviour::Nameless;
        verify(nameless || copies <= reasons + of(&self.spare, &key), || {
            format!("I9: {copies} copies of {key:?} for {reasons} executions before")
        })
    }

    /// A worker decided to retry after a wait.
    pub(super) fn waits(&mut self, id: &TaskId, attempt: u32, until: u64) {
        let at = self.not_before.entry((id.to_string(), attempt)).or_insert(until);
        *at = (*at).min(until);
    }

    pub(super) fn submitted(&mut self, work: &Work) {
        self.confirmed.insert(work.number);
    }

    pub(super) fn was_opened(&mut self, batch: BatchId) {
        self.opened.insert(batch);
    }

    pub(super) fn was_sealed(&mut self, batch: BatchId, count: u64, now: u64) {
        self.sealed.insert(batch, (count, now));
    }

    /// A transaction took effect: final records stay as they are (I3), and none is made up (I2).
    pub(super) fn committed(&self, before: &Store, after: &Store) -> Result<(), String> {
        for (id, result) in &before.results {
            verify(after.results.get(id) == Some(result), || format!("I3: {id} ended again"))?;
        }
        for (id, result) in &after.results {
            if before.results.contains_key(id) {
                continue;
            }
            let Some(work) = self.work.get(id.as_str()) else {
                return Err(format!("I2: a record of {id}, which nobody submitted"));
            };
            let may = work.may_end(result.status, result.reason, result.attempt);
            verify(may, || format!("{work:?} ended as {result:?}"))?;
        }
        Ok(())
    }

    /// All is quiet: everything promised must be so.
    pub(super) fn finish(&self, script: &Script, store: &Store) -> Result<(), String> {
        for work in script.work().filter(|work| self.confirmed.contains(&work.number)) {
            self.ended(work, store)?;
        }
        self.batches(store)?;
        for (key, times) in &store.announced {
            verify(*times == 1, || format!("I5: {times} notices {key}"))?;
            verify(self.told.contains(key), || format!("I5: nobody was told {key}"))?;
        }
        if self.faults == 0 {
            let again = self.executions.iter().find(|(_, times)| **times > 1);
            verify(again.is_none(), || format!("{again:?} ran again without any fault"))?;
        }
        Ok(())
    }

    /// I1.
    fn ended(&self, work: &Work, store: &Store) -> Result<(), String> {
        let kept = match work.behaviour {
            Behaviour::Unknown => {
                store.letters.get(&work.id()) == Some(&(DeadReason::UnknownTask, false))
            }
            Behaviour::Nameless => {
                let ids = self.named.get(&work.number).into_iter().flatten();
                let mut ids = ids.filter_map(|id| TaskId::new(id).ok());
                ids.any(|id| store.results.contains_key(&id))
            }
            _ => store.results.contains_key(&work.id()),
        };
        verify(kept, || format!("I1: {work:?} was confirmed and has no final record"))?;
        let failed = store.results.get(&work.id()).filter(|r| r.status == Status::Failed);
        let letter = failed.is_none() || store.letters.contains_key(&work.id());
        verify(letter, || format!("I1: {work:?} failed and is no dead letter"))
    }

    /// I5.
    fn batches(&self, store: &Store) -> Result<(), String> {
        for id in self.opened.iter().chain(self.sealed.keys()) {
            verify(store.batches.contains_key(id), || format!("I5: {id} has no record"))?;
        }
        for (id, batch) in &store.batches {
            verify(batch.state.is_final(), || format!("I5: {batch:?} never ended"))?;
            let key = format!("batch.{id}");
            verify(store.announced.contains_key(&key), || format!("I5: no notice {key}"))?;
            let members = store.results.values().filter(|result| result.batch.as_ref() == Some(id));
            let mut counts = [0; 3];
            members.for_each(|result| counts[result.status as usize] += 1);
            let counted = [batch.succeeded, batch.failed, batch.cancelled];
            verify(counts == counted, || format!("I5: {batch:?} counted {counts:?}"))?;
            let Some((size, at)) = self.sealed.get(id) else { continue };
            let late = batch.finished_at.is_some_and(|end| end.as_millis() <= *at);
            let state = batch.state == BatchState::Done || late;
            verify(state, || format!("I5: {batch:?} was sealed in time"))?;
            let total = batch.total == Some(*size) && counted.iter().sum::<u64>() == *size;
            verify(total, || format!("I5: {batch:?} has {size} members"))?;
        }
        Ok(())
    }
}

fn is_kept(report: &Report, store: &Store) -> bool {
    match report {
        Report::Finished(result) => store.results.contains_key(&result.id),
        Report::FinishedUnderLease { result, .. } => {
            store.results.contains_key(&result.id) || store.leases.contains_key(&result.id)
        }
        // The first is about a lease and does not carry it, the second is sent by collectors only.
        Report::Lease(_) | Report::Conflict { .. } => true,
        Report::Retrying(note) => store.attempts.contains(&(note.id.clone(), note.attempt)),
        Report::BatchOpened { batch, .. } => store.batches.contains_key(batch),
        Report::BatchSealed { batch, .. } => {
            store.batches.get(batch).is_some_and(|batch| batch.total.is_some())
        }
    }
}

fn count(map: &mut HashMap<Key, u32>, key: Option<Key>) {
    if let Some(key) = key {
        *map.entry(key).or_default() += 1;
    }
}

pub(super) fn verify(holds: bool, otherwise: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(otherwise()) }
}
