//! Each breach is found in evidence that is sound but for it, and sound evidence has none.

use super::*;
use garenne_common::wire::{LetterState, Notice, Payload, TaskSummary};
use garenne_common::{BatchId, Codec, QueueName, TaskName, Timestamp};

use super::super::mix::{Job, Unit};
use super::super::workload::{Said, Workload};

const TASKS: u64 = 400;
const DEADLINE: Duration = Duration::from_secs(15);

/// A run in which everything went well; a test then spoils one thing.
struct Case {
    mix: Mix,
    workload: Workload,
    records: Vec<Option<TaskResult>>,
    early: Vec<(u64, TaskResult)>,
    book: Book,
    heard: Heard,
    totals: Totals,
    letters: HashMap<u64, Option<DeadSummary>>,
    queues: Vec<(String, u32)>,
    disturbances: Vec<Instant>,
    begun: Instant,
}

impl Case {
    fn sound() -> Self {
        let mix = Mix { seed: 11, tasks: TASKS };
        let begun = Instant::now();
        let mut workload = Workload::new(mix);
        let mut records = vec![None; usize::try_from(TASKS).unwrap()];
        let (mut book, mut heard) = (Book::new(mix), Heard::default());
        while let Some(unit) = workload.next(TASKS, begun) {
            let batch = match unit {
                Unit::One(_) => None,
                Unit::Batch { first, .. } => Some(format!("b-{first}")),
            };
            if let (Some(id), Unit::Batch { first, count }) = (&batch, unit) {
                workload.heard(&Said::Opened { first, id: id.clone() }, begun);
                workload.heard(&Said::Sealed(first), begun);
                heard.enter(mix, Ok(Notice::Batch(summary(mix, id, first, count))));
            }
            for n in unit.indices() {
                workload.heard(&Said::Confirmed(n), begun);
                let record = record(mix, n, batch.as_deref());
                perform(mix, n, record.attempt, &mut book);
                if batch.is_none() {
                    heard.enter(mix, Ok(Notice::of_task(&record)));
                }
                records[usize::try_from(n).unwrap()] = Some(record);
            }
        }
        let dead = (0..TASKS).filter(|n| mix.job(*n).fails()).count() as u64;
        let totals = Totals { results: TASKS, repeats: 0, dead, batches: 3 };
        let letters = (0..TASKS).filter(|n| mix.job(*n).fails());
        let letters = letters.map(|n| (n, Some(letter(mix, n)))).collect();
        let queues = vec![("ns.results".to_owned(), 0)];
        let (early, disturbances) = (vec![], vec![]);
        Self {
            mix,
            workload,
            records,
            early,
            book,
            heard,
            totals,
            letters,
            queues,
            disturbances,
            begun,
        }
    }

    fn violations(&self) -> Vec<Violation> {
        let evidence = Evidence {
            mix: self.mix,
            confirmed: &self.workload.confirmed,
            handed: &self.workload.handed,
            records: &self.records,
            early: &self.early,
            book: &self.book,
            heard: &self.heard,
            batches: &self.workload.batches,
            batch_deadline: DEADLINE,
            totals: self.totals,
            letters: &self.letters,
            queues: &self.queues,
            disturbances: &self.disturbances,
            begun: self.begun,
            noted: &[],
        };
        evidence.violations()
    }

    /// The only kind of breach there is.
    #[track_caller]
    fn only(&self) -> Invariant {
        let mut kinds: Vec<_> = self.violations().iter().map(|one| one.invariant).collect();
        kinds.dedup();
        assert_eq!(kinds.len(), 1, "{:#?}", self.violations());
        kinds[0]
    }

    /// The first task outside of batches for which this holds.
    fn alone(&self, wanted: impl Fn(&Job) -> bool) -> u64 {
        let records = (0..).zip(self.records.iter().flatten());
        let alone = records.filter(|(_, record)| record.batch.is_none());
        alone.map(|(n, _)| n).find(|n| wanted(&self.mix.job(*n))).unwrap()
    }

    fn record(&mut self, n: u64) -> &mut Option<TaskResult> {
        &mut self.records[usize::try_from(n).unwrap()]
    }

    fn told(&mut self, n: u64) -> &mut TaskSummary {
        &mut self.heard.tasks.get_mut(&n).unwrap().summary
    }

    fn batch(&mut self) -> &mut BatchSummary {
        &mut self.heard.batches.get_mut("b-0").unwrap().summary
    }
}

fn record(mix: Mix, n: u64, batch: Option<&str>) -> TaskResult {
    let job = mix.job(n);
    let (status, reason) = job.expected();
    TaskResult {
        id: mix.id(n).unwrap(),
        name: TaskName::new("garenne.verify").unwrap(),
        queue: QueueName::default(),
        batch: batch.map(|id| BatchId::new(id).unwrap()),
        status,
        output: job.succeeds().then(|| Payload::encode(Codec::Json, &n).unwrap()),
        error: reason.map(|_| job.evidence().unwrap_or_else(|| "asked to".to_owned())),
        reason,
        attempt: if job.succeeds() { job.failures + 1 } else { 1 },
        redelivered: false,
        worker: "w".into(),
        started_at: Timestamp::from_millis(1),
        finished_at: Timestamp::from_millis(2),
        fingerprint: None,
    }
}

fn perform(mix: Mix, n: u64, attempts: u32, book: &mut Book) {
    let id = mix.id(n).unwrap();
    for attempt in 1..=attempts {
        run(book, n, attempt, id.as_str());
    }
    if mix.job(n).succeeds() {
        let key = if mix.job(n).keyed { id.as_str() } else { "-" };
        book.enter(&["effect", &n.to_string(), "1", id.as_str(), "w", key]);
    }
}

fn run(book: &mut Book, n: u64, attempt: u32, id: &str) {
    book.enter(&["run", &n.to_string(), &attempt.to_string(), id, "w"]);
}

fn summary(mix: Mix, id: &str, first: u64, count: u64) -> BatchSummary {
    let good = (first..first + count).filter(|n| mix.job(*n).succeeds()).count() as u64;
    BatchSummary {
        batch: BatchId::new(id).unwrap(),
        state: BatchState::Done,
        total: Some(count),
        succeeded: good,
        failed: count - good,
        cancelled: 0,
        opened_at: Timestamp::from_millis(0),
        finished_at: Some(Timestamp::from_millis(3)),
    }
}

fn letter(mix: Mix, n: u64) -> DeadSummary {
    DeadSummary {
        id: mix.id(n).unwrap(),
        name: Some("garenne.verify".to_owned()),
        queue: "default".to_owned(),
        reason: mix.job(n).expected().1.unwrap(),
        error: "asked to".to_owned(),
        by: "w".to_owned(),
        at: Timestamp::from_millis(2),
        body_bytes: 1,
        args: Some(Payload::encode(Codec::Json, &mix.job(n).arguments()).unwrap()),
        batch: None,
        state: LetterState::Dead,
        started_at: None,
        replay_of: None,
        replays: 0,
        replayed_as: None,
        replayed_at: None,
        message: None,
    }
}

#[test]
fn a_sound_run_has_no_breach() {
    assert_eq!(Case::sound().violations(), []);
}

#[test]
fn a_lost_task_is_found() {
    let mut case = Case::sound();
    let n = case.alone(Job::succeeds);
    *case.record(n) = None;
    case.totals.results -= 1;
    assert_eq!(case.only(), Invariant::Lost);
}

#[test]
fn phantoms_are_found_in_the_store_on_the_notices_and_in_the_ledger() {
    let mut case = Case::sound();
    case.totals.results += 1;
    assert_eq!(case.only(), Invariant::Phantom);

    let mut case = Case::sound();
    let mut stranger = record(case.mix, 1, None);
    stranger.id = garenne_common::TaskId::new("stranger").unwrap();
    case.heard.enter(case.mix, Ok(Notice::of_task(&stranger)));
    assert_eq!(case.only(), Invariant::Phantom);

    let mut case = Case::sound();
    run(&mut case.book, 3, 1, "v-b-4");
    assert_eq!(case.only(), Invariant::Phantom);

    let mut case = Case::sound();
    let strange = summary(case.mix, "b-strange", 0, 3);
    case.heard.enter(case.mix, Ok(Notice::Batch(strange)));
    assert_eq!(case.only(), Invariant::Phantom);
}

#[test]
fn a_changed_outcome_is_found_by_an_early_look_and_by_its_notice() {
    let mut case = Case::sound();
    let mut early = record(case.mix, 0, Some("b-0"));
    early.worker = "another".into();
    case.early.push((0, early));
    assert_eq!(case.only(), Invariant::SecondOutcome);

    let mut case = Case::sound();
    let n = case.alone(|_| true);
    case.told(n).attempt += 1;
    assert_eq!(case.only(), Invariant::SecondOutcome);
}

#[test]
fn an_outcome_that_the_handler_did_not_bring_about_is_found() {
    let mut case = Case::sound();
    let n = case.alone(Job::succeeds);
    let output = Payload::encode(Codec::Json, &(n + 1)).unwrap();
    case.record(n).as_mut().unwrap().output = Some(output);
    assert_eq!(case.only(), Invariant::WrongOutcome);
}

#[test]
fn another_number_of_crashes_than_the_budget_is_found() {
    let mut case = Case::sound();
    let n = case.alone(Job::crashes);
    case.record(n).as_mut().unwrap().error = Some("its process died 2 times".to_owned());
    assert_eq!(case.only(), Invariant::WrongOutcome);
}

#[test]
fn a_second_effect_and_a_missing_one_are_found() {
    let mut case = Case::sound();
    let n = case.alone(|job| job.keyed && job.succeeds());
    let id = case.mix.id(n).unwrap();
    case.book.enter(&["effect", &n.to_string(), "2", id.as_str(), "w", "another-key"]);
    assert_eq!(case.only(), Invariant::SecondEffect);

    let mut case = Case::sound();
    let n = case.alone(Job::succeeds);
    case.book.effects.remove(&n);
    assert_eq!(case.only(), Invariant::MissingEffect);
}

#[test]
fn a_repeat_under_the_same_key_is_no_breach() {
    let mut case = Case::sound();
    let n = case.alone(|job| job.keyed && job.succeeds());
    let id = case.mix.id(n).unwrap();
    case.disturbances.push(case.begun);
    run(&mut case.book, n, 1, id.as_str());
    case.book.enter(&["effect", &n.to_string(), "1", id.as_str(), "w", id.as_str()]);
    assert_eq!((case.violations(), case.book.refused), (vec![], 1));
}

#[test]
fn missing_early_and_false_notices_are_found() {
    let mut case = Case::sound();
    let n = case.alone(|_| true);
    case.heard.tasks.remove(&n);
    assert_eq!(case.only(), Invariant::Notice);

    let mut case = Case::sound();
    case.heard.batches.remove("b-0");
    assert_eq!(case.only(), Invariant::Notice);

    for spoil in [
        (|batch: &mut BatchSummary| batch.succeeded -= 1) as fn(&mut BatchSummary),
        |batch| batch.state = BatchState::Sealed,
        |batch| batch.state = BatchState::Abandoned,
    ] {
        let mut case = Case::sound();
        spoil(case.batch());
        assert_eq!(case.only(), Invariant::Notice);
    }
}

#[test]
fn an_orphaned_batch_may_be_abandoned_and_not_done() {
    let mut case = Case::sound();
    case.workload.batches.get_mut(&0).unwrap().orphaned = true;
    assert_eq!(case.only(), Invariant::Notice);
}

#[test]
fn what_stays_in_a_queue_and_wrong_dead_letters_are_found() {
    let mut case = Case::sound();
    case.queues[0].1 = 1;
    assert_eq!(case.only(), Invariant::Conservation);

    let mut case = Case::sound();
    case.totals.dead += 1;
    assert_eq!(case.only(), Invariant::Conservation);

    let mut case = Case::sound();
    *case.letters.values_mut().next().unwrap() = None;
    assert_eq!(case.only(), Invariant::Conservation);
}

#[test]
fn more_executions_than_the_faults_explain_are_found() {
    let mut case = Case::sound();
    let n = case.alone(|job| job.succeeds() && job.failures == 0);
    let id = case.mix.id(n).unwrap();
    for _ in 0..8 {
        run(&mut case.book, n, 1, id.as_str());
    }
    assert_eq!(case.only(), Invariant::Attempts);

    let mut case = Case::sound();
    run(&mut case.book, n, 9, id.as_str());
    assert_eq!(case.only(), Invariant::Attempts);
}
