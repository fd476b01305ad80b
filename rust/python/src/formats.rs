//! Other people's formats: packed safetensors dialects in, GGUF out.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use kbit_tensor::gguf::{Array, Strings, Value};
use kbit_tensor::import::{PackedOptions, Parts};
use kbit_tensor::{GgufTensor, Tensor, Transform};
use numpy::{PyReadonlyArrayDyn, PyUntypedArrayMethods};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyBytes, PyDict, PyFloat, PyInt, PyList, PyString, PyTuple};

use crate::error::{interruptible, raise};
use crate::file::TensorFile;
use crate::weight::{Weight, transform};

#[pyfunction]
#[pyo3(
    signature = (dialect, parts, *, transforms = Vec::new(), bits = None, block = None),
    text_signature = "(dialect, parts, *, transforms=(), bits=None, block=None)"
)]
pub(crate) fn load_packed(
    py: Python<'_>,
    dialect: String,
    parts: BTreeMap<String, (Py<TensorFile>, String)>,
    transforms: Vec<Bound<'_, PyTuple>>,
    bits: Option<usize>,
    block: Option<(usize, usize)>,
) -> PyResult<Weight> {
    let steps: Vec<Transform> = transforms.iter().map(transform).collect::<PyResult<_>>()?;
    let files: Vec<(String, Arc<kbit_tensor::TensorFile>, String)> = parts
        .into_iter()
        .map(|(part, (file, name))| (part, file.get().file.clone(), name))
        .collect();
    let k = interruptible(py, move |_| {
        let parts: Parts<'_> = files
            .iter()
            .map(|(part, file, name)| (part.clone(), (&**file, name.as_str())))
            .collect();
        kbit_tensor::import::load_packed(&dialect, &parts, &steps, &PackedOptions { bits, block })
    })?;
    Ok(Weight {
        weight: kbit_tensor::Weight::Quantised(k),
    })
}

/// A weight, or a float32 array that becomes a dense one.
#[derive(FromPyObject)]
pub(crate) enum Part<'py> {
    Weight(Py<Weight>),
    Array(PyReadonlyArrayDyn<'py, f32>),
}

impl Part<'_> {
    fn weight(&self) -> PyResult<kbit_tensor::Weight> {
        match self {
            Self::Weight(weight) => Ok(weight.get().weight.clone()),
            Self::Array(array) => {
                let values: Vec<f32> = array.as_array().iter().copied().collect();
                Tensor::from_f32(array.shape(), &values)
                    .map(kbit_tensor::Weight::Dense)
                    .map_err(raise)
            }
        }
    }
}

/// (name, parts, stacked, rope).
pub(crate) type Planned<'py> = (String, Vec<Part<'py>>, bool, Option<(usize, usize)>);

#[pyfunction]
pub(crate) fn save_gguf(
    py: Python<'_>,
    path: PathBuf,
    metadata: &Bound<'_, PyDict>,
    tensors: Vec<Planned<'_>>,
) -> PyResult<BTreeMap<String, &'static str>> {
    let metadata: Vec<(String, Value)> = metadata
        .iter()
        .map(|(key, found)| Ok((key.extract()?, value(&found)?)))
        .collect::<PyResult<_>>()?;
    let tensors: Vec<(String, Vec<kbit_tensor::Weight>, bool, _)> = tensors
        .into_iter()
        .map(|(name, parts, stacked, rope)| {
            let parts = parts
                .iter()
                .map(Part::weight)
                .collect::<PyResult<Vec<_>>>()?;
            Ok((name, parts, stacked, rope))
        })
        .collect::<PyResult<_>>()?;
    let written = interruptible(py, move |_| {
        let tensors: Vec<GgufTensor<'_>> = tensors
            .iter()
            .map(|(name, parts, stacked, rope)| GgufTensor {
                name: name.clone(),
                parts: parts.iter().collect(),
                stacked: *stacked,
                rope: *rope,
            })
            .collect();
        kbit_tensor::save_gguf(path, &metadata, &tensors)
    })?;
    Ok(written
        .into_iter()
        .map(|tensor| (tensor.name, tensor.kind.name()))
        .collect())
}

/// A Python value as the GGUF type that llama.cpp reads it as: u32 for whole numbers, f32 for others.
fn value(found: &Bound<'_, PyAny>) -> PyResult<Value> {
    if let Ok(v) = found.cast::<PyBool>() {
        return Ok(Value::Bool(v.is_true()));
    }
    if found.is_instance_of::<PyInt>() {
        let wide: i128 = found.extract()?;
        return u32::try_from(wide)
            .map(Value::U32)
            .or_else(|_| i32::try_from(wide).map(Value::I32))
            .or_else(|_| i64::try_from(wide).map(Value::I64))
            .or_else(|_| u64::try_from(wide).map(Value::U64))
            .map_err(|_| PyValueError::new_err(format!("{wide} does not fit 64 bits")));
    }
    if found.is_instance_of::<PyFloat>() {
        return Ok(Value::F32(found.extract()?));
    }
    if let Ok(bytes) = found.cast::<PyBytes>() {
        return Ok(Value::Array(Array::U8(bytes.as_bytes().to_vec())));
    }
    if found.is_instance_of::<PyString>() {
        return Ok(Value::String(found.extract()?));
    }
    Ok(Value::Array(array(found.cast::<PyList>().map_err(
        |_| {
            PyTypeError::new_err(format!(
                "metadata values are bool, int, float, str, bytes or lists, not {}",
                found.get_type()
            ))
        },
    )?)?))
}

/// A list as the array that llama.cpp reads it as: i32 for whole numbers, f32 for others.
fn array(list: &Bound<'_, PyList>) -> PyResult<Array> {
    let all = |is: &dyn Fn(&Bound<'_, PyAny>) -> bool| list.iter().all(|v| is(&v));
    if all(&|v| v.is_instance_of::<PyBool>()) && !list.is_empty() {
        return Ok(Array::Bool(list.extract()?));
    }
    if all(&|v| v.is_instance_of::<PyString>()) {
        let strings: Vec<String> = list.extract()?;
        return Ok(Array::Strings(Strings::from_iter(strings)));
    }
    if all(&|v| v.is_instance_of::<PyInt>()) {
        return list
            .extract()
            .map(Array::I32)
            .or_else(|_| list.extract().map(Array::I64));
    }
    if all(&|v| v.is_instance_of::<PyList>()) {
        let arrays = list.iter().map(|v| array(v.cast::<PyList>()?));
        return Ok(Array::Arrays(arrays.collect::<PyResult<_>>()?));
    }
    Ok(Array::F32(list.extract()?))
}
