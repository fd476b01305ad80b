//! The CPU device: one file an operation, one thread pool.
#![allow(unsafe_code, reason = "kernels: every block says why it is sound")]

pub mod acts;
pub mod limits;
pub mod linear;
