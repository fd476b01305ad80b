//! `TensorFile`: files of tensors, read on demand.

use std::path::PathBuf;
use std::sync::Arc;

use kbit_tensor::gguf::{Array, Value};
use kbit_tensor::{Container, DType, Tensor};
use numpy::{Element, PyArray1, PyArrayMethods};
use pyo3::IntoPyObjectExt;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyTuple};

use crate::error::{guard, interruptible, raise};

#[pyclass(frozen, module = "kbit._core")]
pub(crate) struct TensorFile {
    pub(crate) file: Arc<kbit_tensor::TensorFile>,
}

#[pymethods]
impl TensorFile {
    #[new]
    fn new(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        let file = interruptible(py, move |_| kbit_tensor::TensorFile::open(path))?;
        Ok(Self {
            file: Arc::new(file),
        })
    }

    #[getter]
    fn path(&self) -> &str {
        self.file.path()
    }

    #[getter]
    fn format(&self) -> &'static str {
        match self.file.container() {
            Container::Safetensors => "safetensors",
            Container::Gguf => "gguf",
        }
    }

    #[getter]
    fn metadata<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let all = PyDict::new(py);
        for (name, v) in self.file.metadata() {
            all.set_item(name, value(py, v)?)?;
        }
        Ok(all)
    }

    fn names(&self) -> Vec<&str> {
        self.file
            .tensors()
            .iter()
            .map(|t| t.name.as_str())
            .collect()
    }

    fn dtype(&self, name: &str) -> PyResult<&'static str> {
        guard(|| Ok(self.file.info(name).map_err(raise)?.stored.name()))
    }

    fn shape<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyTuple>> {
        guard(|| PyTuple::new(py, &self.file.info(name).map_err(raise)?.shape))
    }

    fn nbytes(&self, name: &str) -> PyResult<u64> {
        guard(|| Ok(self.file.info(name).map_err(raise)?.nbytes))
    }

    fn read<'py>(&self, py: Python<'py>, name: String) -> PyResult<Bound<'py, PyAny>> {
        let file = self.file.clone();
        let tensor = interruptible(py, move |_| file.read(&name))?;
        guard(|| array(py, &tensor))
    }

    fn __repr__(&self) -> String {
        format!(
            "TensorFile({:?}, {} tensors)",
            self.path(),
            self.file.tensors().len()
        )
    }
}

/// A value of GGUF's metadata as a Python object.
fn value<'py>(py: Python<'py>, value: &Value) -> PyResult<Bound<'py, PyAny>> {
    match value {
        Value::U8(v) => v.into_bound_py_any(py),
        Value::I8(v) => v.into_bound_py_any(py),
        Value::U16(v) => v.into_bound_py_any(py),
        Value::I16(v) => v.into_bound_py_any(py),
        Value::U32(v) => v.into_bound_py_any(py),
        Value::I32(v) => v.into_bound_py_any(py),
        Value::F32(v) => v.into_bound_py_any(py),
        Value::Bool(v) => v.into_bound_py_any(py),
        Value::String(v) => v.into_bound_py_any(py),
        Value::U64(v) => v.into_bound_py_any(py),
        Value::I64(v) => v.into_bound_py_any(py),
        Value::F64(v) => v.into_bound_py_any(py),
        Value::Array(v) => list(py, v),
    }
}

/// An array as a list. Depth is bounded by the reader.
fn list<'py>(py: Python<'py>, values: &Array) -> PyResult<Bound<'py, PyAny>> {
    match values {
        // A Vec<u8> would become bytes.
        Array::U8(v) => PyList::new(py, v.iter().map(|&x| u32::from(x))).map(Bound::into_any),
        Array::I8(v) => v.into_bound_py_any(py),
        Array::U16(v) => v.into_bound_py_any(py),
        Array::I16(v) => v.into_bound_py_any(py),
        Array::U32(v) => v.into_bound_py_any(py),
        Array::I32(v) => v.into_bound_py_any(py),
        Array::F32(v) => v.into_bound_py_any(py),
        Array::Bool(v) => v.into_bound_py_any(py),
        Array::U64(v) => v.into_bound_py_any(py),
        Array::I64(v) => v.into_bound_py_any(py),
        Array::F64(v) => v.into_bound_py_any(py),
        Array::Strings(v) => Ok(PyList::new(py, v.iter().collect::<Vec<&str>>())?.into_any()),
        Array::Arrays(v) => {
            let all = PyList::empty(py);
            for inner in v {
                all.append(list(py, inner)?)?;
            }
            Ok(all.into_any())
        }
    }
}

/// A tensor as an array of its own: native where NumPy has the dtype, float32 otherwise.
fn array<'py>(py: Python<'py>, tensor: &Tensor) -> PyResult<Bound<'py, PyAny>> {
    let shape = tensor.shape();
    match tensor.dtype() {
        DType::F32 => native(py, tensor, f32::from_le_bytes),
        DType::F64 => native(py, tensor, f64::from_le_bytes),
        DType::F16 => native(py, tensor, half::f16::from_le_bytes),
        DType::I8 => native(py, tensor, i8::from_le_bytes),
        DType::U8 => native(py, tensor, u8::from_le_bytes),
        DType::I16 => native(py, tensor, i16::from_le_bytes),
        DType::U16 => native(py, tensor, u16::from_le_bytes),
        DType::I32 => native(py, tensor, i32::from_le_bytes),
        DType::U32 => native(py, tensor, u32::from_le_bytes),
        DType::I64 => native(py, tensor, i64::from_le_bytes),
        DType::U64 => native(py, tensor, u64::from_le_bytes),
        DType::Bool => native(py, tensor, |[b]: [u8; 1]| b != 0),
        DType::BF16 | DType::F8E4M3 | DType::F8E5M2 => {
            shaped(py, py.detach(|| tensor.to_f32()), shape)
        }
    }
}

fn native<'py, T: Element + Send, const N: usize>(
    py: Python<'py>,
    tensor: &Tensor,
    read: impl Fn([u8; N]) -> T + Sync,
) -> PyResult<Bound<'py, PyAny>> {
    let bytes = tensor.bytes();
    let values = py.detach(|| bytes.as_chunks::<N>().0.iter().map(|b| read(*b)).collect());
    shaped(py, values, tensor.shape())
}

/// Values that become an array without a copy.
pub(crate) fn shaped<'py, T: Element>(
    py: Python<'py>,
    values: Vec<T>,
    shape: &[usize],
) -> PyResult<Bound<'py, PyAny>> {
    let (n, wanted) = (values.len(), shape.iter().product::<usize>());
    if n != wanted {
        return Err(PyValueError::new_err(format!(
            "{n} values for an array of shape {shape:?}"
        )));
    }
    Ok(PyArray1::from_vec(py, values)
        .reshape(shape.to_vec())?
        .into_any())
}
