//! Errors to exceptions: one table. A panic is a `KbitError` too.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kbit_tensor::Error;
use pyo3::exceptions as py_exceptions;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyTuple, PyType};

/// Time between two looks for Ctrl-C.
pub(crate) const SIGNALS: Duration = Duration::from_millis(50);

/// The exceptions of kbit: (name, builtin base beside `KbitError`, first line of its documentation).
const TABLE: [(&str, &str, &str); 8] = [
    (
        "KbitError",
        "Exception",
        "Root of everything kbit raises on its own account.",
    ),
    (
        "ModelFormatError",
        "ValueError",
        "A file, header or config does not say what its format demands.",
    ),
    (
        "UnsupportedModelError",
        "NotImplementedError",
        "Well-formed, but nothing kbit runs.",
    ),
    (
        "ContextOverflowError",
        "ValueError",
        "More tokens than the context holds.",
    ),
    (
        "GrammarError",
        "ValueError",
        "A grammar, schema or pattern that cannot be compiled.",
    ),
    (
        "MemoryBudgetError",
        "MemoryError",
        "More memory than there is or was allowed.",
    ),
    (
        "DeviceError",
        "RuntimeError",
        "A device is missing or failed.",
    ),
    ("GenerationCancelled", "", "The call was cancelled."),
];

static TYPES: PyOnceLock<Vec<Py<PyType>>> = PyOnceLock::new();

/// The classes in the order of [`TABLE`]. Made by calling `type`: only so can a class have two bases.
fn types(py: Python<'_>) -> PyResult<&Vec<Py<PyType>>> {
    TYPES.get_or_try_init(py, || {
        let builtins = py.import("builtins")?;
        let mut types: Vec<Py<PyType>> = Vec::new();
        for (name, builtin, doc) in TABLE {
            let mut bases: Vec<Bound<'_, PyAny>> = types
                .first()
                .map(|root| root.bind(py).as_any().clone())
                .into_iter()
                .collect();
            if !builtin.is_empty() {
                bases.push(builtins.getattr(builtin)?);
            }
            let body = PyDict::new(py);
            body.set_item("__module__", "kbit")?;
            body.set_item("__doc__", doc)?;
            let class = py
                .get_type::<PyType>()
                .call1((name, PyTuple::new(py, bases)?, body))?;
            types.push(class.cast_into::<PyType>()?.unbind());
        }
        Ok(types)
    })
}

/// Adds the classes to the module.
pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    for (class, (name, ..)) in types(module.py())?.iter().zip(TABLE) {
        module.add(name, class)?;
    }
    Ok(())
}

fn new(py: Python<'_>, name: &str, message: String) -> PyErr {
    let class = types(py).map(|types| {
        TABLE
            .iter()
            .position(|t| t.0 == name)
            .map(|i| types[i].bind(py).clone())
    });
    match class {
        Ok(Some(class)) => PyErr::from_type(class, message),
        Ok(None) => py_exceptions::PyRuntimeError::new_err(message),
        Err(e) => e,
    }
}

/// An error as its exception.
pub(crate) fn raise(error: Error) -> PyErr {
    Python::attach(|py| match error {
        Error::Format(m) => new(py, "ModelFormatError", m),
        Error::Unsupported(m) => new(py, "UnsupportedModelError", m),
        Error::ContextOverflow(m) => new(py, "ContextOverflowError", m),
        Error::Memory(m) => new(py, "MemoryBudgetError", m),
        Error::Device(m) => new(py, "DeviceError", m),
        Error::Cancelled => new(py, "GenerationCancelled", error.to_string()),
        Error::Argument(m) => py_exceptions::PyValueError::new_err(m),
        // With a number the interpreter picks FileNotFoundError and its kin.
        Error::Io { path, source } => match source.raw_os_error() {
            Some(number) => {
                let text = source.to_string();
                let text = text
                    .rsplit_once(" (os error")
                    .map_or(text.as_str(), |(t, _)| t)
                    .to_string();
                py_exceptions::PyOSError::new_err((number, text, path))
            }
            None => PyErr::from(std::io::Error::new(
                source.kind(),
                format!("{path}: {source}"),
            )),
        },
        other => new(py, "KbitError", other.to_string()),
    })
}

/// What a panic said, as the exception for it.
fn panicked(payload: &(dyn std::any::Any + Send)) -> PyErr {
    let text = payload
        .downcast_ref::<String>()
        .map(String::as_str)
        .or(payload.downcast_ref::<&str>().copied());
    let message = format!(
        "kbit broke down (a bug; please report it): {}",
        text.unwrap_or("a panic without a message")
    );
    Python::attach(|py| new(py, "KbitError", message))
}

/// Runs the body of an entry point; a panic in it becomes an exception that `except Exception` catches.
pub(crate) fn guard<T>(body: impl FnOnce() -> PyResult<T>) -> PyResult<T> {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|payload| Err(panicked(&*payload)))
}

/// Runs `work` without the GIL on a thread of its own, looking for Ctrl-C meanwhile. When it comes, the flag that `work`
/// was given turns true and the caller does not wait for it to be noticed.
pub(crate) fn interruptible<T: Send + 'static>(
    py: Python<'_>,
    work: impl FnOnce(&AtomicBool) -> kbit_tensor::Result<T> + Send + 'static,
) -> PyResult<T> {
    let cancel = Arc::new(AtomicBool::new(false));
    let (send, receive) = sync_channel(1);
    let receive = Mutex::new(receive);
    let flag = cancel.clone();
    let body = move || {
        let result = catch_unwind(AssertUnwindSafe(|| work(&flag)));
        // Nobody listens any more after Ctrl-C.
        let _ = send.send(result);
    };
    let thread = std::thread::Builder::new()
        .name("kbit-call".into())
        .spawn(body);
    thread.map_err(|e| raise(Error::Device(format!("no thread for a call: {e}"))))?;
    loop {
        let wait = || {
            receive
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .recv_timeout(SIGNALS)
        };
        match py.detach(wait) {
            Ok(Ok(result)) => return result.map_err(raise),
            Ok(Err(payload)) => return Err(panicked(&*payload)),
            Err(RecvTimeoutError::Disconnected) => {
                return Err(raise(Error::Device("a thread of kbit vanished".into())));
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
        if let Err(e) = py.check_signals() {
            cancel.store(true, Ordering::Release);
            return Err(e);
        }
    }
}
