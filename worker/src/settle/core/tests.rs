//! What settling may do and when, action by action.

use garenne_common::broker::DeliveryTag;
use garenne_common::{
    BatchId, Codec, Namespace, Payload, QueueName, ReplyGate, ReplyRule, Status, TaskId, TaskName,
    TaskResult, Timestamp,
};

use super::super::reports::MAX_REPORTS;
use super::*;
use crate::run::known_attempts::{AttemptKey, Registration};

/// A core with one queue.
struct Fixture {
    core: SettleCore,
    known: Arc<KnownAttempts>,
    unacked: Arc<UnackedDeliveries>,
    delivered: u64,
}

impl Fixture {
    fn new() -> Self {
        let topology = Topology::new(Namespace::new("g").unwrap());
        let replies = ReplyGate::new(ReplyRule::new(topology.namespace(), &[]));
        let worker = Arc::from("w");
        let settlements = SettlementBuilder { topology, max_body: 1024 * 1024, replies, worker };
        let unacked = Arc::<UnackedDeliveries>::default();
        let known = Arc::<KnownAttempts>::default();
        let core = SettleCore::new(vec![Arc::clone(&unacked)], Arc::clone(&known), &settlements);
        Self { core, known, unacked, delivered: 0 }
    }

    /// Delivers a task and registers its attempt.
    fn deliver(&mut self, id: &str) -> Registration {
        self.delivered += 1;
        let tag = DeliveryTag { epoch: 1, number: self.delivered };
        self.unacked.delivered(tag);
        self.known.register(&key(id), DeliveryRef { queue: QueueIndex(0), tag })
    }

    fn settle(&mut self, id: &str, successor: Successor) -> Vec<Step> {
        self.settle_all([Settlement::new(Subject::Ended(key(id)), successor)])
    }

    fn settle_all(&mut self, settlements: impl IntoIterator<Item = Settlement>) -> Vec<Step> {
        let mut actions = vec![];
        for settlement in settlements {
            self.core.settle(settlement, &mut actions);
        }
        self.with_room(actions)
    }

    /// Publishes everything.
    fn with_room(&mut self, mut actions: Vec<Action>) -> Vec<Step> {
        self.core.flush(&mut actions);
        let mut steps: Vec<_> = actions.into_iter().map(Step::Do).collect();
        let outbound = std::iter::from_fn(|| self.core.next_message()).map(Box::new);
        steps.extend(outbound.map(Step::Send));
        steps
    }

    fn confirm(&mut self, ticket: Ticket) -> Vec<Step> {
        self.end(ticket, &Ok(()))
    }

    fn end(&mut self, ticket: Ticket, result: &Result<(), BrokerError>) -> Vec<Step> {
        let mut actions = vec![];
        self.core.confirm(ticket, result, &mut actions);
        self.with_room(actions)
    }
}

/// What the core asks for.
#[derive(Debug)]
enum Step {
    Do(Action),
    Send(Box<Outbound>),
}

fn key(id: &str) -> AttemptKey {
    AttemptKey { id: TaskId::new(id).unwrap(), attempt: 1, fence: 0 }
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
        fingerprint: None,
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
    let Outbound { ticket: Some(ticket), outgoing } = &**outbound else {
        panic!("a reply: {outbound:?}")
    };
    assert_eq!(outgoing.exchange, to);
    *ticket
}

/// Deliveries that are acknowledged, with `multiple`.
fn acked(steps: &[Step]) -> Vec<(u64, bool)> {
    let ack = |step: &Step| match step {
        Step::Do(Action::Acknowledge { ack, .. }) => Some((ack.tag.number, ack.multiple)),
        Step::Do(Action::Requeue(_)) | Step::Send(_) => None,
    };
    steps.iter().filter_map(ack).collect()
}

#[test]
fn a_result_is_published_at_once_and_acknowledged_after_its_confirm() {
    let mut fixture = Fixture::new();
    fixture.deliver("a");
    let ticket = published(&fixture.settle("a", result("a")), "g.results");
    assert!(!fixture.core.is_idle());
    assert_eq!(acked(&fixture.confirm(ticket)), [(1, false)]);
    assert!(fixture.core.is_idle());
    assert!(fixture.confirm(ticket).is_empty(), "a confirm counts once");
}

#[test]
fn a_third_bundle_is_filled_until_one_of_two_is_confirmed() {
    let mut fixture = Fixture::new();
    for id in ["a", "b", "c", "d"] {
        fixture.deliver(id);
    }
    let first = published(&fixture.settle("a", result("a")), "g.results");
    published(&fixture.settle("b", result("b")), "g.results");
    assert!(fixture.settle("c", result("c")).is_empty());
    assert!(fixture.settle("d", result("d")).is_empty());
    let actions = fixture.confirm(first);
    assert_eq!(acked(&actions), [(1, false)]);
    let both = published(&actions[1..], "g.results");
    assert_eq!(acked(&fixture.confirm(both)), [(3, false), (4, false)]);
}

#[test]
fn up_to_eight_full_bundles_are_unconfirmed_at_the_same_time() {
    let mut fixture = Fixture::new();
    let fill = |fixture: &mut Fixture, number: usize| {
        let ids: Vec<String> = (0..MAX_REPORTS).map(|of| format!("{number}.{of}")).collect();
        for id in &ids {
            assert_eq!(fixture.deliver(id), Registration::New);
        }
        let bare = |id: &String| Settlement::new(Subject::Ended(key(id)), result(id));
        fixture.settle_all(ids.iter().map(bare))
    };
    let tickets: Vec<_> = (0..MAX_UNCONFIRMED_FULL_BUNDLES)
        .map(|number| published(&fill(&mut fixture, number), "g.results"))
        .collect();
    fixture.deliver("one");
    assert!(
        fixture.settle("one", result("one")).is_empty(),
        "the limit of bundles that are not full is lower"
    );
    assert!(fill(&mut fixture, MAX_UNCONFIRMED_FULL_BUNDLES).is_empty());
    assert!(!fixture.core.has_room());
    let actions = fixture.confirm(tickets[0]);
    published(&actions[1..], "g.results");
    assert!(fixture.core.has_room());
}

#[test]
fn large_results_are_published_in_bundles_that_fit_into_a_message() {
    let mut fixture = Fixture::new();
    let large = |id: &str| {
        let Successor::Result(Report::Finished(mut result)) = result(id) else { unreachable!() };
        result.output = Some(Payload { codec: Codec::Bincode, bytes: vec![0; 700_000].into() });
        Settlement::new(Subject::Ended(key(id)), Successor::Result(Report::Finished(result)))
    };
    let ids: Vec<String> = (0..40).map(|number| number.to_string()).collect();
    for id in &ids {
        assert_eq!(fixture.deliver(id), Registration::New);
    }
    let mut actions = fixture.settle_all(ids.iter().map(|id| large(id)));
    assert!(!fixture.core.has_room());
    let mut acknowledged = 0;
    while !actions.is_empty() {
        let sent = actions.iter().filter_map(|step| match step {
            Step::Send(outbound) => Some(&**outbound),
            Step::Do(_) => None,
        });
        let published = sent.filter_map(|outbound| match outbound {
            Outbound { ticket: Some(ticket), outgoing } => {
                Some((*ticket, outgoing.message.body.len()))
            }
            Outbound { ticket: None, .. } => None,
        });
        let published: Vec<_> = published.collect();
        acknowledged = acked(&actions).last().map_or(acknowledged, |(number, _)| *number);
        actions = vec![];
        for (ticket, bytes) in published {
            assert!(bytes < 2_000_000, "{bytes}");
            actions.extend(fixture.confirm(ticket));
        }
    }
    assert_eq!(acknowledged, 40);
    assert!(fixture.core.is_idle());
}

#[test]
fn messages_of_their_own_do_not_wait_for_bundles() {
    let mut fixture = Fixture::new();
    for id in ["a", "b", "c"] {
        fixture.deliver(id);
    }
    fixture.settle("a", result("a"));
    fixture.settle("b", result("b"));
    let ticket = published(&fixture.settle("c", message()), "g.delay.00");
    assert_eq!(acked(&fixture.confirm(ticket)), [(3, false)]);
}

#[test]
fn notes_are_published_after_the_confirm_of_the_successor() {
    let mut fixture = Fixture::new();
    fixture.deliver("a");
    let batch = BatchId::new("b").unwrap();
    let note = Report::BatchSealed { batch, count: 1, at: Timestamp::from_millis(1) };
    let retry = Settlement::new(Subject::Ended(key("a")), message());
    let actions = fixture.settle_all([Settlement { notes: vec![note], ..retry }]);
    let ticket = published(&actions, "g.delay.00");
    let actions = fixture.confirm(ticket);
    assert_eq!(acked(&actions), [(1, false)]);
    published(&actions[1..], "g.results");
}

#[test]
fn a_redelivery_is_settled_with_its_attempt_and_a_late_one_at_once() {
    let mut fixture = Fixture::new();
    assert_eq!(
        (fixture.deliver("a"), fixture.deliver("a")),
        (Registration::New, Registration::AlreadyRunning)
    );
    let ticket = published(&fixture.settle("a", result("a")), "g.results");
    assert_eq!(acked(&fixture.confirm(ticket)), [(2, true)]);

    assert_eq!(fixture.deliver("a"), Registration::AlreadySettled);
    let at = DeliveryRef { queue: QueueIndex(0), tag: DeliveryTag { epoch: 1, number: 3 } };
    let again = Settlement::new(Subject::task(at), Successor::Confirmed);
    assert_eq!(acked(&fixture.settle_all([again])), [(3, false)]);
}

#[test]
fn nothing_is_acknowledged_without_a_successor() {
    let mut fixture = Fixture::new();
    for id in ["a", "b"] {
        fixture.deliver(id);
    }
    let never = published(&fixture.settle("a", message()), "g.delay.00");
    let unknown = published(&fixture.settle("b", result("b")), "g.results");
    assert!(fixture.end(unknown, &Err(BrokerError::Closed)).is_empty());
    let actions = fixture.end(never, &Err(BrokerError::Rejected(String::new())));
    assert!(matches!(actions[..], [Step::Do(Action::Requeue(_))]), "{actions:?}");
    assert_eq!(fixture.deliver("a"), Registration::New, "a requeued task may run again");
}

#[test]
fn attempts_that_may_return_are_not_remembered_as_settled() {
    let mut fixture = Fixture::new();
    fixture.deliver("a");
    let parked = Settlement::new(Subject::MayReturn(key("a")), message());
    let actions = fixture.settle_all([parked]);
    let ticket = published(&actions, "g.delay.00");
    assert_eq!(acked(&fixture.confirm(ticket)), [(1, false)]);
    assert_eq!(fixture.deliver("a"), Registration::New);
}

#[test]
fn confirms_are_processed_while_there_is_no_room() {
    let mut fixture = Fixture::new();
    for id in ["a", "b", "c"] {
        fixture.deliver(id);
    }
    let first = published(&fixture.settle("a", message()), "g.delay.00");
    let mut actions = vec![];
    for id in ["b", "c"] {
        let retry = Settlement::new(Subject::Ended(key(id)), message());
        fixture.core.settle(retry, &mut actions);
    }
    fixture.core.flush(&mut actions);
    assert!(actions.is_empty() && fixture.core.wants_room() && !fixture.core.is_idle());
    fixture.core.confirm(first, &Ok(()), &mut actions);
    assert!(matches!(actions[..], [Action::Acknowledge { .. }]), "{actions:?}");
    assert_eq!(fixture.core.concluded(), 1);
    let Some(Outbound { ticket: Some(ticket), .. }) = fixture.core.next_message() else {
        panic!("b waits")
    };
    assert_eq!(acked(&fixture.confirm(ticket)), [(2, false)]);
    fixture.core.publisher_stopped(&mut actions);
    assert!(!fixture.core.wants_room(), "nothing waits for a publisher that has stopped");
}

#[test]
fn replies_without_room_stop_the_intake_of_settlements() {
    let mut fixture = Fixture::new();
    let mut actions = vec![];
    for number in 0.. {
        if !fixture.core.has_room() {
            assert_eq!(number, MAX_OUTBOUND);
            break;
        }
        let to =
            ReplyTo { queue: "g.reply.x".into(), correlation_id: None, format: ReplyFormat::Plain };
        let Successor::Result(report) = result("a") else { unreachable!() };
        let reply = Some(Reply::of(to, report));
        let only = Settlement::new(Subject::None, Successor::Confirmed);
        fixture.core.settle(Settlement { reply, ..only }, &mut actions);
    }
}

#[test]
fn missing_confirms_stop_the_intake_of_settlements() {
    let mut fixture = Fixture::new();
    let mut taken = 0;
    while fixture.core.has_room() {
        let id = format!("t-{taken}");
        fixture.deliver(&id);
        fixture.settle(&id, message());
        taken += 1;
    }
    assert_eq!(taken, MAX_INCOMPLETE);
}
