//! The line: what one queue has delivered and what waits here for a slot.
//!
//! A bundle of tasks stays closed until its turn comes, so what waits costs no more memory than its
//! messages. Shared by intake, which fills it, and by attempts that have ended, whose slots take the
//! next from it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use garenne_common::broker::Delivery;
use garenne_common::{TaskMessage, wire};

use crate::inflight::DeliveryRef;
use crate::settle::Lane;

/// What waits for a slot.
#[derive(Debug)]
pub(crate) enum Work {
    /// A message with one task, or one that cannot be read.
    Alone(Box<Delivery>),
    /// A task of a bundle.
    Member(Member),
}

/// A task of a bundle.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) task: Arc<TaskMessage>,
    /// The bundle.
    pub(crate) bundle: DeliveryRef,
    pub(crate) app_id: Arc<str>,
    arrived: Arrived,
}

/// When a bundle came, and whether some worker has passed it on already.
#[derive(Debug, Clone, Copy)]
struct Arrived {
    at: Instant,
    handed_on: bool,
}

/// How long tasks of a bundle have waited.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Waited {
    /// Any time at all.
    Any,
    /// Longer than this.
    Longer(Duration),
    /// Longer than this, and nobody has passed them on before.
    LongerHere(Duration),
}

impl Waited {
    fn holds(self, arrived: &Arrived) -> bool {
        match self {
            Self::Any => true,
            Self::Longer(than) => arrived.at.elapsed() > than,
            Self::LongerHere(than) => !arrived.handed_on && arrived.at.elapsed() > than,
        }
    }
}

/// Tasks of one bundle that waited too long here.
pub(crate) struct Surplus {
    pub(crate) bundle: DeliveryRef,
    pub(crate) app_id: Arc<str>,
    pub(crate) tasks: Vec<Arc<TaskMessage>>,
}

/// Deliveries of one queue that wait for a slot; as many as the prefetch lets come.
#[derive(Debug)]
pub(crate) struct Line {
    /// Of which of the worker's queues, by position.
    queue: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Tasks of bundles whose turn has come; they go first.
    open: VecDeque<Member>,
    /// Messages, bundles among them, in the order of their arrival.
    closed: VecDeque<(Box<Delivery>, Arrived)>,
    epoch: u64,
}

impl Line {
    pub(crate) fn new(queue: usize) -> Self {
        Self { queue, state: Mutex::default() }
    }

    /// A delivery of this epoch arrived. A new epoch voids what waits of the old one: it comes again.
    pub(crate) fn note_epoch(&self, epoch: u64) {
        let mut state = self.lock();
        if state.epoch != epoch {
            *state = State { epoch, ..State::default() };
        }
    }

    /// Forgets all that waits: it was delivered over a channel that is gone.
    pub(crate) fn void(&self) {
        *self.lock() = State::default();
    }

    /// Takes a delivery in.
    pub(crate) fn push(&self, delivery: Delivery) {
        let handed_on = wire::bundle::is_handed_on(&delivery.message);
        let arrived = Arrived { at: Instant::now(), handed_on };
        self.lock().closed.push_back((Box::new(delivery), arrived));
    }

    pub(crate) fn is_empty(&self) -> bool {
        let state = self.lock();
        state.open.is_empty() && state.closed.is_empty()
    }

    /// How many tasks of open bundles and how many messages, bundles among them, wait.
    pub(crate) fn len(&self) -> (usize, usize) {
        let state = self.lock();
        (state.open.len(), state.closed.len())
    }

    /// The next in line.
    pub(crate) fn next(&self, lane: &Lane) -> Option<Work> {
        let (delivery, arrived) = {
            let mut state = self.lock();
            if let Some(member) = state.open.pop_front() {
                return Some(Work::Member(member));
            }
            state.closed.pop_front()?
        };
        // Opened outside the lock, in which others would wait.
        let mut members = match self.open(delivery, arrived, lane) {
            Ok(members) => members,
            Err(alone) => return Some(Work::Alone(alone)),
        };
        let first = members.pop_front();
        let mut state = self.lock();
        // Between two locks the connection may have been lost.
        if first.as_ref().is_some_and(|member| member.bundle.tag.epoch == state.epoch) {
            state.open.append(&mut members);
        }
        first.map(Work::Member)
    }

    /// Takes out every task that waits and for which `wanted` holds.
    pub(crate) fn take(&self, lane: &Lane, wanted: impl Fn(&TaskMessage) -> bool) -> Vec<Work> {
        let mut state = self.lock();
        let mut taken = vec![];
        for (delivery, arrived) in std::mem::take(&mut state.closed) {
            if wire::bundle::is_one(&delivery.message) {
                self.sort_bundle((delivery, arrived), lane, &wanted, &mut state);
            } else if is_wanted(&delivery, lane, &wanted) {
                taken.push(Work::Alone(delivery));
            } else {
                state.closed.push_back((delivery, arrived));
            }
        }
        let members = std::mem::take(&mut state.open).into_iter();
        let (found, rest): (VecDeque<_>, _) = members.partition(|member| wanted(&member.task));
        state.open = rest;
        taken.extend(found.into_iter().map(Work::Member));
        taken
    }

    /// A bundle with a wanted task in it is opened before its turn; any other one stays in line.
    fn sort_bundle(
        &self,
        (delivery, arrived): (Box<Delivery>, Arrived),
        lane: &Lane,
        wanted: impl Fn(&TaskMessage) -> bool,
        state: &mut State,
    ) {
        let tasks = wire::bundle::decode(&delivery.message, &lane.queue);
        if !tasks.is_ok_and(|tasks| tasks.iter().any(wanted)) {
            return state.closed.push_back((delivery, arrived));
        }
        match self.open(delivery, arrived, lane) {
            Ok(mut members) => state.open.append(&mut members),
            Err(alone) => state.closed.push_back((alone, arrived)),
        }
    }

    /// Whether there is any [`surplus`](Self::surplus) of this kind.
    pub(crate) fn has_surplus(&self, of: Waited) -> bool {
        let state = self.lock();
        state.open.iter().any(|member| of.holds(&member.arrived))
            || state.closed.iter().any(|(delivery, arrived)| {
                of.holds(arrived) && wire::bundle::is_one(&delivery.message)
            })
    }

    /// Takes out the tasks of bundles that have waited so long.
    pub(crate) fn surplus(&self, lane: &Lane, of: Waited) -> Vec<Surplus> {
        let long = |arrived: &Arrived| of.holds(arrived);
        let mut surplus: Vec<Surplus> = vec![];
        let mut state = self.lock();
        let (mut members, mut kept) = (VecDeque::new(), VecDeque::new());
        for (delivery, arrived) in std::mem::take(&mut state.closed) {
            if !(long(&arrived) && wire::bundle::is_one(&delivery.message)) {
                kept.push_back((delivery, arrived));
                continue;
            }
            match self.open(delivery, arrived, lane) {
                Ok(mut opened) => members.append(&mut opened),
                Err(alone) => kept.push_back((alone, arrived)),
            }
        }
        state.closed = kept;
        let open = std::mem::take(&mut state.open).into_iter();
        let (tired, rest): (VecDeque<_>, VecDeque<_>) =
            open.partition(|member| long(&member.arrived));
        state.open = rest;
        for Member { task, bundle, app_id, .. } in tired.into_iter().chain(members) {
            match surplus.last_mut().filter(|last| last.bundle == bundle) {
                Some(last) => last.tasks.push(task),
                None => surplus.push(Surplus { bundle, app_id, tasks: vec![task] }),
            }
        }
        surplus
    }

    /// Takes out every message that waits and is no bundle, and leaves the bundles.
    pub(crate) fn take_singles(&self) -> Vec<Delivery> {
        let mut state = self.lock();
        let closed = std::mem::take(&mut state.closed).into_iter();
        let (bundles, singles): (VecDeque<_>, VecDeque<_>) =
            closed.partition(|(delivery, _)| wire::bundle::is_one(&delivery.message));
        state.closed = bundles;
        singles.into_iter().map(|(delivery, _)| *delivery).collect()
    }

    /// Takes out every message that waits and is no bundle.
    pub(crate) fn drain(&self) -> Vec<Delivery> {
        self.lock().closed.drain(..).map(|(delivery, _)| *delivery).collect()
    }

    /// The tasks of a bundle; the delivery itself if it is none, or none that can be read.
    fn open(
        &self,
        delivery: Box<Delivery>,
        arrived: Arrived,
        lane: &Lane,
    ) -> Result<VecDeque<Member>, Box<Delivery>> {
        if !wire::bundle::is_one(&delivery.message) {
            return Err(delivery);
        }
        let Ok(tasks) = wire::bundle::decode(&delivery.message, &lane.queue) else {
            return Err(delivery);
        };
        lane.divided(delivery.tag, tasks.len());
        let bundle = DeliveryRef { queue: self.queue, tag: delivery.tag };
        let app_id: Arc<str> = delivery.message.properties.app_id.unwrap_or_default().into();
        let member =
            |task| Member { task: Arc::new(task), bundle, app_id: Arc::clone(&app_id), arrived };
        Ok(tasks.into_iter().map(member).collect())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_wanted(delivery: &Delivery, lane: &Lane, wanted: impl Fn(&TaskMessage) -> bool) -> bool {
    match wire::task::decode(&delivery.message, &lane.queue) {
        Ok(Some(task)) => wanted(&task),
        Ok(None) | Err(_) => false,
    }
}
