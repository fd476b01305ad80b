//! `Engine`, `Request`, `Token`: the step loop and its handles.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use kbit_model::{EngineOptions, Finish, Generate, PassKind, PassOutput, Sampling};
use kbit_tensor::Error;
use kbit_tensor::program::{Activations, CacheType, Device, Options};
use numpy::PyReadonlyArray1;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyMapping};

use crate::error::{SIGNALS, guard, interruptible, raise};
use crate::file::shaped;
use crate::weight::collect;

#[pyclass(frozen, module = "kbit._core")]
pub(crate) struct Engine {
    engine: kbit_model::Engine,
    device: String,
}

/// The device of that name.
fn device(name: &str) -> PyResult<Box<dyn Device>> {
    match name {
        "cpu" => Ok(Box::new(kbit_cpu::Cpu::new().map_err(raise)?)),
        "reference" => Ok(Box::new(kbit_model::Reference)),
        other => Err(raise(Error::Device(format!(
            "device '{other}': this build has 'cpu' and 'reference'"
        )))),
    }
}

fn cache_type(name: &str) -> PyResult<CacheType> {
    match name {
        "f16" => Ok(CacheType::F16),
        "bf16" => Ok(CacheType::BF16),
        "f32" => Ok(CacheType::F32),
        "int8" => Ok(CacheType::I8),
        other => Err(PyValueError::new_err(format!(
            "kv must be 'f16', 'bf16', 'f32' or 'int8', is '{other}'"
        ))),
    }
}

pub(crate) fn activations(name: &str) -> PyResult<Activations> {
    match name {
        "int8" => Ok(Activations::Int8),
        "f32" => Ok(Activations::F32),
        other => Err(PyValueError::new_err(format!(
            "activations must be 'int8' or 'f32', is '{other}'"
        ))),
    }
}

#[pymethods]
impl Engine {
    #[new]
    #[pyo3(signature = (
        spec, weights, *, device = "cpu", threads = 0, kv = "f16", cache_bytes = 0, activations = "int8", context = None,
        max_batch = 16, max_waiting = 16384
    ))]
    fn new(
        py: Python<'_>,
        spec: &str,
        weights: &Bound<'_, PyMapping>,
        device: &str,
        threads: usize,
        kv: &str,
        cache_bytes: usize,
        activations: &str,
        context: Option<usize>,
        max_batch: usize,
        max_waiting: usize,
    ) -> PyResult<Self> {
        let weights = collect(weights)?;
        let device = self::device(device)?;
        let name = device.name();
        let options = EngineOptions {
            device: Options {
                activations: self::activations(activations)?,
                cache: cache_type(kv)?,
                threads,
                cache_bytes,
            },
            context,
            max_batch,
            max_waiting,
        };
        let spec = spec.to_string();
        let build =
            move |_: &AtomicBool| kbit_model::Engine::build(&spec, weights, &*device, options);
        Ok(Self {
            engine: interruptible(py, build)?,
            device: name,
        })
    }

    #[getter]
    fn context(&self) -> usize {
        self.engine.context()
    }

    #[getter]
    fn threads(&self) -> usize {
        self.engine.threads()
    }

    #[getter]
    fn device(&self) -> &str {
        &self.device
    }

    #[pyo3(
        signature = (
            ids, *, max_new_tokens, temperature = 1.0, top_k = 0, top_p = 1.0, min_p = 0.0, repetition_penalty = 1.0,
            seed = 0, eos = Vec::new(), logprobs = None
        ),
        text_signature = "($self, ids, *, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, \
            repetition_penalty=1.0, seed=0, eos=(), logprobs=None)"
    )]
    fn submit(
        &self,
        py: Python<'_>,
        ids: PyReadonlyArray1<'_, u32>,
        max_new_tokens: usize,
        temperature: f32,
        top_k: usize,
        top_p: f32,
        min_p: f32,
        repetition_penalty: f32,
        seed: u64,
        eos: Vec<u32>,
        logprobs: Option<usize>,
    ) -> PyResult<Request> {
        let sampling = Sampling {
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            seed,
        };
        let generate = Generate {
            ids: owned(&ids),
            max_new_tokens,
            sampling,
            eos,
            logprobs,
        };
        let request = guard(|| py.detach(|| self.engine.submit(generate)).map_err(raise))?;
        Ok(Request { request })
    }

    #[pyo3(signature = (ids, *, hidden_states = false, attentions = false))]
    fn forward<'py>(
        &self,
        py: Python<'py>,
        ids: PyReadonlyArray1<'_, u32>,
        hidden_states: bool,
        attentions: bool,
    ) -> PyResult<Bound<'py, PyDict>> {
        let ids = owned(&ids);
        let n = ids.len();
        let out = self.pass(
            py,
            ids,
            PassKind::Forward {
                hidden: hidden_states,
                attentions,
            },
        )?;
        let all = PyDict::new(py);
        all.set_item(
            "logits",
            shaped(py, out.logits, &[n, self.engine.vocab_size()])?,
        )?;
        if hidden_states {
            let states = PyList::empty(py);
            for state in out.hidden {
                let width = state.len() / n;
                states.append(shaped(py, state, &[n, width])?)?;
            }
            all.set_item("hidden_states", states)?;
        }
        if attentions {
            let layers = PyList::empty(py);
            for weights in out.attentions {
                let heads = weights.len() / (n * n);
                layers.append(shaped(py, weights, &[heads, n, n])?)?;
            }
            all.set_item("attentions", layers)?;
        }
        Ok(all)
    }

    #[pyo3(signature = (ids, start = 1))]
    fn score<'py>(
        &self,
        py: Python<'py>,
        ids: PyReadonlyArray1<'_, u32>,
        start: usize,
    ) -> PyResult<Bound<'py, PyAny>> {
        let out = self.pass(py, owned(&ids), PassKind::Score { start })?;
        let n = out.logprobs.len();
        shaped(py, out.logprobs, &[n])
    }

    fn stats(&self) -> BTreeMap<&'static str, f64> {
        let s = self.engine.stats();
        BTreeMap::from([
            ("prompt_tokens", s.prompt_tokens as f64),
            ("generated_tokens", s.generated_tokens as f64),
            ("prefill_seconds", s.prefill_seconds),
            ("decode_seconds", s.decode_seconds),
            ("steps", s.steps as f64),
            ("preemptions", s.preemptions as f64),
            ("cache_bytes", s.cache_bytes as f64),
            ("running", s.running as f64),
            ("waiting", s.waiting as f64),
        ])
    }

    /// The kernels of the CPU device count for all engines together.
    #[allow(
        clippy::unused_self,
        reason = "a method in Python, where it may become one of its engine"
    )]
    fn trace(&self, on: bool) -> PyResult<BTreeMap<String, u64>> {
        guard(|| {
            let seen = kbit_cpu::linear::trace::seen();
            kbit_cpu::linear::trace::enable(on);
            Ok(seen)
        })
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        guard(|| {
            py.detach(|| self.engine.close());
            Ok(())
        })
    }

    fn __repr__(&self) -> String {
        format!(
            "Engine({}, {} threads, context {})",
            self.device,
            self.engine.threads(),
            self.engine.context()
        )
    }
}

impl Engine {
    fn pass(&self, py: Python<'_>, ids: Vec<u32>, kind: PassKind) -> PyResult<PassOutput> {
        guard(|| {
            let pass = py.detach(|| self.engine.pass(ids, kind)).map_err(raise)?;
            loop {
                if let Some(output) = py.detach(|| pass.wait(SIGNALS)).map_err(raise)? {
                    return Ok(output);
                }
                // Leaving drops the pass, and that cancels it.
                py.check_signals()?;
            }
        })
    }
}

fn owned(ids: &PyReadonlyArray1<'_, u32>) -> Vec<u32> {
    ids.as_array().iter().copied().collect()
}

#[pyclass(frozen, module = "kbit._core")]
pub(crate) struct Request {
    request: kbit_model::Request,
}

#[pymethods]
impl Request {
    #[pyo3(signature = (timeout = 0.05))]
    fn wait(&self, py: Python<'_>, timeout: f64) -> PyResult<Option<Vec<Token>>> {
        let until = Duration::try_from_secs_f64(timeout)
            .ok()
            .and_then(|t| Instant::now().checked_add(t));
        let until = until.ok_or_else(|| {
            PyValueError::new_err(format!(
                "timeout must be at least 0 and finite, is {timeout}"
            ))
        })?;
        guard(|| {
            loop {
                let left = until.saturating_duration_since(Instant::now());
                let tokens = py
                    .detach(|| self.request.wait(left.min(SIGNALS)))
                    .map_err(raise)?;
                py.check_signals()?;
                match tokens {
                    Some(tokens) if tokens.is_empty() && left > SIGNALS => {}
                    tokens => {
                        return Ok(
                            tokens.map(|t| t.into_iter().map(|token| Token { token }).collect())
                        );
                    }
                }
            }
        })
    }

    #[getter]
    fn finish_reason(&self) -> Option<&'static str> {
        self.request.finish().map(|f| match f {
            Finish::Stop => "stop",
            Finish::Length => "length",
            Finish::Context => "context",
            Finish::Cancelled => "cancelled",
        })
    }

    #[getter]
    fn prompt_seconds(&self) -> f64 {
        self.request.prompt_seconds()
    }

    #[getter]
    fn decode_seconds(&self) -> f64 {
        self.request.decode_seconds()
    }

    fn cancel(&self) {
        self.request.cancel();
    }
}

#[pyclass(frozen, module = "kbit._core")]
pub(crate) struct Token {
    token: kbit_model::Token,
}

#[pymethods]
impl Token {
    #[getter]
    fn id(&self) -> u32 {
        self.token.id
    }

    #[getter]
    fn logprob(&self) -> Option<f32> {
        self.token.logprob
    }

    #[getter]
    fn top(&self) -> Vec<(u32, f32)> {
        self.token.top.clone()
    }

    fn __repr__(&self) -> String {
        match self.token.logprob {
            Some(p) => format!("Token({}, logprob={p})", self.token.id),
            None => format!("Token({})", self.token.id),
        }
    }
}
