//! The CPU device: one file an operation, one thread pool.
//!
//! ```text
//! Cpu::prepare ── pages.rs     small weights side by side
//!              ├─ prepare.rs   weights bound to operations (op.rs)
//!              └─ plan.rs      order of work, a barrier only where it is needed
//! CpuRunner::run (runner.rs)   checks, passes of bounded size
//!   └─ pool.rs                 one fork and join a pass
//!        └─ step/              what each thread does for each unit of work
//!             ├─ embed.rs norm.rs rope.rs attention/ experts.rs head.rs
//!             └─ project.rs    matrices with their epilogue (activation.rs) ── linear/, acts.rs
//! cache.rs                     pages of keys and values
//! ```
#![allow(
    unsafe_code,
    reason = "threads share buffers and pages; every block says why it may"
)]
#![allow(
    clippy::cast_ptr_alignment,
    reason = "bytes come from allocations on 64-byte boundaries"
)]

mod activation;
pub mod acts;
mod ask;
mod attention;
mod buffers;
mod cache;
mod embed;
mod experts;
mod head;
pub mod limits;
pub mod linear;
mod matmul;
mod norm;
mod op;
mod pages;
mod plan;
mod pool;
mod prepare;
mod project;
mod rope;
mod runner;
mod step;
#[cfg(test)]
mod testing;

use std::sync::Arc;

use kbit_simd::Isa;
use kbit_tensor::program::{Device, Options, Program, Runner};
use kbit_tensor::{Error, Result, Weight};

pub use matmul::matmul;
pub use pool::{MAX_THREADS, default_threads};
pub use runner::CpuRunner;

/// The processor, with the best instruction set it has or the one that `KBIT_ISA` names.
#[derive(Clone, Copy, Debug)]
pub struct Cpu {
    isa: Isa,
}

impl Cpu {
    /// The device.
    ///
    /// # Errors
    /// [`Error::Argument`] when `KBIT_ISA` names an instruction set that this processor lacks.
    pub fn new() -> Result<Self> {
        let isa = Isa::chosen().map_err(|e| Error::Argument(e.to_string()))?;
        Ok(Self { isa })
    }

    /// The device on a given instruction set.
    ///
    /// # Errors
    /// [`Error::Argument`] when this processor lacks it.
    pub fn with_isa(isa: Isa) -> Result<Self> {
        if isa.is_available() {
            return Ok(Self { isa });
        }
        Err(Error::Argument(format!(
            "this processor lacks the instruction set {isa}"
        )))
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }
}

impl Device for Cpu {
    fn name(&self) -> String {
        "cpu".into()
    }

    fn prepare(
        &self,
        program: Arc<Program>,
        mut weights: Vec<Weight>,
        options: Options,
    ) -> Result<Box<dyn Runner>> {
        pages::gather(&mut weights)?;
        Ok(Box::new(CpuRunner::new(
            program, &weights, options, self.isa,
        )?))
    }
}
