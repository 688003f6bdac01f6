//! Every decoder against bytes that nobody should send: the committed corpus, mutations of it, and
//! giants that are small on the wire and large in memory.
//!
//! The targets are those of libFuzzer (`fuzz/targets.rs`). They run in a process of their own, whose
//! memory and processor time are its alone.

#[path = "../../fuzz/targets.rs"]
mod targets;

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use fastrand::Rng;
use targets::{TARGETS, Target};

use crate::harness::root;

/// One input may take so much memory, beyond what it is itself,
const MOST_KIB: u64 = 64 * 1024;
/// and so long on a processor, without optimization.
const MOST_MILLIS: u64 = 50;
/// So many mutations of each target's corpus.
const MUTATIONS: u32 = if cfg!(feature = "soak") { 2_000_000 } else { 20_000 };
/// Larger inputs are replayed and not mutated.
const MUTATED_BYTES: usize = 4_096;

/// The inputs of one target, by name.
fn corpus(target: &str) -> Vec<(String, Vec<u8>)> {
    let directory = root().join("fuzz/corpus").join(target);
    let entries = fs::read_dir(&directory).unwrap_or_else(|_| panic!("{}", directory.display()));
    let paths = entries.flatten().map(|entry| entry.path());
    let mut inputs: Vec<_> =
        paths.map(|path: PathBuf| (name(&path), fs::read(&path).unwrap())).collect();
    inputs.sort();
    assert!(inputs.len() >= 5, "{target} has a corpus");
    inputs
}

fn name(path: &std::path::Path) -> String {
    path.file_name().unwrap().to_string_lossy().into_owned()
}

/// Processor time of this thread so far.
fn millis() -> u64 {
    let stat = fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    stat.split(' ').next().unwrap().parse::<u64>().unwrap() / 1_000_000
}

/// One line of /proc/self/status, in KiB.
fn status(key: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
    line.trim_start_matches(':').trim().split(' ').next().unwrap().parse().unwrap()
}

/// How many KiB `work` needed at most, beyond what was there before.
fn peak(work: impl FnOnce()) -> u64 {
    // "5" lets the high-water mark begin anew.
    fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = status("VmRSS");
    work();
    status("VmHWM").saturating_sub(before)
}

fn try_input(target: Target, name: &str, bytes: &[u8]) {
    let begun = millis();
    let kib = peak(|| target(bytes));
    let took = millis() - begun;
    assert!(kib <= MOST_KIB, "{name} took {kib} KiB");
    assert!(took <= MOST_MILLIS.max(bytes.len() as u64 / 4_096), "{name} took {took} ms");
}

/// Changes a few places of an input, or takes over a piece of another one.
fn mutate(bytes: &mut Vec<u8>, other: &[u8], rng: &mut Rng) {
    for _ in 0..=rng.usize(..4) {
        let place = rng.usize(..=bytes.len());
        let end = place + rng.usize(..=(bytes.len() - place).min(16));
        match rng.u8(..7) {
            0 if place < bytes.len() => bytes[place] ^= 1 << rng.u8(..8),
            1 if place < bytes.len() => {
                bytes[place] = *rng.choice(&[0, 1, 0x7f, 0x80, 0xfb, 0xfd, 0xff]).unwrap();
            }
            2 => bytes.truncate(place),
            3 => drop(bytes.drain(place..end)),
            4 => drop(bytes.splice(place..place, bytes[place..end].to_vec())),
            5 if !other.is_empty() => {
                let from = rng.usize(..other.len());
                let to = from + rng.usize(..=(other.len() - from).min(64));
                drop(bytes.splice(place..end, other[from..to].iter().copied()));
            }
            _ => bytes.insert(place, rng.u8(..)),
        }
    }
}

fn try_mutations(target: Target, target_name: &str, inputs: &[(String, Vec<u8>)]) {
    let small: Vec<_> = inputs
        .iter()
        .map(|(_, bytes)| bytes)
        .filter(|bytes| bytes.len() <= MUTATED_BYTES)
        .collect();
    let seed =
        std::env::var("GARENNE_FUZZ_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    for number in 0..MUTATIONS {
        let mut rng = Rng::with_seed(seed + u64::from(number));
        let mut bytes = (*rng.choice(&small).unwrap()).clone();
        let other = *rng.choice(&small).unwrap();
        mutate(&mut bytes, other, &mut rng);
        let begun = millis();
        let done = std::panic::catch_unwind(|| target(&bytes));
        let took = millis() - begun;
        if done.is_err() || took > MOST_MILLIS {
            let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            panic!("{target_name}, mutation {number} with seed {seed}, {took} ms: {hex}");
        }
    }
}

/// Small on the wire, large once decoded, if nobody minds.
fn giants() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let most = garenne_common::wire::MAX_BODY_BYTES;
    let json = 1024 * 1024;
    let zeros = |length: usize| "0,".repeat(length / 2);
    let with_header = |header: &[u8], body: &[u8]| {
        let length = u16::try_from(header.len()).unwrap().to_be_bytes();
        [&length[..], header, body].concat()
    };
    let task = [&[0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0x20, 1, b'a'][..]].concat();
    let task = with_header(&task, format!("[{}0]", zeros(most - 4)).as_bytes());
    // Reports of four bytes: a sealed batch without a name.
    let count = u32::try_from(most / 4 - 10).unwrap();
    let reports =
        [&[1, 252][..], &count.to_le_bytes(), &[3, 0, 0, 0].repeat(count as usize)].concat();
    let output = format!(r#"[{{"report":"finished","output":[{}0]}}]"#, zeros(json - 100));
    let sealed = format!(
        "[{}0]",
        r#"{"report":"batch_sealed","batch":"b","count":1,"at":"1ms"},"#.repeat(16_000)
    );
    let ids = format!(r#"{{"query":"results","ids":[{}"a"]}}"#, r#""a","#.repeat(json / 4 - 10));
    let deep = format!(r#"{{"query":{}"#, "[".repeat(json - 10));
    let headers = format!(
        r#"{{"version":"1","headers":[{}["a",{{"bool":true}}]]}}"#,
        r#"["",{"bool":true}],"#.repeat(50_000)
    );
    vec![
        ("task", "16 MiB of zeros", task.clone()),
        ("dead", "16 MiB of zeros", task),
        ("reports_bincode", "four million reports", reports),
        ("reports_json", "half a million zeros", output.into_bytes()),
        ("reports_json", "many reports", sealed.into_bytes()),
        ("reports_json", "more than may be looked into", vec![b'['; most]),
        ("query", "a quarter of a million ids", ids.into_bytes()),
        ("query", "deep", deep.into_bytes()),
        ("notice", "more than may be looked into", vec![b'{'; most]),
        ("response", "deep", vec![b'['; most]),
        ("envelope", "fifty thousand headers", headers.into_bytes()),
    ]
}

/// Runs one of the ignored tests below in a process of its own.
fn in_a_process(test: &str) {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", test, "--ignored", "--nocapture", "--test-threads=1"]);
    let done = child.output().unwrap();
    let said =
        String::from_utf8_lossy(&done.stderr).into_owned() + &String::from_utf8_lossy(&done.stdout);
    assert!(done.status.success() && said.contains("1 passed"), "{said}");
}

#[test]
fn no_bytes_of_the_corpus_break_a_decoder() {
    in_a_process("fuzz::child_replays_the_corpus");
}

#[test]
fn no_mutation_of_the_corpus_breaks_a_decoder() {
    in_a_process("fuzz::child_tries_mutations");
}

#[test]
fn no_giant_takes_more_memory_than_it_should() {
    in_a_process("fuzz::child_decodes_giants");
}

#[test]
#[ignore = "started by no_bytes_of_the_corpus_break_a_decoder"]
fn child_replays_the_corpus() {
    for (name, target) in TARGETS {
        for (input, bytes) in corpus(name) {
            try_input(*target, &format!("{name}/{input}"), &bytes);
        }
    }
}

#[test]
#[ignore = "started by no_mutation_of_the_corpus_breaks_a_decoder"]
fn child_tries_mutations() {
    for (name, target) in TARGETS {
        try_mutations(*target, name, &corpus(name));
    }
    assert!(status("VmHWM") < 4 * MOST_KIB);
}

#[test]
#[ignore = "started by no_giant_takes_more_memory_than_it_should"]
fn child_decodes_giants() {
    for (name, giant, bytes) in giants() {
        let (_, target) = TARGETS.iter().find(|(known, _)| *known == name).unwrap();
        // The target takes the input over: a body that has arrived is in memory once.
        let copies = bytes.len() as u64 / 1024 * 3;
        let kib = peak(|| target(&bytes));
        assert!(kib <= MOST_KIB.max(copies + 16 * 1024), "{name}, {giant}: {kib} KiB");
    }
}
