//! What settling may do and when, action by action.

use garenne_common::broker::DeliveryTag;
use garenne_common::{
    BatchId, Codec, Namespace, Payload, QueueName, ReplyGate, ReplyRule, Status, TaskId, TaskName,
    TaskResult, Timestamp,
};

use super::super::bundle::MAX_REPORTS;
use super::*;
use crate::inflight::{Begin, Key};

/// A core with one queue, and what it wants done.
struct Desk {
    core: SettleCore,
    inflight: Arc<Inflight>,
    lanes: Arc<Vec<Lane>>,
    delivered: u64,
}

impl Desk {
    fn new() -> Self {
        let topology = Topology::new(Namespace::new("g").unwrap());
        let replies = ReplyGate::new(ReplyRule::new(topology.namespace(), &[]));
        let signature =
            Signature { topology, max_body: 1024 * 1024, replies, worker: Arc::from("w") };
        let lanes = Arc::new(vec![Lane::new(QueueName::default())]);
        let inflight = Arc::<Inflight>::default();
        let core = SettleCore::new(Arc::clone(&lanes), Arc::clone(&inflight), &signature);
        Self { core, inflight, lanes, delivered: 0 }
    }

    /// A delivery of a task arrives and its attempt begins.
    fn begin(&mut self, id: &str) -> Begin {
        self.delivered += 1;
        let tag = DeliveryTag { epoch: 1, number: self.delivered };
        self.lanes[0].delivered(tag);
        self.inflight.begin(&key(id), DeliveryRef { queue: 0, tag })
    }

    fn settle(&mut self, id: &str, successor: Successor) -> Vec<Step> {
        self.settle_all([Settlement::bare(Subject::Attempt(key(id)), successor)])
    }

    fn settle_all(&mut self, settlements: impl IntoIterator<Item = Settlement>) -> Vec<Step> {
        let mut actions = vec![];
        for settlement in settlements {
            self.core.settle(settlement, &mut actions);
        }
        self.with_room(actions)
    }

    /// The publisher has room for everything.
    fn with_room(&mut self, mut actions: Vec<Action>) -> Vec<Step> {
        self.core.flush(&mut actions);
        let mut steps: Vec<_> = actions.into_iter().map(Step::Do).collect();
        let outbound = std::iter::from_fn(|| self.core.room()).map(Box::new);
        steps.extend(outbound.map(Step::Send));
        steps
    }

    fn answer(&mut self, ticket: Ticket, answer: Answer) -> Vec<Step> {
        let mut actions = vec![];
        self.core.answered(ticket, answer, &mut actions);
        self.with_room(actions)
    }
}

/// What the core wants done, with room at the publisher and without.
#[derive(Debug)]
enum Step {
    Do(Action),
    Send(Box<Outbound>),
}

fn key(id: &str) -> Key {
    Key { id: TaskId::new(id).unwrap(), attempt: 1, fence: 0 }
}

fn result(id: &str) -> Successor {
    let at = Timestamp::from_millis(1);
    Successor::Result(Report::Finished(TaskResult {
        id: TaskId::new(id).unwrap(),
        name: TaskName::new("a.b").unwrap(),
        queue: QueueName::default(),
        batch: None,
        status: Status::Succeeded,
        output: Some(Payload::encode(Codec::Json, &1).unwrap()),
        error: None,
        reason: None,
        attempt: 1,
        redelivered: false,
        worker: "w".into(),
        started_at: at,
        finished_at: at,
    }))
}

fn message() -> Successor {
    let (exchange, routing_key) = ("g.delay.00".to_owned(), "default".to_owned());
    Successor::message(Outgoing { exchange, routing_key, message: Message::default() })
}

/// The ticket of the only step, which publishes to this exchange.
#[track_caller]
fn published(steps: &[Step], to: &str) -> Ticket {
    let [Step::Send(outbound)] = steps else { panic!("not one publish to {to}: {steps:?}") };
    let Outbound::Successor { ticket, outgoing } = &**outbound else {
        panic!("a reply: {outbound:?}")
    };
    assert_eq!(outgoing.exchange, to);
    *ticket
}

/// Deliveries that are acknowledged, with `multiple`.
fn acked(steps: &[Step]) -> Vec<(u64, bool)> {
    let ack = |step: &Step| match step {
        Step::Do(Action::Acknowledge { ack, .. }) => Some((ack.tag.number, ack.multiple)),
        Step::Do(Action::HandBack(_)) | Step::Send(_) => None,
    };
    steps.iter().filter_map(ack).collect()
}

#[test]
fn a_result_leaves_at_once_and_is_acknowledged_when_it_is_confirmed() {
    let mut desk = Desk::new();
    desk.begin("a");
    let ticket = published(&desk.settle("a", result("a")), "g.results");
    assert!(!desk.core.is_idle());
    assert_eq!(acked(&desk.answer(ticket, Answer::Confirmed)), [(1, false)]);
    assert!(desk.core.is_idle());
    assert!(desk.answer(ticket, Answer::Confirmed).is_empty(), "an answer counts once");
}

#[test]
fn a_third_bundle_fills_until_one_of_two_is_confirmed() {
    let mut desk = Desk::new();
    for id in ["a", "b", "c", "d"] {
        desk.begin(id);
    }
    let first = published(&desk.settle("a", result("a")), "g.results");
    published(&desk.settle("b", result("b")), "g.results");
    assert!(desk.settle("c", result("c")).is_empty());
    assert!(desk.settle("d", result("d")).is_empty());
    let actions = desk.answer(first, Answer::Confirmed);
    assert_eq!(acked(&actions), [(1, false)]);
    let both = published(&actions[1..], "g.results");
    assert_eq!(acked(&desk.answer(both, Answer::Confirmed)), [(3, false), (4, false)]);
}

#[test]
fn full_bundles_do_not_wait_for_two_but_for_eight() {
    let mut desk = Desk::new();
    let fill = |desk: &mut Desk, number: usize| {
        let ids: Vec<String> = (0..MAX_REPORTS).map(|of| format!("{number}.{of}")).collect();
        for id in &ids {
            assert_eq!(desk.begin(id), Begin::Run);
        }
        let bare = |id: &String| Settlement::bare(Subject::Attempt(key(id)), result(id));
        desk.settle_all(ids.iter().map(bare))
    };
    let tickets: Vec<_> = (0..FULL_UNDER_WAY)
        .map(|number| published(&fill(&mut desk, number), "g.results"))
        .collect();
    desk.begin("one");
    assert!(desk.settle("one", result("one")).is_empty(), "one that is not full waits for less");
    assert!(fill(&mut desk, FULL_UNDER_WAY).is_empty());
    assert!(!desk.core.has_room());
    let actions = desk.answer(tickets[0], Answer::Confirmed);
    published(&actions[1..], "g.results");
    assert!(desk.core.has_room());
}

#[test]
fn large_results_that_end_together_go_in_bundles_that_fit_into_a_message() {
    let mut desk = Desk::new();
    let large = |id: &str| {
        let Successor::Result(Report::Finished(mut result)) = result(id) else { unreachable!() };
        result.output = Some(Payload { codec: Codec::Bincode, bytes: vec![0; 700_000].into() });
        Settlement::bare(Subject::Attempt(key(id)), Successor::Result(Report::Finished(result)))
    };
    let ids: Vec<String> = (0..40).map(|number| number.to_string()).collect();
    for id in &ids {
        assert_eq!(desk.begin(id), Begin::Run);
    }
    let mut actions = desk.settle_all(ids.iter().map(|id| large(id)));
    assert!(!desk.core.has_room());
    let mut acknowledged = 0;
    while !actions.is_empty() {
        let sent = actions.iter().filter_map(|step| match step {
            Step::Send(outbound) => Some(&**outbound),
            Step::Do(_) => None,
        });
        let published = sent.filter_map(|outbound| match outbound {
            Outbound::Successor { ticket, outgoing } => {
                Some((*ticket, outgoing.message.body.len()))
            }
            Outbound::Reply(_) => None,
        });
        let published: Vec<_> = published.collect();
        acknowledged = acked(&actions).last().map_or(acknowledged, |(number, _)| *number);
        actions = vec![];
        for (ticket, bytes) in published {
            assert!(bytes < 2_000_000, "{bytes}");
            actions.extend(desk.answer(ticket, Answer::Confirmed));
        }
    }
    assert_eq!(acknowledged, 40);
    assert!(desk.core.is_idle());
}

#[test]
fn what_is_no_result_does_not_wait_for_a_bundle() {
    let mut desk = Desk::new();
    for id in ["a", "b", "c"] {
        desk.begin(id);
    }
    desk.settle("a", result("a"));
    desk.settle("b", result("b"));
    let ticket = published(&desk.settle("c", message()), "g.delay.00");
    assert_eq!(acked(&desk.answer(ticket, Answer::Confirmed)), [(3, false)]);
}

#[test]
fn what_is_said_of_a_successor_is_said_when_it_is_confirmed() {
    let mut desk = Desk::new();
    desk.begin("a");
    let batch = BatchId::new("b").unwrap();
    let note = Report::BatchSealed { batch, count: 1, at: Timestamp::from_millis(1) };
    let retry = Settlement::bare(Subject::Attempt(key("a")), message());
    let actions = desk.settle_all([Settlement { notes: vec![note], ..retry }]);
    let ticket = published(&actions, "g.delay.00");
    let actions = desk.answer(ticket, Answer::Confirmed);
    assert_eq!(acked(&actions), [(1, false)]);
    published(&actions[1..], "g.results");
}

#[test]
fn an_adopted_delivery_is_settled_with_its_attempt_and_a_late_one_at_once() {
    let mut desk = Desk::new();
    assert_eq!((desk.begin("a"), desk.begin("a")), (Begin::Run, Begin::Adopted));
    let ticket = published(&desk.settle("a", result("a")), "g.results");
    assert_eq!(acked(&desk.answer(ticket, Answer::Confirmed)), [(2, true)]);

    assert_eq!(desk.begin("a"), Begin::Settled);
    let at = DeliveryRef { queue: 0, tag: DeliveryTag { epoch: 1, number: 3 } };
    let again = Settlement::bare(Subject::Delivery(at), Successor::Confirmed);
    assert_eq!(acked(&desk.settle_all([again])), [(3, false)]);
}

#[test]
fn without_a_successor_nothing_is_acknowledged() {
    let mut desk = Desk::new();
    for id in ["a", "b"] {
        desk.begin(id);
    }
    let never = published(&desk.settle("a", message()), "g.delay.00");
    let unknown = published(&desk.settle("b", result("b")), "g.results");
    assert!(desk.answer(unknown, Answer::Unknown).is_empty());
    let actions = desk.answer(never, Answer::Impossible);
    assert!(
        matches!(actions[..], [Step::Do(Action::HandBack(DeliveryRef { queue: 0, .. }))]),
        "{actions:?}"
    );
    assert_eq!(desk.begin("a"), Begin::Run, "what went back may run again");
}

#[test]
fn what_may_return_is_not_remembered_as_settled() {
    let mut desk = Desk::new();
    desk.begin("a");
    let parked = Settlement::bare(Subject::Attempt(key("a")), message());
    let actions = desk.settle_all([Settlement { then: Then::MayReturn, ..parked }]);
    let ticket = published(&actions, "g.delay.00");
    assert_eq!(acked(&desk.answer(ticket, Answer::Confirmed)), [(1, false)]);
    assert_eq!(desk.begin("a"), Begin::Run);
}

#[test]
fn without_room_nothing_is_published_and_confirms_are_heard() {
    let mut desk = Desk::new();
    for id in ["a", "b", "c"] {
        desk.begin(id);
    }
    let first = published(&desk.settle("a", message()), "g.delay.00");
    let mut actions = vec![];
    for id in ["b", "c"] {
        let retry = Settlement::bare(Subject::Attempt(key(id)), message());
        desk.core.settle(retry, &mut actions);
    }
    desk.core.flush(&mut actions);
    assert!(actions.is_empty() && desk.core.wants_room() && !desk.core.is_idle());
    desk.core.answered(first, Answer::Confirmed, &mut actions);
    assert!(matches!(actions[..], [Action::Acknowledge { .. }]), "{actions:?}");
    assert_eq!(desk.core.concluded(), 1);
    let Some(Outbound::Successor { ticket, .. }) = desk.core.room() else { panic!("b waits") };
    assert_eq!(acked(&desk.answer(ticket, Answer::Confirmed)), [(2, false)]);
    desk.core.no_more_room(&mut actions);
    assert!(!desk.core.wants_room(), "a publisher that has stopped is waited for by nobody");
}

#[test]
fn replies_that_find_no_room_stop_the_intake_of_settlements() {
    let mut desk = Desk::new();
    let mut actions = vec![];
    for number in 0.. {
        if !desk.core.has_room() {
            assert_eq!(number, MAX_OUTBOUND);
            break;
        }
        let to =
            ReplyTo { queue: "g.reply.x".into(), correlation_id: None, format: ReplyFormat::Plain };
        let Successor::Result(report) = result("a") else { unreachable!() };
        let reply = Some(Reply::Other(to, Box::new(report)));
        let only = Settlement::bare(Subject::Nothing, Successor::Confirmed);
        desk.core.settle(Settlement { reply, ..only }, &mut actions);
    }
}

#[test]
fn a_broker_that_answers_nothing_stops_the_intake_of_settlements() {
    let mut desk = Desk::new();
    let mut taken = 0;
    while desk.core.has_room() {
        let id = format!("t-{taken}");
        desk.begin(&id);
        desk.settle(&id, message());
        taken += 1;
    }
    assert_eq!(taken, MAX_UNDER_WAY);
}
