//! The example on the bundled model, and what it is made of.

use std::process::{Command, Output};

fn root() -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn run(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kbit-embed"));
    command
        .current_dir(root())
        .args(arguments)
        .envs(environment.iter().copied());
    command
        .output()
        .expect("the example was built beside this test")
}

const MODEL: &str = "python/kbit/models/stories";

#[test]
fn continues_a_prompt_with_the_same_ids_everywhere() {
    let ids = |environment: &[(&str, &str)]| {
        let done = run(&[MODEL, "40", "1", "300", "12"], environment);
        assert!(
            done.status.success(),
            "{}",
            String::from_utf8_lossy(&done.stderr)
        );
        let text = String::from_utf8(done.stdout).expect("numbers");
        text.split_whitespace()
            .map(|id| id.parse::<u32>().expect("an id"))
            .collect::<Vec<_>>()
    };
    let expected = ids(&[]);
    assert_eq!(expected.len(), 40);
    assert!(expected.iter().all(|&id| id < 2048));
    assert!(expected.iter().any(|&id| id != expected[0]));
    assert_eq!(ids(&[("KBIT_ISA", "scalar")]), expected);
    assert_eq!(ids(&[("KBIT_NUM_THREADS", "1")]), expected);
}

#[test]
fn says_what_is_wrong() {
    for (arguments, words) in [
        (&["nowhere", "4", "1"][..], "nowhere"),
        (
            &[MODEL, "4", "2048"],
            "token id 2048 at 0 is outside the vocabulary of 2048",
        ),
        (&[MODEL, "4"], "at least one token"),
        (&[MODEL, "4", "x"], "invalid digit"),
        (&[MODEL], "usage"),
    ] {
        let done = run(arguments, &[]);
        let text = String::from_utf8_lossy(&done.stderr);
        assert!(
            done.status.code() == Some(1) && text.contains(words),
            "{arguments:?}: {text}"
        );
    }
}

#[test]
fn needs_neither_python_nor_a_graphics_driver() {
    let arguments = [
        "tree",
        "--offline",
        "-p",
        "kbit-embed",
        "-e",
        "normal",
        "--prefix",
        "none",
    ];
    let done = Command::new(env!("CARGO"))
        .current_dir(root())
        .args(arguments)
        .output()
        .expect("cargo");
    assert!(
        done.status.success(),
        "{}",
        String::from_utf8_lossy(&done.stderr)
    );
    let tree = String::from_utf8(done.stdout).expect("names");
    assert!(tree.contains("kbit-model") && tree.contains("kbit-cpu"));
    for name in ["pyo3", "wgpu", "numpy"] {
        assert!(!tree.contains(name), "{name} in\n{tree}");
    }
}
