//! Intake: deliveries of one queue, and the slots that take them.
//!
//! A slot that is free takes the next in line, and goes on taking for a short turn, so that many quick
//! tasks cost no more than one start. What came before waits for its turn by itself, and a bundle that
//! came before is split. What waits too long in a bundle while others may have nothing to do is handed
//! on (docs/decisions/0017).

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::{self, Either};
use garenne_common::broker::{BrokerError, Consumer, Delivery, QueueStatus};
use garenne_common::bundling::Limits;
use garenne_common::failpoints::Protection;
use garenne_common::{TaskMessage, wire};
use tokio::time::MissedTickBehavior;

use crate::admit;
use crate::attempt::Pipeline;
use crate::fitness::Concern;
use crate::handler::Slot;
use crate::inflight::DeliveryRef;
use crate::line::{Surplus, Waited, Work};
use crate::settle::Subject;
use crate::suspect;

/// How long a slot takes one task after another before it stands in line with all others again:
/// suspects and other queues wait for slots, too.
const TURN: Duration = Duration::from_millis(5);
/// Deliveries that are taken in one go.
const AT_ONCE: usize = 64;
/// How long a task of a bundle waits here before somebody else may have it, if anybody is idle.
const PATIENCE: Duration = Duration::from_millis(100);
/// A task that is handed on travels with others that take so long together.
const SLICE: Limits = Limits { tasks: wire::bundle::MAX_TASKS, work: Duration::from_millis(10) };

/// Takes deliveries of one queue until the worker stops, and then hands back what did not begin.
pub(crate) async fn intake(pipeline: Arc<Pipeline>, queue: usize, mut consumer: Consumer) {
    let line = &pipeline.lines[queue];
    let mut news = pipeline.cancels.news();
    let mut tick = tokio::time::interval(PATIENCE);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut question = Either::Left(future::pending());
    loop {
        tokio::select! {
            biased;
            () = pipeline.stop.cancelled() => break,
            Ok(()) = news.changed() => Pipeline::end_cancelled(&pipeline, queue),
            Some(slot) = pipeline.doors.slots.one(),
                if !line.is_empty() && pipeline.fitness.may_begin() =>
            {
                Pipeline::begin(&pipeline, queue, slot);
            }
            _ = tick.tick() => {
                pipeline.note_epoch(queue, &consumer);
                pipeline.fitness.review(|concern| pipeline.is_usable(concern));
                Pipeline::give_away(&pipeline, queue);
                Pipeline::give_up_waiting(&pipeline, queue);
                let unanswered = matches!(question, Either::Right(_));
                if !unanswered && line.has_surplus(Waited::LongerHere(PATIENCE)) {
                    question = Either::Right(Box::pin(consumer.status()));
                }
            }
            answer = &mut question => {
                question = Either::Left(future::pending());
                pipeline.note_epoch(queue, &consumer);
                Pipeline::hand_on(&pipeline, queue, answer);
            }
            delivery = consumer.next() => match delivery {
                Some(delivery) => {
                    Pipeline::receive(&pipeline, queue, delivery);
                    let more = std::iter::from_fn(|| consumer.try_next()).take(AT_ONCE);
                    more.for_each(|delivery| Pipeline::receive(&pipeline, queue, delivery));
                }
                None => break,
            },
        }
    }
    // It may hold the lock of the connection that the consumer itself needs, and nobody polls it now.
    drop(question);
    consumer.stop();
    // First all that is on its way: while the broker still sends, what is handed back would come here
    // again, and then bear the mark of a redelivery.
    let mut suspects = vec![];
    while let Some(delivery) = consumer.next().await {
        pipeline.lanes[queue].delivered(delivery.tag);
        line.note_epoch(delivery.tag.epoch);
        if suspect::is_conspicuous(&delivery.message, delivery.redelivered) {
            suspects.push(delivery);
        } else {
            line.push(delivery);
        }
    }
    pipeline.note_epoch(queue, &consumer);
    pipeline.hand_back_line(queue).await;
    for suspect in &suspects {
        pipeline.hand_back(queue, suspect).await;
    }
}

impl Pipeline {
    fn receive(this: &Arc<Self>, queue: usize, delivery: Delivery) {
        this.lanes[queue].delivered(delivery.tag);
        let line = &this.lines[queue];
        line.note_epoch(delivery.tag.epoch);
        let came_before = suspect::is_conspicuous(&delivery.message, delivery.redelivered);
        if wire::bundle::is_one(&delivery.message) {
            if admit::must_be_split(came_before) {
                Self::split(this, queue, delivery);
            } else {
                line.push(delivery);
            }
        } else if came_before {
            // It waits for its turn by itself, so that nothing else has to wait behind it.
            Self::begin_alone(this, queue, Work::Alone(Box::new(delivery)));
        } else {
            line.push(delivery);
        }
    }

    /// Lets a slot take what is in line.
    fn begin(this: &Arc<Self>, queue: usize, slot: Slot) {
        let pipeline = Arc::clone(this);
        this.attempts.spawn(async move { pipeline.take_turn(queue, slot).await });
    }

    async fn take_turn(&self, queue: usize, mut slot: Slot) {
        let begun = Instant::now();
        while let Some(work) = self.lines[queue].next(&self.lanes[queue]) {
            match self.attempt(queue, work, Some(slot)).await {
                Some(free) if begun.elapsed() < TURN && self.begins() => slot = free,
                Some(_) | None => return,
            }
        }
    }

    /// Whether attempts begin at all.
    fn begins(&self) -> bool {
        !self.stop.is_cancelled() && !self.fitness.is_paused()
    }

    /// Lets something go ahead that has no slot yet, or needs none.
    fn begin_alone(this: &Arc<Self>, queue: usize, work: Work) {
        let pipeline = Arc::clone(this);
        this.attempts.spawn(async move {
            drop(pipeline.attempt(queue, work, None).await);
        });
    }

    /// Lets what was cancelled while it waited go ahead without a slot, since it will not run.
    fn end_cancelled(this: &Arc<Self>, queue: usize) {
        let wanted = |task: &_| this.cancels.wish(task).is_some();
        for work in this.lines[queue].take(&this.lanes[queue], wanted) {
            Self::begin_alone(this, queue, work);
        }
    }

    /// A bundle that was delivered before, perhaps to a worker that died of one of its tasks.
    fn split(this: &Arc<Self>, queue: usize, delivery: Delivery) {
        let pipeline = Arc::clone(this);
        this.attempts.spawn(async move {
            // One at a time: all that is on its way out of bundles is in memory message by message.
            let Ok(_turn) = pipeline.splits.acquire().await else { return };
            let lane = &pipeline.lanes[queue];
            let Ok(tasks) = wire::bundle::decode(&delivery.message, &lane.queue) else {
                let work = Work::Alone(Box::new(delivery));
                return drop(pipeline.attempt(queue, work, None).await);
            };
            tracing::info!(tasks = tasks.len(), "a bundle came again; its tasks go on one by one");
            lane.divided(delivery.tag, tasks.len());
            let at = DeliveryRef { queue, tag: delivery.tag };
            let app_id = delivery.message.properties.app_id.unwrap_or_default();
            let (inflight, signature) = (&pipeline.inflight, &pipeline.signature);
            for settlement in admit::split(&tasks, at, &app_id, inflight, signature) {
                pipeline.settle(settlement).await;
            }
        });
    }

    /// Sends what waits here to the delay queues, from where any worker may take it, while this one has no
    /// room for it. Bundles are handed on without that.
    fn give_away(this: &Arc<Self>, queue: usize) {
        let Some(after) = this.fitness.give_away(queue) else { return };
        let singles = this.lines[queue].take_singles();
        tracing::debug!(tasks = singles.len(), "given away for lack of resources");
        let pipeline = Arc::clone(this);
        this.attempts.spawn(async move {
            for delivery in singles {
                pipeline.put_off(queue, Work::Alone(Box::new(delivery)), after).await;
            }
        });
    }

    fn is_usable(&self, concern: &Concern) -> bool {
        match concern {
            Concern::Command(name) => self.registry.find(name).is_none_or(|it| it.is_usable()),
            Concern::Isolation => true,
        }
    }

    /// What was delivered over a channel that is gone comes again, and must not be sent on from here.
    fn note_epoch(&self, queue: usize, consumer: &Consumer) {
        match consumer.epoch() {
            Some(epoch) => self.lines[queue].note_epoch(epoch),
            None => self.lines[queue].void(),
        }
    }

    /// Sends back what waits so long in bundles that the broker might lose its patience: it would close
    /// the channel, and all that was delivered over it would come again.
    fn give_up_waiting(this: &Arc<Self>, queue: usize) {
        let long = Waited::Longer(this.lease.patience() / 4);
        if this.lines[queue].has_surplus(long) {
            let surplus = this.lines[queue].surplus(&this.lanes[queue], long);
            let pipeline = Arc::clone(this);
            this.attempts.spawn(async move { pipeline.send_back(queue, surplus).await });
        }
    }

    /// Gives others what waits too long here, if the broker's word on the queue allows that somebody is
    /// idle: nothing waits there, and we are not its only worker.
    fn hand_on(this: &Arc<Self>, queue: usize, answer: Result<QueueStatus, BrokerError>) {
        if !answer.is_ok_and(|status| status.ready == 0 && status.consumers > 1) {
            return;
        }
        let waited = Waited::LongerHere(PATIENCE);
        let surplus = this.lines[queue].surplus(&this.lanes[queue], waited);
        let pipeline = Arc::clone(this);
        this.attempts.spawn(async move { pipeline.send_back(queue, surplus).await });
    }

    async fn send_back(&self, queue: usize, surplus: Vec<Surplus>) {
        let queue = &self.lanes[queue].queue;
        // What has not been seen to be quick goes alone.
        let estimate = |name: &_| self.pace.estimate(name).unwrap_or(SLICE.work);
        for Surplus { bundle, app_id, tasks } in surplus {
            tracing::debug!(tasks = tasks.len(), %queue, "handed on");
            for part in SLICE.divide(tasks, |task| task, estimate) {
                let part: Vec<&TaskMessage> = part.iter().map(|task| &**task).collect();
                self.settle(self.signature.send_back(bundle, &part, &app_id, queue)).await;
            }
        }
    }

    /// Hands back everything that waits. A bundle goes back as a new one, or it would have to be split.
    pub(crate) async fn hand_back_line(&self, queue: usize) {
        if !Protection::DrainHandBack.is_enabled() {
            return;
        }
        let line = &self.lines[queue];
        let bundles = line.surplus(&self.lanes[queue], Waited::Any);
        self.send_back(queue, bundles).await;
        for delivery in line.drain() {
            self.hand_back(queue, &delivery).await;
        }
    }

    async fn hand_back(&self, queue: usize, delivery: &Delivery) {
        if !Protection::DrainHandBack.is_enabled() {
            return;
        }
        let subject = Subject::Delivery(DeliveryRef { queue, tag: delivery.tag });
        let (message, queue) = (&delivery.message, &self.lanes[queue].queue);
        self.settle(self.signature.hand_back_message(subject, message, queue)).await;
    }
}
