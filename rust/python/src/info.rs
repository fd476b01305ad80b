//! What this build and this machine are.

use std::collections::BTreeMap;

use pyo3::prelude::*;

use crate::error::{guard, raise};

#[pyfunction]
pub(crate) fn isas() -> Vec<&'static str> {
    kbit_simd::Isa::available()
        .into_iter()
        .map(kbit_simd::Isa::name)
        .collect()
}

#[pyfunction]
pub(crate) fn isa() -> PyResult<&'static str> {
    let wrong = |e: kbit_simd::IsaError| raise(kbit_tensor::Error::Argument(e.to_string()));
    guard(|| {
        kbit_simd::Isa::chosen()
            .map(kbit_simd::Isa::name)
            .map_err(wrong)
    })
}

#[pyfunction]
pub(crate) fn build_info() -> BTreeMap<&'static str, &'static str> {
    BTreeMap::from([
        ("version", env!("CARGO_PKG_VERSION")),
        ("commit", env!("KBIT_COMMIT")),
        ("profile", env!("KBIT_PROFILE")),
        ("target", env!("KBIT_TARGET")),
        ("rustc", env!("KBIT_RUSTC")),
        ("features", if cfg!(feature = "gpu") { "gpu" } else { "" }),
    ])
}

#[pyfunction]
#[pyo3(signature = (*, threads = 0, nbytes = 1 << 30, runs = 5))]
pub(crate) fn limits(
    py: Python<'_>,
    threads: usize,
    nbytes: usize,
    runs: usize,
) -> PyResult<BTreeMap<&'static str, f64>> {
    let threads = if threads == 0 {
        default_threads()?
    } else {
        threads
    };
    guard(|| {
        let isa = kbit_simd::Isa::chosen()
            .map_err(|e| raise(kbit_tensor::Error::Device(e.to_string())))?;
        let found = py
            .detach(|| kbit_cpu::limits::measure(isa, threads, nbytes, runs))
            .map_err(raise)?;
        Ok(BTreeMap::from([
            ("threads", found.threads as f64),
            ("read_bytes_per_second", found.read() * 1e9),
            ("int8_operations_per_second", found.int8 * 1e12),
        ]))
    })
}

#[pyfunction]
pub(crate) fn gpu_adapters(py: Python<'_>) -> PyResult<Vec<String>> {
    #[cfg(feature = "gpu")]
    return guard(|| Ok(py.detach(kbit_gpu::adapters)));
    #[cfg(not(feature = "gpu"))]
    guard(|| Ok(py.detach(Vec::new)))
}

#[pyfunction]
pub(crate) fn default_threads() -> PyResult<usize> {
    guard(|| kbit_cpu::default_threads().map_err(raise))
}
