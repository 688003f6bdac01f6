//! The tests are tested: with a protection switched off, a test must fail, or it is worth nothing.
//!
//! `make test-failpoints` builds everything with the feature `failpoints` and runs the one ignored test in
//! here. For each protection it runs the tests that must notice, first with all protections on and then without
//! that one, each time in a process of their own, and prints the table of docs/testing.md.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::process::Output;
use std::time::{Duration, Instant};

use futures_util::{StreamExt, stream};

use garenne_common::failpoints::{Protection, can_be_disabled};
use tokio::process::Command;

use crate::harness::{FAILPOINTS, root};

/// Longer than any test takes that fails by itself; who is still busy then has noticed nothing.
const LIMIT: Duration = Duration::from_mins(5);
/// Tests mostly wait, and each has its own processes.
const AT_ONCE: usize = 3;
/// Names of protections, separated by commas, to run these alone.
const ONLY: &str = "GARENNE_TESTS_FAILPOINTS";

/// The test that notices.
fn noticed_by(protection: Protection) -> &'static str {
    match protection {
        Protection::PublishDeadline | Protection::ConfirmWait => {
            "broker_outage::a_frozen_broker_is_an_error_in_time_and_then_a_memory"
        }
        Protection::ResendAfterLoss => {
            "redelivery::a_result_that_was_lost_on_its_way_is_sent_again"
        }
        Protection::AlternateExchange => "dead_letter::what_no_queue_wants_ends_as_unrouted",
        Protection::AtLeastOnceDeadLettering => {
            "dead_letter::delayed_tasks_wait_for_an_exchange_that_is_gone"
        }
        Protection::SpentHeaders => {
            "retry_and_delay::a_retry_waits_for_its_own_delay_and_not_for_the_earlier_one_besides"
        }
        Protection::EpochCheck => {
            "redelivery::an_acknowledgement_of_an_old_connection_settles_nothing_of_the_next_one"
        }
        Protection::DeliveryWatch => {
            "several_urls::a_broker_that_answers_and_delivers_nothing_is_noticed"
        }
        Protection::IdleRenewal => {
            "several_urls::what_went_astray_on_its_way_to_an_idle_worker_runs"
        }
        Protection::TopologyReconciled => {
            "topology_loss::a_deleted_binding_is_put_back_and_what_missed_it_is_a_dead_letter"
        }
        Protection::Screening => "hostile::ten_unreadable_messages_are_put_aside_at_once",
        Protection::IdBeforeRun => {
            "redelivery::a_task_without_an_id_keeps_the_one_it_got_when_its_worker_is_killed"
        }
        Protection::RunningRecognised => {
            "redelivery::a_cut_line_while_a_task_runs_does_not_run_it_twice"
        }
        Protection::SettledRecognised => {
            "redelivery::an_acknowledgement_that_was_lost_costs_no_second_run"
        }
        Protection::Isolation | Protection::CrashBudget => {
            "poison::an_aborting_task_is_a_dead_letter_with_evidence_after_exactly_its_budget"
        }
        Protection::DeliveryBudget => "poison::a_task_that_is_never_settled_is_given_up_in_the_end",
        Protection::BundleShares => {
            "bundles::a_worker_that_is_killed_in_the_middle_of_a_bundle_loses_nothing"
        }
        Protection::BundleSplit => "bundles::a_task_that_kills_its_process_is_found_in_its_bundle",
        Protection::SuccessorBeforeAck => {
            "redelivery::a_task_is_acknowledged_only_after_its_result_is_confirmed"
        }
        Protection::RoomAsInput => "liveness::failing_tasks_that_a_producer_waits_for_end",
        Protection::DrainHandBack => {
            "shutdown::what_is_handed_back_goes_at_once_and_does_not_wait_for_what_runs"
        }
        Protection::FlushBeforeExit => {
            "shutdown::a_stopping_worker_sends_the_last_results_before_it_goes"
        }
        Protection::CommitBeforeAck => {
            "collector_store::a_result_is_acknowledged_only_after_it_is_stored"
        }
        Protection::FirstResultWins | Protection::MemberCountedOnce => {
            "collector_store::the_first_result_of_a_task_counts_and_repeats_are_dropped"
        }
        Protection::FenceCheck => {
            "long_tasks::a_worker_that_wakes_up_after_its_lease_has_no_say_any_more"
        }
        Protection::OutboxInTransaction => {
            "collector_store::at_no_moment_is_a_result_stored_without_its_notice"
        }
        Protection::ForgetAfterConfirm => {
            "collector_store::a_notice_is_forgotten_only_after_it_is_published"
        }
        Protection::KeptCancelRequests => "cancel::a_wish_survives_the_collector_and_the_worker",
        Protection::DrainedTwice => {
            "batch_and_notices::a_seal_behind_a_backlog_counts_although_its_deadline_has_passed"
        }
        Protection::RecoveryQueries => "redelivery::a_lost_reply_is_made_up_for_by_the_collector",
    }
}

#[test]
fn the_table_names_every_guard_and_its_test() {
    let table = fs::read_to_string(root().join("docs/testing.md")).unwrap();
    let rows = Protection::ALL.iter().map(|protection| row(*protection));
    let missing: Vec<String> = rows.filter(|row| !table.contains(row)).collect();
    assert!(missing.is_empty(), "docs/testing.md lacks:\n{}", missing.join("\n"));
}

#[tokio::test]
#[ignore = "needs a build with failpoints: make test-failpoints"]
#[expect(clippy::print_stdout, reason = "the table is what this is for")]
async fn every_protection_is_missed_by_a_test() {
    assert!(can_be_disabled(), "this build has no failpoints; run `make test-failpoints`");
    let only = std::env::var(ONLY).unwrap_or_default();
    let chosen = |name: &str| only.is_empty() || only.split(',').any(|one| one == name);
    let protections =
        Protection::ALL.iter().copied().filter(|protection| chosen(protection.name()));
    let protections: Vec<Protection> = protections.collect();
    let tests: BTreeSet<&str> =
        protections.iter().map(|protection| noticed_by(*protection)).collect();

    let controls = stream::iter(tests).map(|test| async move { (test, Run::of(test, None).await) });
    let controls: HashMap<&str, Run> = controls.buffer_unordered(AT_ONCE).collect().await;
    println!("\n| protection | without it | the test that notices | seconds | and says |");
    println!("|---|---|---|---|---|");
    let runs = stream::iter(protections).map(|protection| async move {
        (protection, Run::of(noticed_by(protection), Some(protection)).await)
    });
    let mut runs = runs.buffered(AT_ONCE);
    let mut unnoticed = vec![];
    while let Some((protection, run)) = runs.next().await {
        let test = noticed_by(protection);
        let said = match (&controls[test].verdict, &run.verdict) {
            (Verdict::Passed, Verdict::Failed(why)) => Ok(why.clone()),
            (Verdict::Passed, Verdict::Passed) => Err("NOTHING, it passes".to_owned()),
            (Verdict::Passed, Verdict::Hung) => Err("NOTHING, it does not end".to_owned()),
            (Verdict::Failed(why), _) => Err(format!("THE SAME WITH ALL PROTECTIONS ON: {why}")),
            (Verdict::Hung, _) => Err("NOTHING, it never ends".to_owned()),
        };
        unnoticed.extend(said.is_err().then_some(protection.name()));
        let (Ok(said) | Err(said)) = said;
        println!("{} {} | {said} |", row(protection), run.took.as_secs());
    }
    assert!(unnoticed.is_empty(), "no test notices: {}", unnoticed.join(", "));
}

/// A row of the table, up to what differs from run to run.
fn row(protection: Protection) -> String {
    format!("| `{}` | {} | `{}` |", protection.name(), protection.without(), noticed_by(protection))
}

/// One test in a process of its own.
struct Run {
    verdict: Verdict,
    took: Duration,
}

enum Verdict {
    Passed,
    /// With the words of its first panic.
    Failed(String),
    Hung,
}

impl Run {
    async fn of(test: &str, off: Option<Protection>) -> Self {
        let begun = Instant::now();
        let mut command = Command::new(std::env::current_exe().expect("a test has a path"));
        command.args([test, "--exact"]).env(FAILPOINTS, off.map_or("", Protection::name));
        let verdict = match tokio::time::timeout(LIMIT, command.kill_on_drop(true).output()).await {
            Ok(output) => Verdict::of(&output.expect("a test binary can be run"), test),
            Err(_) => Verdict::Hung,
        };
        Self { verdict, took: begun.elapsed() }
    }
}

impl Verdict {
    fn of(output: &Output, test: &str) -> Self {
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(said.contains("running 1 test\n"), "there is no test {test}");
        if output.status.success() { Self::Passed } else { Self::Failed(first_panic(&said)) }
    }
}

fn first_panic(said: &str) -> String {
    let mut lines = said.lines().skip_while(|line| !line.contains("panicked at")).skip(1);
    let first = lines.next().unwrap_or("it ended without a word");
    // What `assert_eq` compared stands in the next two lines.
    let compared = lines.take(2).map(str::trim).filter(|line| line.contains("t: "));
    let all: Vec<&str> = [first].into_iter().chain(compared).collect();
    let short: String = all.join(", ").chars().take(110).collect();
    short.replace('|', "/")
}
