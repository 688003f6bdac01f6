//! The rules of the repository that no compiler knows. A failure says which rule and why it is one.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use crate::harness::root;

/// The crates and what else is Rust here.
const CRATES: [&str; 7] = ["common", "producer", "worker", "collector", "lab", "examples", "tests"];
/// Their manifests, beside those of the crates within crates.
fn manifests() -> impl Iterator<Item = String> {
    CRATES.into_iter().chain(["producer/cli"]).map(|name| format!("{name}/Cargo.toml"))
}

/// Files below a directory with this ending, relative to the root.
fn files(directory: &str, ending: &str) -> Vec<PathBuf> {
    let mut found = vec![];
    let mut directories = vec![root().join(directory)];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                directories.push(path);
            } else if path.to_string_lossy().ends_with(ending) {
                found.push(path.strip_prefix(root()).unwrap().to_owned());
            }
        }
    }
    found.sort();
    found
}

fn sources() -> Vec<PathBuf> {
    let all: Vec<_> = CRATES.iter().flat_map(|name| files(name, ".rs")).collect();
    assert!(all.len() > 50, "the sources were found");
    all
}

fn read(path: impl AsRef<Path>) -> String {
    let path = path.as_ref();
    fs::read_to_string(root().join(path))
        .unwrap_or_else(|error| panic!("{} cannot be read: {error}", path.display()))
}

/// The code of a file without its comments (and without what only looks like code in them).
fn code(path: &Path) -> String {
    let text = read(path);
    let lines = text.lines().map(|line| line.split("//").next().unwrap_or_default());
    lines.collect::<Vec<_>>().join("\n")
}

/// Fails with the offenders, one a line, and the reason for the rule.
#[track_caller]
fn none(offenders: &[String], rule: &str) {
    assert!(offenders.is_empty(), "{rule}\n  {}", offenders.join("\n  "));
}

#[test]
fn every_file_says_what_it_is() {
    let silent = sources().into_iter().filter(|path| !read(path).starts_with("//! "));
    let silent: Vec<_> = silent.map(|path| path.display().to_string()).collect();
    none(&silent, "Every .rs opens with `//!`: what it is, and what it does not do. Missing in:");
}

/// Sources outside `home` whose code names a crate.
fn naming(name: &str, home: &str) -> Vec<String> {
    let uses = [format!("{name}::"), format!("use {name};"), format!("extern crate {name}")];
    let strangers = sources().into_iter().filter(|path| !path.starts_with(home));
    // This file names them all.
    let strangers = strangers.filter(|path| !path.ends_with("tests/src/tidy.rs"));
    let naming = strangers.filter(|path| uses.iter().any(|usage| code(path).contains(usage)));
    naming.map(|path| path.display().to_string()).collect()
}

/// Crates other than `common` that depend on one of these.
fn depending(names: &[&str]) -> Vec<String> {
    let mut found = vec![];
    for path in manifests().filter(|path| path != "common/Cargo.toml") {
        let text = read(&path);
        let keys = text.lines().filter_map(|line| line.split(['.', '=', ' ']).next());
        found.extend(keys.filter(|key| names.contains(key)).map(|key| format!("{path}: {key}")));
    }
    found
}

#[test]
fn one_module_owns_the_client_library() {
    let mut strangers = naming("lapin", "common/src/broker");
    strangers.extend(depending(&["lapin"]));
    // The bare client of the bench is there to be compared with.
    strangers.retain(|path| path != "lab/src/bench/bare.rs" && path != "lab/Cargo.toml: lapin");
    none(
        &strangers,
        "Only common/src/broker names lapin: its traps are fenced in there. Also named in:",
    );
}

#[test]
fn one_module_owns_the_codec() {
    let mut strangers = naming("bincode", "common/src/wire");
    strangers.extend(depending(&["bincode"]));
    none(&strangers, "Only common/src/wire names bincode: no size limit elsewhere. Also named in:");
}

#[test]
fn pure_modules_stay_pure() {
    let pure = files("common/src", ".rs").into_iter().filter(|path| {
        let impure = ["broker", "config", "failpoints.rs", "service"];
        !impure.iter().any(|part| path.starts_with(Path::new("common/src").join(part)))
    });
    let impure = pure.filter(|path| {
        ["tokio::", "std::env", "std::fs", "std::net"].iter().any(|io| code(path).contains(io))
    });
    let impure: Vec<_> = impure.map(|path| path.display().to_string()).collect();
    none(&impure, "What a task is and how it travels does no IO and knows no runtime. But:");
}

/// A test that sleeps assumes how quick the machine is. Soak runs and the cluster are about durations, and
/// random configurations are looked at as they go on.
#[test]
fn tests_wait_for_states_and_never_for_durations() {
    let exempt =
        ["harness/eventually.rs", "random_configurations", "soak", "cluster.rs", "tidy.rs"];
    let tests = files("tests/src", ".rs").into_iter().filter(|path| {
        !exempt.iter().any(|part| path.starts_with(Path::new("tests/src").join(part)))
    });
    let sleeping = tests.filter(|path| {
        ["time::sleep(", "thread::sleep("].iter().any(|sleep| code(path).contains(sleep))
    });
    let sleeping: Vec<_> = sleeping.map(|path| path.display().to_string()).collect();
    none(&sleeping, "Tests wait for states: `soon`, a `Gate`, or what a process logs. But:");
}

#[test]
fn roles_never_depend_on_each_other() {
    let roles = ["producer", "worker", "collector"];
    let mut found = vec![];
    for role in roles {
        let text = read(format!("{role}/Cargo.toml"));
        let others = roles.iter().filter(|other| **other != role);
        let named = others.filter(|other| text.contains(&format!("garenne-{other}.workspace")));
        found.extend(named.map(|other| format!("{role} depends on {other}")));
    }
    none(&found, "Producer, worker and collector meet on the wire and nowhere else:");
}

/// Whoever adds the library to a service must not get a terminal with it.
#[test]
fn libraries_need_nothing_of_a_command_line() {
    let terminal =
        ["clap", "clap_complete", "comfy-table", "hdrhistogram", "indicatif", "nix", "tempfile"];
    let text = read("producer/Cargo.toml");
    let keys = text.lines().filter_map(|line| line.split(['.', '=', ' ']).next());
    let found: Vec<_> = keys.filter(|key| terminal.contains(key)).map(str::to_owned).collect();
    none(&found, "The producer is a library; producer/cli is the command. But it depends on:");
}

/// `CARGO_TARGET_DIR` and `build.target-dir` may lead elsewhere.
#[test]
fn make_finds_programs_where_cargo_builds_them() {
    let lines = read("Makefile");
    let fixed = lines.lines().filter(|line| line.starts_with('\t') && line.contains(" target/"));
    let fixed: Vec<_> = fixed.map(str::to_owned).collect();
    none(&fixed, "The Makefile asks cargo where it builds, by $(TARGET). But:");
}

#[test]
fn versions_live_in_one_place() {
    let mut found = vec![];
    for path in manifests() {
        let text = read(&path);
        let pinned = text.lines().filter(|line| {
            line.contains("version = \"")
                || line.split_once(" = \"").is_some_and(|(_, v)| {
                    v.starts_with(|c: char| c.is_ascii_digit() || c == '=' || c == '^')
                })
        });
        found.extend(pinned.map(|line| format!("{path}: {line}")));
    }
    none(&found, "Versions stand in the root Cargo.toml, once. But:");
}

/// Fields of the structs `Raw…` of common's configuration, with the section each is written in.
fn configuration_keys() -> Vec<String> {
    let files = files("common/src", ".rs").into_iter();
    let texts = files.filter(|path| path.to_string_lossy().contains("config")).map(read);
    let text: String = texts.collect::<Vec<_>>().join("\n");
    let fields = |name: &str| {
        let (_, rest) =
            text.split_once(&format!("struct {name} {{")).unwrap_or_else(|| panic!("{name}"));
        let (body, _) = rest.split_once("\n}").unwrap();
        let lines = body.lines().map(str::trim).filter(|line| !line.starts_with(['#', '/']));
        let pairs = lines.filter_map(|line| line.trim_end_matches(',').split_once(": "));
        let pairs = pairs
            .map(|(key, kind)| (key.trim_start_matches("pub(super) ").to_owned(), kind.to_owned()));
        pairs.collect::<Vec<_>>()
    };
    let mut keys = vec![];
    for (section, kind) in fields("RawConfig") {
        keys.extend(fields(&kind).into_iter().map(|(key, _)| format!("{section}.{key}")));
    }
    keys.extend(fields("RawCommand").into_iter().map(|(key, _)| key));
    assert!(keys.len() > 25, "the keys were found: {keys:?}");
    keys
}

#[test]
fn every_configuration_key_is_documented() {
    let documentation = read("docs/configuration.md");
    // A command's keys have no section; the example shows them, as `key = value`.
    let named = |key: &String| {
        documentation.contains(&format!("`{key}`"))
            || documentation.contains(&format!("\n{key} = "))
    };
    let missing: Vec<_> = configuration_keys().into_iter().filter(|key| !named(key)).collect();
    none(&missing, "docs/configuration.md lists every key as `section.key`. Missing:");
}

/// Paths of this repository that a text names: link targets, and words that begin with a known place.
fn named_paths(text: &str) -> Vec<String> {
    let places = [
        "common/",
        "producer/",
        "worker/",
        "collector/",
        "lab/",
        "tests/",
        "examples/",
        "docs/",
        "scripts/",
        ".ci/",
        "deploy/",
    ];
    let links = text.split("](").skip(1).filter_map(|rest| rest.split([')', '#', ' ']).next());
    let links = links.filter(|link| !link.is_empty() && !link.contains("://"));
    let separators = |c: char| c.is_whitespace() || "`()[]{}<>,;:|\"'#│├└─*".contains(c);
    let words = text.split(separators).map(|word| word.trim_end_matches('.'));
    let words = words.filter(|word| places.iter().any(|place| word.starts_with(place)));
    // `NNNN` and `…` stand for something.
    let all = links.chain(words).filter(|path| !path.contains("NNNN") && !path.contains('…'));
    all.map(str::to_owned).collect()
}

/// Checks a document's length and the paths it names; links are relative to its directory.
#[track_caller]
fn sound(document: &str, most_lines: usize) {
    let text = read(document);
    let lines = text.lines().count();
    assert!(
        lines <= most_lines,
        "{document} has {lines} lines, more than the {most_lines} people read"
    );
    let directory = root().join(document).parent().unwrap().to_owned();
    let missing = named_paths(&text)
        .into_iter()
        .filter(|path| !root().join(path).exists() && !directory.join(path).exists());
    none(&missing.collect::<Vec<_>>(), &format!("{document} names what does not exist:"));
}

/// The declared type of a line at module level, of any visibility.
fn declared_type(line: &str) -> Option<&str> {
    let line = match line.strip_prefix("pub") {
        Some(rest) if rest.starts_with('(') => rest.split_once(") ")?.1,
        Some(rest) => rest.trim_start(),
        None => line,
    };
    let line = line.strip_prefix("unsafe ").unwrap_or(line);
    let kinds = ["struct ", "enum ", "trait ", "union ", "type "];
    let rest = kinds.iter().find_map(|kind| line.strip_prefix(kind))?;
    rest.split(|c: char| !c.is_alphanumeric() && c != '_').next()
}

/// Whoever reads a name in a crate must not have to ask which of two is meant.
#[test]
fn a_type_name_stands_once_in_a_crate() {
    let mut seen: BTreeMap<(PathBuf, String), Vec<String>> = BTreeMap::new();
    for path in sources() {
        let home = path.ancestors().find(|folder| root().join(folder).join("Cargo.toml").exists());
        let home = home.expect("every source belongs to a crate").to_owned();
        for name in code(&path).lines().filter_map(declared_type) {
            let place = seen.entry((home.clone(), name.to_owned())).or_default();
            place.push(path.display().to_string());
        }
    }
    assert!(seen.len() > 300, "the declarations were found: {}", seen.len());
    // Every program of the examples is a crate of its own.
    let twice = seen.iter().filter(|((home, _), at)| at.len() > 1 && !home.ends_with("examples"));
    let twice: Vec<_> = twice.map(|((_, name), at)| format!("{name}: {}", at.join(", "))).collect();
    none(&twice, "A type name stands once in a crate, whatever its visibility. But:");
}

/// Identifiers, keys and phrases that were given up for the terms of the glossary in ARCHITECTURE.md. They
/// are sought as whole words. The changelog and the decisions may tell of them.
const OLD_WORDS: [&str; 32] = [
    "adopted",
    "aides",
    "cancelintent",
    "carrier",
    "doors",
    "fitness",
    "guards",
    "handed on",
    "heed",
    "inflight",
    "intents",
    "is no error",
    "lanes",
    "look-ahead",
    "lookahead",
    "lost_slots",
    "neighbour",
    "pace",
    "parcel",
    "questions",
    "say_again",
    "set aside",
    "settles any more",
    "single out",
    "slots_lost",
    "so many go together",
    "surplus",
    "took back",
    "trial",
    "wish",
    "wishes",
    "worker.slots",
];

#[test]
fn old_words_do_not_come_back() {
    let documents =
        files("docs", ".md").into_iter().filter(|path| !path.starts_with("docs/decisions"));
    let pages = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"].map(PathBuf::from);
    let settings = [files("deploy", ""), files("examples", ".toml")].concat();
    let this = Path::new("tests/src/tidy.rs");
    let all = sources().into_iter().filter(|path| path != this);
    let mut found = vec![];
    for path in all.chain(documents).chain(pages).chain(settings) {
        // Decisions keep the names of their files.
        let files = ["kept-wish", "guards-that-can-be-switched-off"];
        let text =
            files.iter().fold(read(&path).to_lowercase(), |text, name| text.replace(name, ""));
        for word in OLD_WORDS {
            let inside = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
            let stands = text.match_indices(word).any(|(at, _)| {
                let (before, after) = (&text[..at], &text[at + word.len()..]);
                !inside(before.chars().next_back()) && !inside(after.chars().next())
            });
            if stands {
                found.push(format!("{}: {word}", path.display()));
            }
        }
    }
    none(&found, "The glossary has another word for it. Found again:");
}

/// ARCHITECTURE.md tells a task's life as functions and where they stand, and it is worth reading only while
/// that is true and short.
#[test]
fn the_life_of_a_task_is_short_and_true() {
    let text = read("ARCHITECTURE.md");
    let (_, life) = text.split_once("## A task's life").expect("it has the section");
    let (life, _) = life.split_once("\n## ").expect("another section follows");
    let mut wrong = vec![];
    let mut places = BTreeSet::new();
    let mut functions = BTreeMap::new();
    let mut rest = life;
    while let Some((before, after)) = rest.split_once("` (`") {
        let (path, after) = after.split_once('`').expect("the path ends");
        let name = before.rsplit(['`', ':']).next().unwrap_or_default();
        places.insert(path.to_owned());
        if name.starts_with(char::is_lowercase) && !name.contains(' ') {
            functions.insert((path.to_owned(), name.to_owned()), length_of(path, name));
        }
        rest = after;
    }
    assert!(functions.len() > 12, "the functions were found: {functions:?}");
    for ((path, name), length) in &functions {
        match length {
            None => wrong.push(format!("{path} has no function {name}")),
            Some(lines) if *lines > 60 => wrong.push(format!("{name} has {lines} lines")),
            Some(_) => {}
        }
    }
    if places.len() > 30 || functions.len() > 45 {
        wrong.push(format!("{} files and {} functions", places.len(), functions.len()));
    }
    none(&wrong, "A task's life is at most 30 files and 45 functions of at most 60 lines. But:");

    let mut wrong = vec![];
    for (path, name, calls) in CALLS {
        let body = body_of(path, name).unwrap_or_else(|| panic!("{path} has no function {name}"));
        let mut rest = &*body;
        for call in calls {
            match rest.split_once(&format!("{call}(")) {
                Some((_, after)) => rest = after,
                None => wrong.push(format!("{name} in {path}: {call}")),
            }
        }
    }
    none(
        &wrong,
        "A task's life is a chain of calls in the order of the text. Missing or too early:",
    );
}

/// What the functions in a task's life call, in order. Between processes and tasks there is no call.
const CALLS: [(&str, &str, &[&str]); 17] = [
    ("producer/src/producer.rs", "submit", &["submit_in"]),
    (
        "producer/src/producer.rs",
        "submit_in",
        &["prepare", "require_queue", "expect", "publish_task"],
    ),
    ("producer/src/producer.rs", "publish_task", &["coalescer.submit"]),
    ("producer/src/submit/coalesce.rs", "submit", &["dispatch.send"]),
    ("producer/src/submit/dispatch.rs", "send", &["outgoing", "publish_within"]),
    ("producer/src/submit/dispatch.rs", "outgoing", &["task::encode", "bundle::encode"]),
    ("worker/src/intake/mod.rs", "intake", &["start_turn", "receive"]),
    ("worker/src/intake/mod.rs", "start_turn", &["take_turn"]),
    ("worker/src/intake/mod.rs", "take_turn", &["attempt"]),
    ("worker/src/run/mod.rs", "attempt", &["steps", "settle"]),
    ("worker/src/run/mod.rs", "steps", &["validate", "admit", "run", "decide", "settle", "build"]),
    ("worker/src/run/mod.rs", "run", &["begin_lease", "execute"]),
    ("worker/src/settle/driver.rs", "run", &["confirm", "settle", "flush"]),
    ("collector/src/ingest/mod.rs", "run", &["gather", "pass_on"]),
    ("collector/src/ingest/mod.rs", "commit_and_ack", &["commit", "ack"]),
    ("collector/src/rules/aggregate.rs", "apply", &["report", "letter", "settle_batches"]),
    ("collector/src/outbox/mod.rs", "relay_slice", &["send", "delete"]),
];

/// How many lines a function has, from its name to the brace that closes it.
fn length_of(path: &str, name: &str) -> Option<usize> {
    body_of(path, name).map(|body| body.lines().count())
}

/// The first function of this name in a file, with its head.
fn body_of(path: &str, name: &str) -> Option<String> {
    let text = read(path);
    let lines: Vec<_> = text.lines().collect();
    let is_head =
        |line: &&str| ["(", "<"].iter().any(|next| line.contains(&format!("fn {name}{next}")));
    let start = lines.iter().position(is_head)?;
    let indent = lines[start].len() - lines[start].trim_start().len();
    let close = format!("{}}}", " ".repeat(indent));
    let end = lines[start..].iter().position(|line| *line == close)?;
    Some(lines[start..=start + end].join("\n"))
}

#[test]
fn the_readme_is_short_and_true() {
    sound("README.md", 120);
}

#[test]
fn the_map_is_short_and_true() {
    sound("ARCHITECTURE.md", 250);
}

#[test]
fn the_other_documents_name_what_exists() {
    for document in files("docs", ".md") {
        sound(&document.display().to_string(), 1_000);
    }
    sound("CONTRIBUTING.md", 200);
}

#[test]
fn the_documents_name_tests_that_exist() {
    let mut missing = vec![];
    for document in files("docs", ".md") {
        let text = read(&document);
        // `module::test` in backticks, as docs/reliability.md names what holds a promise.
        for (module, test) in text.split('`').filter_map(|word| word.split_once("::")) {
            let source = format!("tests/src/{module}.rs");
            if root().join(&source).exists() && !read(&source).contains(&format!("fn {test}(")) {
                missing.push(format!("{}: {module}::{test}", document.display()));
            }
        }
    }
    none(&missing, "A promise whose test is gone is held by nothing:");
}

/// `Type::variant` in backticks, and `file.rs` (`test`), as documents name what is in the code.
#[test]
fn the_documents_name_code_that_exists() {
    let code: String = sources().iter().map(read).collect();
    let words: BTreeSet<&str> = code.split(|c: char| !c.is_alphanumeric() && c != '_').collect();
    let pages = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"].map(PathBuf::from);
    let documents =
        files("docs", ".md").into_iter().filter(|path| !path.starts_with("docs/decisions"));
    let (mut missing, mut found) = (vec![], 0);
    for document in documents.chain(pages) {
        let text = read(&document);
        for span in text.split('`').skip(1).step_by(2) {
            let is_name = |part: &str| {
                !part.is_empty() && part.chars().all(|c| c.is_alphanumeric() || c == '_')
            };
            if span.starts_with(char::is_uppercase) && span.contains("::") {
                let parts: Vec<_> = span.split("::").collect();
                if parts.iter().all(|part| is_name(part)) {
                    found += 1;
                    if !parts.iter().all(|part| words.contains(part)) {
                        missing.push(format!("{}: {span}", document.display()));
                    }
                }
            }
        }
        for (before, after) in text.match_indices(".rs` (`").map(|(at, _)| text.split_at(at)) {
            let path = before.rsplit('`').next().unwrap_or_default().to_owned() + ".rs";
            let name = after[".rs` (`".len()..].split('`').next().unwrap_or_default();
            if is_function(name) && root().join(&path).exists() {
                found += 1;
                if !read(&path).contains(&format!("fn {name}(")) {
                    missing.push(format!("{}: {name} in {path}", document.display()));
                }
            }
        }
    }
    assert!(found > 40, "names were found: {found}");
    none(&missing, "Documents name code that is there. But:");
}

fn is_function(name: &str) -> bool {
    name.starts_with(char::is_lowercase) && name.chars().all(|c| c.is_alphanumeric() || c == '_')
}

#[test]
fn the_table_of_contents_of_the_tests_is_complete() {
    let main = read("tests/src/main.rs");
    let modules = fs::read_dir(root().join("tests/src")).unwrap().flatten();
    let names =
        modules.map(|entry| entry.file_name().to_string_lossy().trim_end_matches(".rs").to_owned());
    let missing = names.filter(|name| name != "main" && !main.contains(&format!("mod {name};")));
    none(&missing.collect::<Vec<_>>(), "A module that main.rs does not name is never run:");
}
