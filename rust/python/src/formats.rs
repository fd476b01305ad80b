//! Other people's formats: packed safetensors dialects in, GGUF out.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use kbit_tensor::gguf::{Array, Strings, Value};
use kbit_tensor::import::{PackedOptions, Parts};
use kbit_tensor::{GgufTensor, Transform};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict, PyFloat, PyInt, PyList, PyString, PyTuple};

use crate::error::interruptible;
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

/// (name, weights, stacked, rope).
type Planned = (String, Vec<Py<Weight>>, bool, Option<(usize, usize)>);

#[pyfunction]
pub(crate) fn save_gguf(
    py: Python<'_>,
    path: PathBuf,
    metadata: &Bound<'_, PyDict>,
    tensors: Vec<Planned>,
) -> PyResult<BTreeMap<String, &'static str>> {
    let metadata: Vec<(String, Value)> = metadata
        .iter()
        .map(|(key, found)| Ok((key.extract()?, value(&found)?)))
        .collect::<PyResult<_>>()?;
    let tensors: Vec<_> = tensors
        .into_iter()
        .map(|(name, parts, stacked, rope)| {
            let parts: Vec<_> = parts.iter().map(|part| part.get().weight.clone()).collect();
            (name, parts, stacked, rope)
        })
        .collect();
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
    if found.is_instance_of::<PyString>() {
        return Ok(Value::String(found.extract()?));
    }
    Ok(Value::Array(array(found.cast::<PyList>().map_err(
        |_| {
            PyTypeError::new_err(format!(
                "metadata values are bool, int, float, str or lists, not {}",
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
