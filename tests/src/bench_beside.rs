//! `scripts/bench-beside` builds two commits, lets each bench itself in turns, and its exit code says
//! whether this one is as fast. Script, git and judge are the real ones; cargo, broker and bench are
//! stand-ins, since two release builds and an hour of benches are no test.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use tempfile::TempDir;

use crate::harness::{binary, root};

/// Builds a bench that reports the rate that its commit names, and notes who ran.
const CARGO: &str = r#"
case "$*" in
  *bench-judge*) mkdir -p target/release/examples && cp "$JUDGE" target/release/examples/; exit ;;
esac
[ "$CARGO_TARGET_DIR" = "$PWD/target" ] || exit 9
mkdir -p target/release && cat >target/release/garenne <<BENCH
#!/bin/sh
echo "$(cat rate) \$*" >>"$NOTES"
cat <<JSON
{ "machine": { "profile": "release", "load_before": 0.5 }, "settings": { "quick": false },
  "figures": [{ "id": "singles", "scenario": "singles", "title": "singles, stored", "unit": "per_second",
                "garenne": { "median": $(cat rate) }, "ratio": null }] }
JSON
BENCH
chmod +x target/release/garenne
"#;

/// A repository with a commit of this rate, tagged `old`, and one of that rate after it.
struct Repository(TempDir);

impl Repository {
    fn new(old: u32, new: u32) -> Self {
        let repository = Self(TempDir::with_prefix("garenne-beside-").unwrap());
        let scripts = repository.path().join("scripts");
        fs::create_dir(&scripts).unwrap();
        fs::copy(root().join("scripts/bench-beside"), scripts.join("bench-beside")).unwrap();
        // The real one would start a RabbitMQ: `run -- COMMAND`.
        fs::write(scripts.join("rabbitmq"), "#!/bin/sh\nshift 2; exec \"$@\"\n").unwrap();
        let executable = fs::Permissions::from_mode(0o755);
        fs::set_permissions(scripts.join("rabbitmq"), executable).unwrap();
        fs::write(repository.path().join("cargo.sh"), CARGO).unwrap();
        fs::write(repository.path().join(".gitignore"), "target\n").unwrap();
        repository.git(&["init", "--quiet"]);
        repository.commit(old);
        repository.git(&["tag", "old"]);
        repository.commit(new);
        repository
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn git(&self, arguments: &[&str]) {
        let identity = ["-c", "user.name=tests", "-c", "user.email=tests@localhost"];
        let mut git = Command::new("git");
        let done = git.current_dir(self.path()).args(identity).args(arguments).output().unwrap();
        assert!(done.status.success(), "{done:?}");
    }

    fn commit(&self, rate: u32) {
        fs::write(self.path().join("rate"), rate.to_string()).unwrap();
        self.git(&["add", "--all"]);
        self.git(&["commit", "--quiet", "--allow-empty", "--message", "a rate"]);
    }

    fn compare(&self, arguments: &[&str]) -> Output {
        let mut script = Command::new(self.path().join("scripts/bench-beside"));
        script.args(arguments).env("JUDGE", binary("examples/bench-judge"));
        script.env("CARGO", format!("sh {}", self.path().join("cargo.sh").display()));
        script.env("RUNS", "2").env("NOTES", self.path().join("notes"));
        script.output().unwrap()
    }
}

#[test]
fn both_builds_take_turns_and_nothing_of_the_other_stays() {
    let repository = Repository::new(100, 95);
    let done = repository.compare(&["old", "--scenario", "singles,bulk", "--seconds", "2"]);
    assert_eq!(done.status.code(), Some(0), "{done:?}");
    let notes = fs::read_to_string(repository.path().join("notes")).unwrap();
    let ran: Vec<_> = notes.lines().collect();
    let turns = ["100 singles", "95 singles", "95 bulk", "100 bulk"];
    let other_turns = ["95 singles", "100 singles", "100 bulk", "95 bulk"];
    let expected = [turns, other_turns].concat().into_iter().map(|turn| {
        let (rate, scenario) = turn.split_once(' ').unwrap();
        format!("{rate} bench --output json --scenario {scenario} --seconds 2 --repeats 1")
    });
    assert_eq!(ran, expected.collect::<Vec<_>>());
    let said = String::from_utf8(done.stdout).unwrap();
    let row: Vec<_> =
        said.lines().find(|line| line.starts_with("singles")).expect(&said).split("  ").collect();
    assert!(row.contains(&"95/s") && row.contains(&"0.95"), "{said}");
    assert!(said.contains("The rule holds"), "{said}");
    let left = fs::read_dir(repository.path().join("target/bench-beside")).unwrap().count();
    assert_eq!(left, 8, "the reports, and no worktree");
}

#[test]
fn without_a_choice_it_measures_every_scenario() {
    let script = fs::read_to_string(root().join("scripts/bench-beside")).unwrap();
    let listed = script.lines().find_map(|line| line.strip_prefix("SCENARIOS=")).unwrap();
    let help = Command::new(binary("garenne")).args(["bench", "--help"]).output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let (_, after) = help.split_once("--scenario <LIST>").unwrap();
    let offered = after.lines().take_while(|line| !line.trim().starts_with("--"));
    let names = offered.filter_map(|line| line.trim().strip_prefix("- ")?.split_once(':'));
    assert_eq!(names.map(|(name, _)| name).collect::<Vec<_>>().join(","), listed);
}

#[test]
fn a_slower_build_is_told_by_the_exit_code() {
    let done = Repository::new(100, 85).compare(&["old", "--scenario", "singles"]);
    assert_eq!(done.status.code(), Some(1), "{done:?}");
    let said = String::from_utf8(done.stdout).unwrap();
    assert!(said.contains("THE RULE DOES NOT HOLD"), "{said}");
    assert!(said.contains("4 and 4 runs"), "what missed is measured once more: {said}");
}

#[test]
fn what_cannot_be_measured_is_no_verdict() {
    let repository = Repository::new(100, 100);
    let unknown = repository.compare(&["no-such-commit"]);
    assert_eq!(unknown.status.code(), Some(2), "{unknown:?}");
    fs::write(repository.path().join("cargo.sh"), "exit 101").unwrap();
    let broken = repository.compare(&["old"]);
    assert_eq!(broken.status.code(), Some(2), "{broken:?}");
    assert!(!repository.path().join("target/bench-beside/tree").exists());
}
