//! See the crate description.
use pyo3::prelude::*;

/// The module.
#[pymodule]
mod _core {}
