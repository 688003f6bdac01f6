//! `scripts/run-tests` runs a failed test once more, alone, and takes its pass for one; and when it must
//! not. The test binary is this very one, with tests that fail as often as they are told; only cargo is
//! a script, because what is tested here is what follows from its output.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use tempfile::TempDir;

use crate::harness::root;

/// The directory in which the stand-ins find how often to fail, and note that they ran.
const PLAN: &str = "GARENNE_TESTS_STAND_INS";

/// What a stand-in does when it runs: a line of its plan for each run, and after them it passes.
fn act(name: &str) {
    // Without a plan somebody runs all ignored tests.
    let Some(directory) = std::env::var_os(PLAN) else { return };
    let plan = Path::new(&directory).join(name);
    let text = fs::read_to_string(&plan).unwrap_or_default();
    let (now, later) = text.split_once('\n').unwrap_or_default();
    fs::write(&plan, later).unwrap();
    match now {
        "fail" => panic!("{name} fails as planned"),
        "abort" => std::process::abort(),
        _ => fs::write(Path::new(&directory).join(format!("{name} passed")), "").unwrap(),
    }
}

#[test]
#[ignore = "run by the other tests of this module"]
fn stand_in_one() {
    act("one");
}

#[test]
#[ignore = "run by the other tests of this module"]
fn stand_in_two() {
    act("two");
}

#[test]
#[ignore = "run by the other tests of this module"]
fn stand_in_three() {
    act("three");
}

/// A cargo whose integration suite is the three stand-ins.
struct FakeCargo {
    directory: TempDir,
    /// What it runs instead of a test binary, before the suite; prints as cargo would.
    before: &'static str,
    /// How many targets it says have failed if the suite has.
    failed: u32,
    /// A module in whose place the stand-ins appear.
    module: &'static str,
}

impl FakeCargo {
    fn new() -> Self {
        let directory = TempDir::with_prefix("garenne-reruns-").unwrap();
        Self { directory, before: ":", failed: 1, module: "reruns" }
    }

    /// The stand-in does this in its first runs, one after the other.
    fn plan(self, name: &str, runs: &[&str]) -> Self {
        let lines: String = runs.iter().map(|run| format!("{run}\n")).collect();
        fs::write(self.directory.path().join(name), lines).unwrap();
        self
    }

    fn run(&self) -> Output {
        let test = std::env::current_exe().expect("a test has a path");
        let script = format!(
            "{before}\n\
             echo '     Running src/main.rs ({test})'\n\
             '{test}' --ignored reruns:: >out 2>&1; code=$?\n\
             sed 's/reruns::/{module}::/' out\n\
             [ $code = 0 ] && exit 0\n\
             echo 'error: {failed} targets failed:'; exit 101\n",
            before = self.before,
            test = test.display(),
            module = self.module,
            failed = self.failed,
        );
        let cargo = self.directory.path().join("cargo.sh");
        fs::write(&cargo, script).unwrap();
        let mut command = Command::new(root().join("scripts/run-tests"));
        command.current_dir(self.directory.path()).env(PLAN, self.directory.path());
        command.env("CARGO", format!("sh {}", cargo.display()));
        command.output().unwrap()
    }

    /// Runs it; it must fail as `cargo test` did. What it printed.
    #[track_caller]
    fn fails(&self) -> String {
        let output = self.run();
        assert_eq!(output.status.code(), Some(101), "{output:?}");
        let said = text(&output);
        assert!(!said.contains("FLAKY"), "{said}");
        said
    }

    fn passed(&self, name: &str) -> bool {
        self.directory.path().join(format!("{name} passed")).exists()
    }
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn a_test_that_passes_alone_counts_and_is_shown_with_both_outputs() {
    let cargo = FakeCargo::new().plan("one", &["fail"]).plan("three", &["fail"]);
    let output = cargo.run();
    let said = text(&output);
    assert_eq!(output.status.code(), Some(0), "{said}");
    let (first, report) = said.split_once("\nFLAKY reruns::stand_in_one\n").expect(&said);
    assert!(first.contains("reruns::stand_in_one ... FAILED"), "cargo's output is shown: {first}");
    assert!(report.contains("one fails as planned"), "{report}");
    assert!(report.contains("\nFLAKY reruns::stand_in_three\n"), "{report}");
    assert!(report.contains("reruns::stand_in_one ... ok"), "{report}");
    let last: Vec<&str> = report.lines().rev().take(2).collect();
    assert!(last[0].ends_with("2 FLAKY: reruns::stand_in_one reruns::stand_in_three"), "{last:?}");
    assert!(last[1].starts_with("test result: FAILED. 1 passed; 2 failed;"), "{last:?}");
}

#[test]
fn a_run_without_failures_prints_what_cargo_prints() {
    let cargo = FakeCargo::new();
    let output = cargo.run();
    let said = text(&output);
    assert_eq!(output.status.code(), Some(0), "{said}");
    let last = said.lines().rfind(|line| !line.is_empty()).unwrap();
    assert!(last.starts_with("test result: ok. 3 passed;"), "{said}");
}

#[test]
fn a_test_that_fails_twice_fails_the_run() {
    let said = FakeCargo::new().plan("two", &["fail", "fail"]).fails();
    assert!(said.ends_with("reruns::stand_in_two failed again\n"), "{said}");
}

#[test]
fn some_modules_are_never_run_again() {
    for module in ["liveness", "random_configurations", "verify", "simulation", "failpoints"]
        .into_iter()
        .chain(["kill_everything"])
    {
        let cargo = FakeCargo { module, ..FakeCargo::new() }.plan("one", &["fail"]);
        let said = cargo.fails();
        assert!(said.contains("tests of this module are not run again"), "{said}");
        assert!(!cargo.passed("one"));
    }
}

#[test]
fn more_than_two_failures_fail_the_run() {
    let one = FakeCargo::new().plan("one", &["fail"]).plan("two", &["fail"]);
    let cargo = one.plan("three", &["fail"]);
    assert!(cargo.fails().contains("3 tests failed"));
    assert!(!cargo.passed("one"));
}

/// Whatever else fails, a flaky test beside it changes nothing.
#[test]
fn a_failure_that_is_no_test_of_the_suite_fails_the_run() {
    let befores = [
        // A unit test.
        "echo '     Running unittests src/lib.rs (target/debug/deps/garenne_common-1)'\n\
         printf 'failures:\\n    names::a_test\\n\\ntest result: FAILED. 1 passed; 1 failed; 0 ignored\\n'",
        // A unit test binary that crashed.
        "echo '     Running unittests src/lib.rs (target/debug/deps/garenne_common-1)'\n\
         printf 'running 2 tests\\n'",
        // A doc test: two results, of which the second is fine.
        "echo '   Doc-tests garenne_common'\n\
         printf 'failures:\\n    src/lib.rs\\n\\ntest result: FAILED. 1 passed; 1 failed; 0 ignored\\n'\n\
         printf 'test result: ok. 1 passed; 0 failed; 0 ignored\\n'",
        // Something that only cargo's count knows of.
        "true",
    ];
    for before in befores {
        let cargo = FakeCargo { before, failed: 2, ..FakeCargo::new() }.plan("one", &["fail"]);
        cargo.fails();
        assert!(!cargo.passed("one"), "{before}");
    }
}

#[test]
fn a_suite_that_crashes_fails_the_run() {
    let cargo = FakeCargo::new().plan("one", &["abort"]);
    cargo.fails();
    assert!(!cargo.passed("one"));
}

#[test]
fn a_build_that_fails_fails_the_run() {
    let before = "echo 'error: could not compile'; exit 101";
    FakeCargo { before, ..FakeCargo::new() }.fails();
}
