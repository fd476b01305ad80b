//! Module `kbit._core`: numpy to slices and back, errors to exceptions, the GIL released. Nothing else; `_core.pyi`
//! documents everything here.
#![allow(
    clippy::needless_pass_by_value,
    reason = "PyO3 hands over what it extracted"
)]

mod engine;
mod error;
mod file;
mod formats;
mod info;
mod weight;

/// The Rust engine of kbit. Private: use the names of the package `kbit`.
#[pyo3::pymodule(gil_used = false)]
mod _core {
    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::engine::{Engine, Request, Token};
    #[pymodule_export]
    use crate::file::TensorFile;
    #[pymodule_export]
    use crate::formats::{load_packed, save_gguf};
    #[pymodule_export]
    use crate::info::{build_info, default_threads, gpu_adapters, isa, isas, limits};
    #[pymodule_export]
    use crate::weight::{Weight, load_weight, open_checkpoint, quantize, save_checkpoint};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        crate::error::register(module)?;
        // The stub says what is public.
        module.delattr("__all__")
    }
}
