//! Files of tensors: opened and validated once, read on demand.

#![forbid(unsafe_code)]
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

use crate::gguf::{self, GgmlType, Value};
use crate::{Bytes, DType, Error, Result, Tensor, import, parallel, safetensors};

/// How a file stores the elements of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// One element after the other.
    Plain(DType),
    /// Blocks of a GGUF type.
    Ggml(GgmlType),
    /// A type that is known by name only: listed, never read.
    Other {
        /// Its name in the file.
        name: &'static str,
        /// Bits of an element.
        bits: u64,
    },
}

impl Stored {
    /// `"BF16"`, `"Q4_K"`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Plain(dtype) => dtype.name(),
            Self::Ggml(kind) => kind.name(),
            Self::Other { name, .. } => name,
        }
    }

    /// Bits of an element of a type that is stored one by one.
    pub(crate) const fn bits(self) -> u64 {
        match self {
            Self::Plain(dtype) => 8u64.saturating_mul(dtype.size() as u64),
            Self::Ggml(_) => 0,
            Self::Other { bits, .. } => bits,
        }
    }

    /// (elements, bytes) of the smallest unit: (1, size) or a block.
    pub(crate) fn unit(self) -> Result<(usize, usize)> {
        match self {
            Self::Plain(dtype) => Ok((1, dtype.size())),
            Self::Ggml(kind) => Ok((kind.block(), kind.block_bytes())),
            Self::Other { name, .. } => Err(Error::Unsupported(format!("type {name} is not read"))),
        }
    }
}

/// A tensor of a file.
#[derive(Clone, Debug)]
pub struct TensorInfo {
    /// As in the file.
    pub name: String,
    /// Element type.
    pub stored: Stored,
    /// Sizes, outermost first (GGUF's dimensions reversed).
    pub shape: Vec<usize>,
    /// Bytes in the file.
    pub nbytes: u64,
    /// Where it starts in the file.
    pub(crate) at: u64,
}

/// Container formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the definitions")]
pub enum Container {
    Safetensors,
    Gguf,
}

/// A safetensors or GGUF file. The header is checked when it is opened: every tensor lies inside the file.
#[derive(Debug)]
pub struct TensorFile {
    source: Source,
    container: Container,
    tensors: Vec<TensorInfo>,
    /// Indices into `tensors`, by name.
    by_name: Vec<u32>,
    metadata: Vec<(String, Value)>,
}

impl TensorFile {
    /// Opens a file, told by its first bytes. The file stays open; tensors are read into memory of their own, so that
    /// whatever happens to the file later is an error at worst.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be read, [`Error::Format`] when it breaks its format.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::parse(Source::open(path.as_ref())?)
    }

    /// Opens a file by mapping it: tensors share the pages with every process that maps it. The file must not be
    /// truncated while it is mapped; the system kills a process that touches what is gone.
    ///
    /// # Errors
    /// As [`TensorFile::open`].
    pub fn open_mapped(path: impl AsRef<Path>) -> Result<Self> {
        Self::parse(Source::map(path.as_ref())?)
    }

    /// A file that is already in memory; `name` stands for it in messages.
    ///
    /// # Errors
    /// [`Error::Format`] when it breaks its format.
    pub fn from_bytes(name: &str, bytes: Arc<Bytes>) -> Result<Self> {
        Self::parse(Source {
            path: name.into(),
            len: bytes.len() as u64,
            backing: Backing::Memory(bytes),
        })
    }

    fn parse(source: Source) -> Result<Self> {
        let mut magic = [0; 4];
        if source.len() >= 4 {
            source.read_at(0, &mut magic)?;
        }
        let (container, tensors, metadata) = if magic == gguf::MAGIC {
            let header = gguf::read(&source)?;
            (Container::Gguf, header.tensors, header.metadata)
        } else {
            let header = safetensors::read(&source)?;
            let metadata = header.metadata.into_iter();
            let metadata = metadata.map(|(k, v)| (k, Value::String(v))).collect();
            (Container::Safetensors, header.tensors, metadata)
        };
        let mut by_name: Vec<u32> = (0u32..).take(tensors.len()).collect();
        by_name.sort_unstable_by_key(|&i| tensors.get(i as usize).map(|t| &t.name));
        Ok(Self {
            source,
            container,
            tensors,
            by_name,
            metadata,
        })
    }

    /// As given.
    pub fn path(&self) -> &str {
        self.source.path()
    }

    /// Which format it is.
    pub fn container(&self) -> Container {
        self.container
    }

    /// Key-values: strings in safetensors, typed in GGUF.
    pub fn metadata(&self) -> &[(String, Value)] {
        &self.metadata
    }

    /// All tensors in file order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// One tensor.
    ///
    /// # Errors
    /// [`Error::Argument`] when the file has none of that name.
    pub fn info(&self, name: &str) -> Result<&TensorInfo> {
        let name_of = |&i: &u32| self.tensors.get(i as usize).map_or("", |t| t.name.as_str());
        self.by_name
            .binary_search_by(|i| name_of(i).cmp(name))
            .ok()
            .and_then(|at| self.tensors.get(*self.by_name.get(at)? as usize))
            .ok_or_else(|| {
                Error::Argument(format!(
                    "{}: no tensor {name:?} among {}",
                    self.path(),
                    self.tensors.len()
                ))
            })
    }

    /// The whole tensor: plain types as they are, GGUF's blocks as f32.
    ///
    /// # Errors
    /// [`Error::Argument`] for an unknown name, [`Error::Unsupported`] for a type that is not read, [`Error::Io`].
    pub fn read(&self, name: &str) -> Result<Tensor> {
        let info = self.info(name)?;
        match info.stored {
            Stored::Plain(dtype) => {
                let bytes = self.read_range(info, 0, info.nbytes)?;
                bytes.into_tensor(dtype, &info.shape)
            }
            Stored::Ggml(_) => import::ggml::dequantize(self, info),
            Stored::Other { .. } => Err(self.unread(info)),
        }
    }

    /// The whole file, if it is in memory.
    pub(crate) fn memory(&self) -> Option<Arc<Bytes>> {
        match &self.source.backing {
            Backing::Memory(bytes) => Some(bytes.clone()),
            Backing::File(_) => None,
        }
    }

    /// Bytes `from..from + len` of a tensor as stored; shared with the file where it is in memory.
    pub(crate) fn read_range(&self, info: &TensorInfo, from: u64, len: u64) -> Result<Part> {
        if from.checked_add(len).is_none_or(|end| end > info.nbytes) {
            return Err(Error::Argument(format!(
                "{}: tensor {:?} has {} bytes, {len} asked from {from} on",
                self.path(),
                info.name,
                info.nbytes
            )));
        }
        let (at, len) = (info.at.saturating_add(from), to_usize(len)?);
        if let Backing::Memory(bytes) = &self.source.backing {
            return Ok(Part {
                bytes: bytes.clone(),
                at: to_usize(at)?,
                len,
            });
        }
        let mut bytes = Bytes::zeroed(len)?;
        self.source.read_parallel(at, &mut bytes)?;
        Ok(Part {
            bytes: Arc::new(bytes),
            at: 0,
            len,
        })
    }

    /// Fills `out` with bytes of a tensor from `from` on.
    pub(crate) fn read_into(&self, info: &TensorInfo, from: u64, out: &mut [u8]) -> Result<()> {
        let end = from.checked_add(out.len() as u64);
        if end.is_none_or(|end| end > info.nbytes) {
            return Err(Error::Argument(format!(
                "{}: tensor {:?} has {} bytes, {} asked from {from} on",
                self.path(),
                info.name,
                info.nbytes,
                out.len()
            )));
        }
        self.source.read_at(info.at.saturating_add(from), out)
    }

    /// The error for a tensor whose type is known by name only.
    pub(crate) fn unread(&self, info: &TensorInfo) -> Error {
        Error::Unsupported(format!(
            "{}: tensor {:?} has type {}; read are F64, F32, F16, BF16, F8_E4M3, F8_E5M2, integers, BOOL and {}",
            self.path(),
            info.name,
            info.stored.name(),
            GgmlType::imported_names()
        ))
    }
}

/// Bytes that a tensor may share with others.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    pub(crate) bytes: Arc<Bytes>,
    pub(crate) at: usize,
    pub(crate) len: usize,
}

impl Part {
    pub(crate) fn as_slice(&self) -> &[u8] {
        self.bytes
            .get(self.at..)
            .and_then(|b| b.get(..self.len))
            .unwrap_or(&[])
    }

    pub(crate) fn into_tensor(self, dtype: DType, shape: &[usize]) -> Result<Tensor> {
        Tensor::shared(dtype, shape, self.bytes, self.at)
    }
}

/// A length from a file as an index.
pub(crate) fn to_usize(n: u64) -> Result<usize> {
    usize::try_from(n).map_err(|_| Error::Memory(format!("{n} bytes do not fit in memory")))
}

/// Where bytes come from.
#[derive(Debug)]
pub(crate) struct Source {
    path: String,
    len: u64,
    backing: Backing,
}

#[derive(Debug)]
enum Backing {
    File(File),
    Memory(Arc<Bytes>),
}

impl Source {
    fn open(path: &Path) -> Result<Self> {
        let io = |e| Error::io(path, e);
        let file = File::open(path).map_err(io)?;
        let meta = file.metadata().map_err(io)?;
        if !meta.is_file() {
            let (kind, what) = if meta.is_dir() {
                (ErrorKind::IsADirectory, "a directory")
            } else {
                (ErrorKind::InvalidInput, "no regular file")
            };
            let error = std::io::Error::new(kind, what);
            return Err(Error::io(path, error));
        }
        Ok(Self {
            path: path.display().to_string(),
            len: meta.len(),
            backing: Backing::File(file),
        })
    }

    fn map(path: &Path) -> Result<Self> {
        let Self { path, len, backing } = Self::open(path)?;
        let backing = match backing {
            Backing::File(file) => {
                let bytes = Bytes::map(&file).map_err(|e| Error::io(&path, e))?;
                Backing::Memory(Arc::new(bytes))
            }
            memory @ Backing::Memory(_) => memory,
        };
        Ok(Self { path, len, backing })
    }

    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    /// Bytes the file had when it was opened.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Fills `out` from byte `at` on.
    pub(crate) fn read_at(&self, at: u64, out: &mut [u8]) -> Result<()> {
        match &self.backing {
            Backing::File(file) => {
                read_exact_at(file, at, out).map_err(|e| Error::io(&self.path, e))
            }
            Backing::Memory(bytes) => {
                let from = to_usize(at)?;
                let found = bytes.get(from..).and_then(|b| b.get(..out.len()));
                let found = found.ok_or_else(|| {
                    Error::Format(format!(
                        "{}: {} bytes wanted at {at}, the file has {}",
                        self.path,
                        out.len(),
                        self.len
                    ))
                })?;
                out.copy_from_slice(found);
                Ok(())
            }
        }
    }

    /// `len` bytes from `at` on. Only for lengths that were checked against the file's.
    pub(crate) fn read_vec(&self, at: u64, len: u64) -> Result<Vec<u8>> {
        let len = to_usize(len)?;
        let mut out = Vec::new();
        out.try_reserve_exact(len)
            .map_err(|_| Error::Memory(format!("cannot allocate {len} bytes")))?;
        out.resize(len, 0);
        self.read_at(at, &mut out)?;
        Ok(out)
    }

    /// As [`Source::read_at`], by several threads where that pays: one thread copies from the page cache at a fraction
    /// of what memory gives.
    pub(crate) fn read_parallel(&self, at: u64, out: &mut [u8]) -> Result<()> {
        const PIECE: usize = 4 << 20;
        if out.len() <= PIECE {
            return self.read_at(at, out);
        }
        parallel::for_each_piece(0, out, PIECE, |i, piece| {
            self.read_at(
                at.saturating_add((i as u64).saturating_mul(PIECE as u64)),
                piece,
            )
        })
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, at: u64, out: &mut [u8]) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, at)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut at: u64, mut out: &mut [u8]) -> std::io::Result<()> {
    while !out.is_empty() {
        let n = std::os::windows::fs::FileExt::seek_read(file, out, at)?;
        if n == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        (out, at) = (out.split_at_mut(n).1, at.saturating_add(n as u64));
    }
    Ok(())
}
