//! `Weight`: quantising, loading, saving.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kbit_tensor::{
    Codebook, CodebookFormat, DType, Error, KTensor, Keep, Offset, QuantizeOptions, ScaleType,
    Scales, SubScale, Transform, View,
};
use numpy::{PyReadonlyArray1, PyReadonlyArray2};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyMapping, PyTuple};

use crate::error::{interruptible, raise};
use crate::file::{TensorFile, shaped};

#[pyclass(frozen, module = "kbit._core")]
pub(crate) struct Weight {
    pub(crate) weight: kbit_tensor::Weight,
}

impl Weight {
    fn k(&self) -> PyResult<&KTensor> {
        match &self.weight {
            kbit_tensor::Weight::Quantised(k) => Ok(k),
            kbit_tensor::Weight::Dense(t) => Err(PyValueError::new_err(format!(
                "a dense {} weight has no codes",
                t.dtype().name()
            ))),
        }
    }
}

#[pymethods]
impl Weight {
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.weight.shape())
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.weight.nbytes()
    }

    #[getter]
    fn bits(&self) -> Option<usize> {
        self.k().ok().map(KTensor::bits)
    }

    #[getter]
    fn kind(&self) -> String {
        match &self.weight {
            kbit_tensor::Weight::Dense(t) => t.dtype().name().to_lowercase(),
            kbit_tensor::Weight::Quantised(k) => kind(k),
        }
    }

    #[getter]
    fn path(&self) -> &'static str {
        match &self.weight {
            kbit_tensor::Weight::Dense(_) => "dense",
            kbit_tensor::Weight::Quantised(k) => match k.codebook() {
                Codebook::I8(_) => "integer",
                Codebook::F32(_) => "float",
            },
        }
    }

    #[getter]
    fn bits_per_weight(&self) -> f64 {
        match &self.weight {
            kbit_tensor::Weight::Dense(t) => 8.0 * t.dtype().size() as f64,
            kbit_tensor::Weight::Quantised(k) => k.bits_per_weight(),
        }
    }

    fn dequantize<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let weight = self.weight.clone();
        let shape = weight.shape();
        let values = interruptible(py, move |_| {
            Ok(match weight {
                kbit_tensor::Weight::Dense(t) => t.to_f32(),
                kbit_tensor::Weight::Quantised(k) => k.dequantize(),
            })
        })?;
        shaped(py, values, &shape)
    }

    fn codes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let k = self.k()?.clone();
        let shape = [k.rows(), k.inputs()];
        let codes = interruptible(py, move |_| {
            let (layout, bytes) = (k.layout(), k.bytes());
            let all = (0..k.rows())
                .flat_map(|row| (0..k.inputs()).map(move |j| layout.code(bytes, row, j)));
            Ok(all.collect::<Vec<u8>>())
        })?;
        shaped(py, codes, &shape)
    }

    fn describe<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let all = PyDict::new(py);
        let k = match &self.weight {
            kbit_tensor::Weight::Quantised(k) => k,
            kbit_tensor::Weight::Dense(t) => {
                all.set_item("dtype", t.dtype().name())?;
                all.set_item("shape", PyTuple::new(py, t.shape())?)?;
                return Ok(all);
            }
        };
        let layout = k.layout();
        all.set_item("bits", k.bits())?;
        all.set_item("shape", (k.rows(), k.inputs()))?;
        match k.codebook() {
            // As numbers: a Vec<u8>-like would become bytes.
            Codebook::I8(entries) => all.set_item(
                "codebook",
                entries.iter().map(|&e| i32::from(e)).collect::<Vec<_>>(),
            )?,
            Codebook::F32(entries) => all.set_item("codebook", entries)?,
        }
        all.set_item(
            "codebook_type",
            if matches!(k.codebook(), Codebook::I8(_)) {
                "i8"
            } else {
                "f32"
            },
        )?;
        all.set_item("scales", scales(py, k.scales())?)?;
        all.set_item("permutation", k.permutation().map(|p| p.to_vec()))?;
        let places = [
            ("panels", layout.panels),
            ("chunks", layout.chunks),
            ("super_blocks", layout.supers),
            ("blocks", layout.blocks),
            ("wide_bytes", layout.wide_bytes),
            ("fine_at", layout.fine_at),
            ("offset_at", layout.offset_at),
            ("codes_at", layout.codes_at),
            ("panel_bytes", layout.panel_bytes),
        ];
        all.set_item("layout", BTreeMap::from(places))?;
        Ok(all)
    }

    fn raw<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let bytes = match &self.weight {
            kbit_tensor::Weight::Dense(t) => t.bytes(),
            kbit_tensor::Weight::Quantised(k) => k.bytes(),
        };
        let copy = py.detach(|| bytes.to_vec());
        let n = copy.len();
        shaped(py, copy, &[n])
    }

    #[pyo3(signature = (x, *, activations = "int8", threads = 0))]
    fn matmul<'py>(
        &self,
        py: Python<'py>,
        x: PyReadonlyArray2<'_, f32>,
        activations: &str,
        threads: usize,
    ) -> PyResult<Bound<'py, PyAny>> {
        let (tokens, inputs) = x.as_array().dim();
        let (weight, activations) = (
            self.weight.clone(),
            crate::engine::activations(activations)?,
        );
        let x = owned(&x);
        let y = interruptible(py, move |cancel| {
            kbit_cpu::matmul(&weight, &x, inputs, activations, threads, cancel)
        })?;
        let rows = y.len() / tokens.max(1);
        shaped(py, y, &[tokens, rows])
    }

    fn __repr__(&self) -> String {
        format!(
            "Weight({:?}, {}, {:.3} bits per weight)",
            self.weight.shape(),
            self.kind(),
            self.bits_per_weight()
        )
    }
}

fn kind(k: &KTensor) -> String {
    let codebook = match k.codebook() {
        Codebook::I8(_) => "i8",
        Codebook::F32(_) => "f32",
    };
    let scales = match k.scales() {
        Scales::Ladder { block, .. } => format!("ladder{block}"),
        Scales::Row => "row".into(),
        Scales::Block {
            block,
            scale,
            offset,
        } => {
            let offset = match offset {
                Offset::None => "",
                Offset::Min => "+min",
                Offset::Zero => "+zero",
            };
            format!("block{block} {}{offset}", scale_type(*scale))
        }
        Scales::Super { block, sub, min } => {
            format!(
                "super{block} {}{}",
                sub_scale(*sub),
                if *min { "+min" } else { "" }
            )
        }
    };
    format!("{scales} {codebook}")
}

fn scale_type(scale: ScaleType) -> &'static str {
    match scale {
        ScaleType::F16 => "f16",
        ScaleType::BF16 => "bf16",
        ScaleType::F32 => "f32",
        ScaleType::E8M0 => "e8m0",
    }
}

fn sub_scale(sub: SubScale) -> &'static str {
    match sub {
        SubScale::U8 => "u8",
        SubScale::I8 => "i8",
        SubScale::U4 => "u4",
    }
}

fn scales<'py>(py: Python<'py>, scales: &Scales) -> PyResult<Bound<'py, PyDict>> {
    let all = PyDict::new(py);
    all.set_item("block", scales.block())?;
    match scales {
        Scales::Ladder { ladder, .. } => {
            all.set_item("kind", "ladder")?;
            all.set_item("ladder", ladder.map(u32::from).to_vec())?;
        }
        Scales::Row => all.set_item("kind", "row")?,
        Scales::Block { scale, offset, .. } => {
            all.set_item("kind", "block")?;
            all.set_item("scale", scale_type(*scale))?;
            let offset = match offset {
                Offset::None => None,
                Offset::Min => Some("min"),
                Offset::Zero => Some("zero"),
            };
            all.set_item("offset", offset)?;
        }
        Scales::Super { sub, min, .. } => {
            all.set_item("kind", "super")?;
            all.set_item("sub", sub_scale(*sub))?;
            all.set_item("min", min)?;
        }
    }
    Ok(all)
}

/// A copy, row-major. A slice is the fast way; other layouts go element by element.
fn owned(array: &PyReadonlyArray2<'_, f32>) -> Vec<f32> {
    match array.as_slice() {
        Ok(values) => values.to_vec(),
        Err(_) => array.as_array().iter().copied().collect(),
    }
}

/// Stops a row reader when the caller has gone.
fn unless(cancel: &AtomicBool) -> kbit_tensor::Result<()> {
    if cancel.load(Ordering::Acquire) {
        Err(Error::Cancelled)
    } else {
        Ok(())
    }
}

#[pyfunction]
#[pyo3(signature = (array, bits, *, format = "learned", block = None, importance = None, threads = 0))]
pub(crate) fn quantize(
    py: Python<'_>,
    array: PyReadonlyArray2<'_, f32>,
    bits: usize,
    format: &str,
    block: Option<usize>,
    importance: Option<PyReadonlyArray1<'_, f32>>,
    threads: usize,
) -> PyResult<Weight> {
    let format: CodebookFormat = format.parse().map_err(raise)?;
    let (rows, inputs) = array.as_array().dim();
    let values = owned(&array);
    let importance: Option<Vec<f32>> = importance.map(|i| i.as_array().iter().copied().collect());
    let k = interruptible(py, move |cancel| {
        let options = QuantizeOptions {
            bits,
            format,
            block,
            importance: importance.as_deref(),
            threads,
        };
        kbit_tensor::quantize_rows(rows, inputs, &options, &|first, out| {
            unless(cancel)?;
            let at = first * inputs;
            out.copy_from_slice(&values[at..at + out.len()]);
            Ok(())
        })
    })?;
    Ok(Weight {
        weight: kbit_tensor::Weight::Quantised(k),
    })
}

/// A transform of `_core.pyi` as the tensor crate has it.
pub(crate) fn transform(step: &Bound<'_, PyTuple>) -> PyResult<Transform> {
    let name: String = step.get_item(0)?.extract()?;
    let size = |i: usize| step.get_item(i)?.extract::<usize>();
    let wrong = || {
        PyValueError::new_err(format!(
            "transform '{name}' does not take {} arguments",
            step.len() - 1
        ))
    };
    match (name.as_str(), step.len()) {
        ("rows", 3) => Ok(Transform::Rows(size(1)?, size(2)?)),
        ("transpose", 1) => Ok(Transform::Transpose),
        ("add", 2) => Ok(Transform::Add(step.get_item(1)?.extract()?)),
        ("scale", 2) => Ok(Transform::Scale(step.get_item(1)?.extract()?)),
        ("permute_rope", 3) => Ok(Transform::PermuteRope {
            heads: size(1)?,
            rotary_dim: size(2)?,
        }),
        ("select", 2) => Ok(Transform::Select {
            index: size(1)?,
            axis: 0,
        }),
        ("select", 3) => Ok(Transform::Select {
            index: size(1)?,
            axis: size(2)?,
        }),
        ("reshape", 2..) => Ok(Transform::Reshape(
            (1..step.len()).map(size).collect::<PyResult<_>>()?,
        )),
        ("rows" | "transpose" | "add" | "scale" | "permute_rope" | "select" | "reshape", _) => {
            Err(wrong())
        }
        _ => Err(PyValueError::new_err(format!(
            "transform '{name}': known are rows, transpose, add, scale, permute_rope, select and reshape"
        ))),
    }
}

#[pyfunction]
#[pyo3(
    signature = (
        sources, *, transforms = Vec::new(), bits = None, dtype = None, format = "learned", block = None, threads = 0
    ),
    text_signature = "(sources, *, transforms=(), bits=None, dtype=None, format='learned', block=None, threads=0)"
)]
pub(crate) fn load_weight(
    py: Python<'_>,
    sources: Vec<(Py<TensorFile>, String)>,
    transforms: Vec<Bound<'_, PyTuple>>,
    bits: Option<usize>,
    dtype: Option<&str>,
    format: &str,
    block: Option<usize>,
    threads: usize,
) -> PyResult<Weight> {
    let format: CodebookFormat = format.parse().map_err(raise)?;
    let steps: Vec<Transform> = transforms.iter().map(transform).collect::<PyResult<_>>()?;
    let keep = match dtype {
        None => Keep::AsStored,
        Some("f32") => Keep::Dense(DType::F32),
        Some("f16") => Keep::Dense(DType::F16),
        Some("bf16") => Keep::Dense(DType::BF16),
        Some(other) => {
            return Err(PyValueError::new_err(format!(
                "dtype must be 'f32', 'f16' or 'bf16', is '{other}'"
            )));
        }
    };
    if bits.is_some() && dtype.is_some() {
        return Err(PyValueError::new_err("bits and dtype exclude each other"));
    }
    let files: Vec<(Arc<kbit_tensor::TensorFile>, String)> = sources
        .into_iter()
        .map(|(file, name)| (file.get().file.clone(), name))
        .collect();
    let weight = interruptible(py, move |cancel| {
        let sources: Vec<(&kbit_tensor::TensorFile, &str)> =
            files.iter().map(|(f, n)| (&**f, n.as_str())).collect();
        let Some(bits) = bits else {
            return kbit_tensor::load_weight(&sources, &steps, keep, threads);
        };
        let view = steps.iter().try_fold(View::new(&sources)?, View::apply)?;
        if view.shape().len() != 2 {
            return Err(Error::Argument(format!(
                "only a matrix can have {bits} bits, this has shape {:?}",
                view.shape()
            )));
        }
        let options = QuantizeOptions {
            bits,
            format,
            block,
            importance: None,
            threads,
        };
        let read = |first: usize, out: &mut [f32]| {
            unless(cancel)?;
            view.read_f32(first, out)
        };
        kbit_tensor::quantize_rows(view.rows(), view.columns(), &options, &read)
            .map(kbit_tensor::Weight::Quantised)
    })?;
    Ok(Weight { weight })
}

#[pyfunction]
pub(crate) fn save_checkpoint(
    py: Python<'_>,
    path: PathBuf,
    spec: String,
    weights: &Bound<'_, PyMapping>,
    metadata: BTreeMap<String, String>,
) -> PyResult<()> {
    let weights = collect(weights)?;
    interruptible(py, move |_| {
        let weights = weights.iter().map(|(name, weight)| (name.as_str(), weight));
        kbit_tensor::save_checkpoint(path, &spec, weights, &metadata)
    })
}

/// (spec, weights, metadata).
type Opened = (String, BTreeMap<String, Weight>, BTreeMap<String, String>);

#[pyfunction]
#[pyo3(signature = (path, *, mapped = false))]
pub(crate) fn open_checkpoint(py: Python<'_>, path: PathBuf, mapped: bool) -> PyResult<Opened> {
    let saved = interruptible(py, move |_| kbit_tensor::open_checkpoint(path, mapped))?;
    let weights = saved
        .weights
        .into_iter()
        .map(|(name, weight)| (name, Weight { weight }))
        .collect();
    Ok((saved.spec, weights, saved.metadata))
}

/// A mapping from names to weights, sharing the bytes.
pub(crate) fn collect(
    mapping: &Bound<'_, PyMapping>,
) -> PyResult<BTreeMap<String, kbit_tensor::Weight>> {
    let mut all = BTreeMap::new();
    for item in mapping.items()?.iter() {
        let (name, weight): (String, Py<Weight>) = item.extract()?;
        all.insert(name, weight.get().weight.clone());
    }
    Ok(all)
}
