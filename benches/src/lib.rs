//! Kernel benchmarks.
