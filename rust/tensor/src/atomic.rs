//! Files that are there whole or not at all.

use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Error, Result};

/// Removes the temporary file unless it was renamed.
struct Temporary(Option<PathBuf>);

impl Drop for Temporary {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            // Nothing can be done about a file that cannot be removed, and the first error is the one to report.
            std::fs::remove_file(path).ok();
        }
    }
}

/// Writes a file through `content`: into a temporary file of the same directory, which is synced to the disk, takes
/// the place of `path`, and is made durable there. Whatever happens, `path` holds the old content or all of the new.
///
/// # Errors
/// [`Error::Io`], and what `content` returns.
pub(crate) fn write(path: &Path, content: impl FnOnce(&mut Out) -> Result<()>) -> Result<()> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let name = path
        .file_name()
        .ok_or_else(|| Error::Argument(format!("{}: not the name of a file", path.display())))?;
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut prefix = OsString::from(".");
    prefix.push(name);
    prefix.push(".");
    let io = |e| Error::io(path, e);
    sweep(directory, &prefix);

    let (file, mut guard) = loop {
        let mut hidden = prefix.clone();
        let unique = COUNTER.fetch_add(1, Ordering::Relaxed);
        hidden.push(format!("{}-{unique}.tmp", std::process::id()));
        let temporary = directory.join(hidden);
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&temporary)
            .map_err(io)?;
        // The lock says that somebody writes it. Where a file system has none, files of the dead stay.
        file.lock().ok();
        // Before the lock was held, somebody's sweep may have taken the file for one.
        if temporary.exists() {
            break (file, Temporary(Some(temporary)));
        }
    };
    let mut out = Out {
        path: path.to_owned(),
        file: BufWriter::with_capacity(1 << 20, file),
        at: 0,
    };
    content(&mut out)?;
    let file = out.file.into_inner().map_err(|e| io(e.into_error()))?;
    file.sync_all().map_err(io)?;
    if let Some(temporary) = &guard.0 {
        std::fs::rename(temporary, path).map_err(io)?;
    }
    guard.0 = None;
    sync_directory(directory).map_err(io)
}

/// Removes temporary files that nobody holds a lock on: their writers died.
fn sweep(directory: &Path, prefix: &OsStr) {
    // What cannot be listed or removed does no harm.
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.as_encoded_bytes();
        if name.starts_with(prefix.as_encoded_bytes())
            && name.ends_with(b".tmp")
            && let Ok(file) = OpenOptions::new().write(true).open(entry.path())
            && file.try_lock().is_ok()
        {
            std::fs::remove_file(entry.path()).ok();
        }
    }
}

#[cfg(unix)]
fn sync_directory(directory: &Path) -> std::io::Result<()> {
    File::open(directory)?.sync_all()
}

/// Elsewhere a directory cannot be opened as a file; renaming is durable on its own there.
#[cfg(not(unix))]
fn sync_directory(_directory: &Path) -> std::io::Result<()> {
    Ok(())
}

/// A file being written, with errors that name it.
pub(crate) struct Out {
    path: PathBuf,
    file: BufWriter<File>,
    at: u64,
}

impl Out {
    /// Bytes so far.
    pub(crate) fn at(&self) -> u64 {
        self.at
    }

    pub(crate) fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.at = self.at.saturating_add(bytes.len() as u64);
        self.file
            .write_all(bytes)
            .map_err(|e| Error::io(&self.path, e))
    }

    /// Zeros up to a multiple of `alignment`.
    pub(crate) fn pad(&mut self, alignment: u64) -> Result<()> {
        let missing = self.at.next_multiple_of(alignment).saturating_sub(self.at);
        self.put(&vec![0; usize::try_from(missing).unwrap_or(0)])
    }
}
