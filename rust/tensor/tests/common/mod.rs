//! Files made by hand, for the tests of the readers.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::sync::Arc;

use kbit_tensor::{Bytes, Result, TensorFile};

/// A safetensors file of this header and data.
pub(crate) fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend_from_slice(header.as_bytes());
    out.extend_from_slice(data);
    out
}

/// Opens a file in memory.
pub(crate) fn open(bytes: &[u8]) -> Result<TensorFile> {
    TensorFile::from_bytes("test", Arc::new(Bytes::copy_of(bytes)?))
}

/// A pseudo-random sequence, the same on every machine.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        self.0 >> 33
    }

    pub(crate) fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.next() as u8).collect()
    }
}

/// GGUF, written field by field.
#[derive(Clone)]
pub(crate) struct Gguf {
    pub(crate) version: u32,
    pub(crate) tensors: u64,
    pub(crate) keys: u64,
    pub(crate) body: Vec<u8>,
}

impl Gguf {
    pub(crate) fn new() -> Self {
        Self {
            version: 3,
            tensors: 0,
            keys: 0,
            body: Vec::new(),
        }
    }

    pub(crate) fn raw(mut self, bytes: &[u8]) -> Self {
        self.body.extend_from_slice(bytes);
        self
    }

    pub(crate) fn u32(self, v: u32) -> Self {
        self.raw(&v.to_le_bytes())
    }

    pub(crate) fn u64(self, v: u64) -> Self {
        self.raw(&v.to_le_bytes())
    }

    pub(crate) fn string(self, s: &str) -> Self {
        self.u64(s.len() as u64).raw(s.as_bytes())
    }

    /// Starts a key-value; the value's bytes follow.
    pub(crate) fn key(mut self, key: &str, kind: u32) -> Self {
        self.keys += 1;
        self.string(key).u32(kind)
    }

    pub(crate) fn tensor(mut self, name: &str, dims: &[u64], kind: u32, at: u64) -> Self {
        self.tensors += 1;
        let mut out = self.string(name).u32(dims.len() as u32);
        for &d in dims {
            out = out.u64(d);
        }
        out.u32(kind).u64(at)
    }

    /// The file, with `data` on the next multiple of `alignment`.
    pub(crate) fn file(&self, alignment: usize, data: &[u8]) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend_from_slice(&self.version.to_le_bytes());
        out.extend_from_slice(&self.tensors.to_le_bytes());
        out.extend_from_slice(&self.keys.to_le_bytes());
        out.extend_from_slice(&self.body);
        out.resize(out.len().next_multiple_of(alignment), 0);
        out.extend_from_slice(data);
        out
    }
}

/// A safetensors file of tensors (name, dtype, shape, bytes).
pub(crate) fn tensors(all: &[(&str, &str, Vec<usize>, Vec<u8>)]) -> TensorFile {
    let (mut entries, mut data) = (Vec::new(), Vec::new());
    for (name, dtype, shape, bytes) in all {
        let from = data.len();
        data.extend_from_slice(bytes);
        entries.push(format!(
            "\"{name}\":{{\"dtype\":\"{dtype}\",\"shape\":{shape:?},\"data_offsets\":[{from},{}]}}",
            data.len()
        ));
    }
    open(&safetensors(&format!("{{{}}}", entries.join(",")), &data)).unwrap()
}
