//! What a transformer is: its spec, the program compiled from it, sampling, and the engine's step loop.
//!
//! The crate knows no device, no Python and no model's name. [`compile`] turns a [`spec::ModelSpec`] and the names of the
//! tensors that exist into a program; a device prepares it into a runner; [`Engine`] drives the runner.

mod checkpoint;
mod compile;
mod engine;
mod interpret;
mod rope;
mod sampler;
pub mod spec;

pub use checkpoint::EngineOptions;
pub use compile::{alibi_slopes, compile};
pub use engine::{Engine, Finish, Generate, Pass, PassKind, PassOutput, Request, Stats, Token};
pub use interpret::Reference;
pub use rope::rope;
pub use sampler::{LogProbs, Sampling, philox, uniform};
