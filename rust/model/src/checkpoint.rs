//! From a saved model to a running engine: all that an application without Python needs.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use kbit_tensor::program::{Device, Options};
use kbit_tensor::{Error, Result, Weight, open_checkpoint};

use crate::spec::ModelSpec;
use crate::{Engine, compile};

/// How an engine runs a model.
#[derive(Clone, Copy, Debug)]
pub struct EngineOptions {
    /// Of the device.
    pub device: Options,
    /// Positions a sequence may have; None: as many as the model has.
    pub context: Option<usize>,
    /// Requests that run at once.
    pub max_batch: usize,
    /// Requests that may wait for a place; one more is refused.
    pub max_waiting: usize,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            device: Options::default(),
            context: None,
            max_batch: 16,
            max_waiting: 16384,
        }
    }
}

impl Engine {
    /// An engine over a saved model: a directory with `model.safetensors`, or that file.
    ///
    /// # Errors
    /// Those of [`open_checkpoint`] and [`Engine::build`].
    pub fn open(
        path: impl AsRef<Path>,
        device: &dyn Device,
        options: EngineOptions,
    ) -> Result<Self> {
        let path = path.as_ref();
        let file = if path.is_dir() {
            path.join("model.safetensors")
        } else {
            path.to_path_buf()
        };
        let saved = open_checkpoint(file, false)?;
        Self::build(&saved.spec, saved.weights, device, options)
    }

    /// An engine over weights by canonical name (`docs/adding.md`); `spec` is a [`ModelSpec`] in JSON.
    ///
    /// # Errors
    /// [`Error::Format`] for a spec that cannot be read, and those of [`compile`], [`Device::prepare`] and [`Engine::new`].
    pub fn build(
        spec: &str,
        mut weights: BTreeMap<String, Weight>,
        device: &dyn Device,
        options: EngineOptions,
    ) -> Result<Self> {
        let spec: ModelSpec =
            serde_json::from_str(spec).map_err(|e| Error::Format(format!("spec: {e}")))?;
        let program = Arc::new(compile(
            &spec,
            weights.keys().map(String::as_str),
            options.context,
        )?);
        // The compiler has seen that every name is there.
        let ordered = program
            .weights
            .iter()
            .filter_map(|name| weights.remove(name))
            .collect();
        let runner = device.prepare(program.clone(), ordered, options.device)?;
        Self::new(&program, runner, options.max_batch, options.max_waiting)
    }
}
