//! The one error type. A message is a sentence that names both sides: what was wanted and what was found.

/// Result of everything in kbit that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong. Each variant is one Python exception (see `rust/python/src/error.rs`).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file, header or config that does not say what its format demands. Python: `ModelFormatError(ValueError)`.
    #[error("{0}")]
    Format(String),
    /// Well-formed, but not something kbit runs. Python: `UnsupportedModelError(NotImplementedError)`.
    #[error("{0}")]
    Unsupported(String),
    /// An argument out of its range. Python: `ValueError`.
    #[error("{0}")]
    Argument(String),
    /// More tokens than the context holds. Python: `ContextOverflowError(ValueError)`.
    #[error("{0}")]
    ContextOverflow(String),
    /// More memory than there is or was allowed. Python: `MemoryBudgetError(MemoryError)`.
    #[error("{0}")]
    Memory(String),
    /// A device that is missing or failed. Python: `DeviceError(RuntimeError)`.
    #[error("{0}")]
    Device(String),
    /// Stopped by the caller. Python: `GenerationCancelled`.
    #[error("generation was cancelled")]
    Cancelled,
    /// Reading or writing a file failed. Python: `OSError`.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
}

impl Error {
    /// Wraps an I/O error with the path it happened on.
    pub fn io(path: impl AsRef<std::path::Path>, source: std::io::Error) -> Self {
        Self::Io {
            path: path.as_ref().display().to_string(),
            source,
        }
    }
}
