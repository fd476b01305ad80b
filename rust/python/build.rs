//! What `build_info` says about the build. Everything has an answer without git and outside a repository.

use std::process::Command;

fn main() {
    let commit = std::env::var("KBIT_COMMIT")
        .ok()
        .or_else(|| output("git", &["rev-parse", "HEAD"]));
    let rustc = output(
        &std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into()),
        &["--version"],
    );
    let fact = |name: &str| std::env::var(name).unwrap_or_else(|_| "unknown".into());
    println!(
        "cargo::rustc-env=KBIT_COMMIT={}",
        commit.unwrap_or_else(|| "unknown".into())
    );
    println!(
        "cargo::rustc-env=KBIT_RUSTC={}",
        rustc.unwrap_or_else(|| "unknown".into())
    );
    println!("cargo::rustc-env=KBIT_TARGET={}", fact("TARGET"));
    // PROFILE only tells release from debug; OUT_DIR is .../<profile>/build/<package>/out.
    let out = std::path::PathBuf::from(fact("OUT_DIR"));
    let profile = out.ancestors().nth(3).and_then(std::path::Path::file_name);
    let profile = profile
        .and_then(std::ffi::OsStr::to_str)
        .unwrap_or("unknown");
    println!("cargo::rustc-env=KBIT_PROFILE={profile}");
    println!("cargo::rerun-if-env-changed=KBIT_COMMIT");
    println!("cargo::rerun-if-changed=build.rs");
    // The commit moves with HEAD and with the branch it points to; a worktree or an sdist has no such folder here.
    if let Some(path) = output("git", &["rev-parse", "--git-path", "logs/HEAD"]) {
        println!("cargo::rerun-if-changed={path}");
    }
}

/// What a command prints, if it runs and succeeds.
fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let result = Command::new(program).args(arguments).output().ok()?;
    let text = String::from_utf8(result.stdout).ok()?.trim().to_string();
    (result.status.success() && !text.is_empty()).then_some(text)
}
