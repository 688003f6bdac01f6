//! Every program of examples/ does what its reader is told.

use std::collections::BTreeSet;
use std::fs;

use crate::harness::{SOON, Warren, finish, root};

/// What an example needs beside a broker, and lines that it must print.
struct Example {
    name: &'static str,
    crew: bool,
    prints: &'static [&'static str],
}

const EXAMPLES: &[Example] = &[
    Example { name: "shared_task", crew: false, prints: &["Hello, Garenne!"] },
    Example {
        name: "batch",
        crew: true,
        prints: &[
            "3 of 3 succeeded",
            "6 words: to be or not to be",
            "3 words: whether 'tis nobler",
        ],
    },
    Example { name: "effect_once", crew: false, prints: &["balance after two executions: 100"] },
    Example {
        name: "command_task",
        crew: false,
        prints: &["text.sort: [\"apple\",\"fig\",\"pear\"]", "date.format: \"Monday\""],
    },
];

#[tokio::test(flavor = "multi_thread")]
async fn every_example_runs_and_prints_what_it_should() {
    for example in EXAMPLES {
        let warren = Warren::new().await;
        let _crew = if example.crew { Some(warren.crew().await) } else { None };
        let command = warren.command(&format!("examples/{}", example.name));
        let printed = finish(command, "", SOON).await.ok();
        for line in example.prints {
            assert!(
                printed.lines().any(|l| l == *line),
                "{}: {line:?} in\n{printed}",
                example.name
            );
        }
    }
}

#[test]
fn no_example_is_left_out() {
    let sources = fs::read_dir(root().join("examples")).unwrap().flatten();
    let names = sources.filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        Some(name.strip_suffix(".rs")?.to_owned())
    });
    let found: BTreeSet<_> = names.filter(|name| name != "lib").collect();
    let listed: BTreeSet<_> = EXAMPLES.iter().map(|example| example.name.to_owned()).collect();
    assert_eq!(found, listed);
}
