//! The CPU device: one file an operation, one thread pool.

pub mod limits;
