//! Tasks read files below one directory that the worker's operator has named, and none without it.

use std::os::unix::fs::symlink;

use garenne_common::DeadReason;
use serde_json::json;

use crate::harness::{Warren, message};

#[tokio::test(flavor = "multi_thread")]
async fn without_a_root_no_task_reads_a_file() {
    let warren = Warren::new().await;
    let _worker = warren.worker().start().await;
    let amqp = warren.amqp().await;
    let mut dead = amqp.dead().await;
    for name in ["file.sha256", "text.count_words"] {
        amqp.task(message(name, name, &json!({ "path": "/etc/hostname" }))).await;
        let letter = dead.letter().await;
        assert_eq!(letter.reason, DeadReason::Fatal);
        assert!(letter.error.contains("set worker.file_root"), "{}", letter.error);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn below_the_root_files_are_read_and_nothing_leads_out_of_it() {
    let warren = Warren::new().await;
    let amqp = warren.amqp().await;
    let (secret, root) = (warren.file("secret", "s"), warren.path("root"));
    std::fs::create_dir(&root).unwrap();
    std::fs::write(root.join("file"), "abc").unwrap();
    symlink(&secret, root.join("leak")).unwrap();
    let _worker = warren.worker().arg("--file-root").arg(&root).start().await;
    let (mut dead, mut results) = (amqp.dead().await, amqp.results().await);
    for path in ["file", root.join("file").to_str().unwrap()] {
        amqp.task(message("file.sha256", path, &json!({ "path": path }))).await;
        let output = results.result().await.output.unwrap().to_json_value();
        assert_eq!(
            output["sha256"],
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }
    for path in ["leak", "../secret", secret.to_str().unwrap(), "/etc/hostname"] {
        amqp.task(message("file.sha256", path, &json!({ "path": path }))).await;
        let letter = dead.letter().await;
        assert_eq!(letter.reason, DeadReason::Fatal);
        assert!(letter.error.contains("not below worker.file_root"), "{}", letter.error);
    }
}
