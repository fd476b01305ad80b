//! kbit's own saved model: a safetensors file whose metadata says what the bytes are.
//!
//! | metadata | |
//! |---|---|
//! | `kbit.format` | `1` |
//! | `kbit.spec` | the `ModelSpec`, JSON |
//! | `kbit.tensors` | JSON: per tensor its checksum and, for k-bit ones, the header |
//! | `kbit.checksum` | of all other metadata and of the names, types and shapes of the tensors |
//!
//! k-bit matrices are `U8` arrays of the bytes in kernel order; dense ones are stored as they are. Data starts on a
//! multiple of 64 bytes and so does every tensor (`kbit.pad.*` fill up what other tensors leave), so that the file's
//! bytes are the engine's. A checksum is XXH3-64 over the XXH3-64s of pieces of 1 MiB: read and verified in parallel.

#![forbid(unsafe_code)]
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects
)]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::file::{Part, Stored, TensorFile, to_usize};
use crate::gguf::Value;
use crate::{
    Bytes, Codebook, DType, Error, KLayout, KTensor, Result, Scales, Weight, atomic, parallel,
};

/// The version that is written, and the newest that is read.
const FORMAT: u32 = 1;
const ALIGNMENT: usize = 64;
const PIECE: usize = 1 << 20;
const PAD: &str = "kbit.pad.";
const PERMUTATION: &str = ".permutation";

/// A saved model.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// The `ModelSpec` as JSON.
    pub spec: String,
    /// By canonical name.
    pub weights: BTreeMap<String, Weight>,
    /// Everything else that was given to [`save_checkpoint`].
    pub metadata: BTreeMap<String, String>,
}

/// What the metadata says about a tensor.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    xxh3: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    k: Option<Header>,
}

/// A k-bit matrix but for its bytes.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    bits: usize,
    rows: usize,
    inputs: usize,
    codebook: Book,
    scales: Scales,
    /// Whether a tensor `<name>.permutation` (U32) holds the input permutation.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    permutation: bool,
}

/// A codebook; floats as their bits, since JSON knows no NaN.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Book {
    I8(Vec<i8>),
    F32Bits(Vec<u32>),
}

/// A tensor of the file to be.
struct Item<'a> {
    name: String,
    dtype: DType,
    shape: Vec<usize>,
    bytes: &'a [u8],
    k: Option<Header>,
}

/// Writes a saved model: never a part of one, and nothing else in its place before it is on the disk.
///
/// # Errors
/// [`Error::Argument`] for names that the format keeps for itself, [`Error::Io`].
pub fn save_checkpoint<'a>(
    path: impl AsRef<Path>,
    spec: &str,
    weights: impl IntoIterator<Item = (&'a str, &'a Weight)>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    const ZEROS: [u8; ALIGNMENT] = [0; ALIGNMENT];
    if let Some(key) = metadata.keys().find(|key| key.starts_with("kbit.")) {
        return Err(Error::Argument(format!(
            "metadata key {key:?}: names from \"kbit.\" on are taken"
        )));
    }
    let mut items = Vec::new();
    for (name, weight) in weights {
        if name.starts_with(PAD) || name == "__metadata__" {
            return Err(Error::Argument(format!(
                "weight {name:?}: the name is taken"
            )));
        }
        items.extend(items_of(name, weight));
    }
    // k-bit first, since they need no padding; otherwise by name, so that equal models are equal files.
    items.sort_by(|a, b| (a.k.is_none(), &a.name).cmp(&(b.k.is_none(), &b.name)));
    let mut padded = Vec::new();
    for item in items {
        let pad = item
            .bytes
            .len()
            .next_multiple_of(ALIGNMENT)
            .saturating_sub(item.bytes.len());
        padded.push(item);
        if let Some(zeros) = ZEROS.get(..pad).filter(|z| !z.is_empty()) {
            let name = format!("{PAD}{}", padded.len());
            let shape = vec![pad];
            padded.push(Item {
                name,
                dtype: DType::U8,
                shape,
                bytes: zeros,
                k: None,
            });
        }
    }
    let mut names: Vec<&str> = padded.iter().map(|item| item.name.as_str()).collect();
    names.sort_unstable();
    if let Some(twice) = names
        .array_windows()
        .find_map(|[a, b]| (a == b).then_some(a))
    {
        return Err(Error::Argument(format!(
            "two tensors would be named {twice:?}"
        )));
    }

    let checksums = checksums(&padded)?;
    let mut table = BTreeMap::new();
    let mut tensors = serde_json::Map::new();
    let mut at = 0usize;
    let mut digest = Xxh3::new();
    for (item, checksum) in padded.iter_mut().zip(checksums) {
        let end = at.saturating_add(item.bytes.len());
        let described = serde_json::json!({
            "dtype": item.dtype.name(), "shape": item.shape, "data_offsets": [at, end],
        });
        tensors.insert(item.name.clone(), described);
        describe(&mut digest, &item.name, item.dtype.name(), &item.shape);
        let entry = Entry {
            xxh3: format!("{checksum:016x}"),
            k: item.k.take(),
        };
        table.insert(item.name.as_str(), entry);
        at = end;
    }
    let json = |e: serde_json::Error| Error::Argument(format!("cannot be written as JSON: {e}"));
    let mut all = metadata.clone();
    all.insert("kbit.format".into(), FORMAT.to_string());
    all.insert("kbit.spec".into(), spec.into());
    all.insert(
        "kbit.tensors".into(),
        serde_json::to_string(&table).map_err(json)?,
    );
    all.insert("kbit.checksum".into(), seal(digest, &all));
    tensors.insert(
        "__metadata__".into(),
        serde_json::to_value(&all).map_err(json)?,
    );
    let mut header = serde_json::to_vec(&tensors).map_err(json)?;
    header.resize(
        header
            .len()
            .saturating_add(8)
            .next_multiple_of(ALIGNMENT)
            .saturating_sub(8),
        b' ',
    );
    if header.len() as u64 > crate::safetensors::MAX_HEADER {
        return Err(Error::Argument(format!(
            "a header of {} bytes; at most {} are read",
            header.len(),
            crate::safetensors::MAX_HEADER
        )));
    }

    atomic::write(path.as_ref(), |out| {
        out.put(&(header.len() as u64).to_le_bytes())?;
        out.put(&header)?;
        padded.iter().try_for_each(|item| out.put(item.bytes))
    })
}

fn items_of<'a>(name: &str, weight: &'a Weight) -> Vec<Item<'a>> {
    match weight {
        Weight::Dense(t) => vec![Item {
            name: name.into(),
            dtype: t.dtype(),
            shape: t.shape().to_vec(),
            bytes: t.bytes(),
            k: None,
        }],
        Weight::Quantised(k) => {
            let header = Header {
                bits: k.bits(),
                rows: k.rows(),
                inputs: k.inputs(),
                codebook: match k.codebook() {
                    Codebook::I8(book) => Book::I8(book.clone()),
                    Codebook::F32(book) => {
                        Book::F32Bits(book.iter().map(|v| v.to_bits()).collect())
                    }
                },
                scales: k.scales().clone(),
                permutation: k.permutation().is_some(),
            };
            let mut items = vec![Item {
                name: name.into(),
                dtype: DType::U8,
                shape: vec![k.bytes().len()],
                bytes: k.bytes(),
                k: Some(header),
            }];
            if let Some(permutation) = k.permutation() {
                items.push(Item {
                    name: format!("{name}{PERMUTATION}"),
                    dtype: DType::U32,
                    shape: vec![permutation.len()],
                    bytes: bytemuck::cast_slice(permutation),
                    k: None,
                });
            }
            items
        }
    }
}

/// Adds what a header says about a tensor to the digest of the file.
fn describe(digest: &mut Xxh3, name: &str, dtype: &str, shape: &[usize]) {
    for text in [name, dtype, &format!("{shape:?}")] {
        digest.update(&(text.len() as u64).to_le_bytes());
        digest.update(text.as_bytes());
    }
}

/// The value of `kbit.checksum`.
fn seal(mut digest: Xxh3, metadata: &BTreeMap<String, String>) -> String {
    for (key, value) in metadata.iter().filter(|(key, _)| *key != "kbit.checksum") {
        for text in [key, value] {
            digest.update(&(text.len() as u64).to_le_bytes());
            digest.update(text.as_bytes());
        }
    }
    format!("{:016x}", digest.digest())
}

/// One checksum an item, all pieces in parallel.
fn checksums(items: &[Item]) -> Result<Vec<u64>> {
    let pieces: Vec<&[u8]> = items
        .iter()
        .flat_map(|item| item.bytes.chunks(PIECE))
        .collect();
    let mut hashes = vec![0u64; pieces.len()];
    parallel::for_each_piece(0, &mut hashes, 1, |i, hash| {
        hash.fill(pieces.get(i).map_or(0, |piece| xxh3_64(piece)));
        Ok(())
    })?;
    let mut rest = hashes.as_slice();
    Ok(items
        .iter()
        .map(|item| {
            let (mine, others) = rest.split_at(item.bytes.len().div_ceil(PIECE).min(rest.len()));
            rest = others;
            combine(mine)
        })
        .collect())
}

/// The checksum of a tensor whose pieces hash to `pieces`.
fn combine(pieces: &[u64]) -> u64 {
    let mut digest = Xxh3::new();
    for hash in pieces {
        digest.update(&hash.to_le_bytes());
    }
    digest.digest()
}

/// Reads a model that [`save_checkpoint`] wrote, verifying every checksum. `mapped`: share the pages of the file instead
/// of copying it (see [`TensorFile::open_mapped`]).
///
/// # Errors
/// [`Error::Format`] for a file that is damaged or was not written by kbit, [`Error::Unsupported`] for a newer format,
/// [`Error::Io`], [`Error::Memory`].
pub fn open_checkpoint(path: impl AsRef<Path>, mapped: bool) -> Result<Checkpoint> {
    let path = path.as_ref();
    let file = if mapped {
        TensorFile::open_mapped(path)?
    } else {
        TensorFile::open(path)?
    };
    read_checkpoint(&file)
}

/// Reads a model from an open file: see [`open_checkpoint`].
///
/// # Errors
/// As [`open_checkpoint`].
pub fn read_checkpoint(file: &TensorFile) -> Result<Checkpoint> {
    let wrong = |what: String| Error::Format(format!("{}: saved model: {what}", file.path()));
    let mut metadata = BTreeMap::new();
    for (key, value) in file.metadata() {
        if let Value::String(value) = value {
            metadata.insert(key.clone(), value.clone());
        }
    }
    match metadata.get("kbit.format") {
        None => {
            return Err(wrong(
                "its metadata has no kbit.format: not written by kbit".into(),
            ));
        }
        Some(found) if *found == FORMAT.to_string() => {}
        Some(found) if found.parse::<u32>().is_ok_and(|n| n > FORMAT) => {
            return Err(Error::Unsupported(format!(
                "{}: saved model of kbit.format {found}; this kbit reads {FORMAT}",
                file.path()
            )));
        }
        Some(found) => {
            return Err(wrong(format!(
                "kbit.format is {found:?}, not a number from {FORMAT} on"
            )));
        }
    }
    let mut digest = Xxh3::new();
    for info in file.tensors() {
        describe(&mut digest, &info.name, info.stored.name(), &info.shape);
    }
    let (found, stored) = (seal(digest, &metadata), metadata.remove("kbit.checksum"));
    if stored.as_ref() != Some(&found) {
        return Err(wrong(format!(
            "its header is damaged: checksum {found}, written was {stored:?}"
        )));
    }
    let mut take = |key: &str| {
        let value = metadata.remove(key);
        value.ok_or_else(|| wrong(format!("its metadata has no {key}")))
    };
    let (spec, table) = (take("kbit.spec")?, take("kbit.tensors")?);
    let mut table: BTreeMap<String, Entry> =
        serde_json::from_str(&table).map_err(|e| wrong(format!("kbit.tensors: {e}")))?;

    let (data, start, hashes) = read_data(file)?;
    let mut parts = BTreeMap::new();
    let mut rest = hashes.as_slice();
    for info in file.tensors() {
        let entry = table
            .remove(&info.name)
            .ok_or_else(|| wrong(format!("kbit.tensors lacks {:?}", info.name)))?;
        let len = to_usize(info.nbytes)?;
        let (mine, others) = rest.split_at(len.div_ceil(PIECE).min(rest.len()));
        rest = others;
        let found = format!("{:016x}", combine(mine));
        if found != entry.xxh3 {
            return Err(wrong(format!(
                "tensor {:?} is damaged: checksum {found}, written was {}",
                info.name, entry.xxh3
            )));
        }
        let at = to_usize(info.at.saturating_sub(start))?;
        let part = Part {
            bytes: data.clone(),
            at,
            len,
        };
        parts.insert(
            info.name.as_str(),
            (part, info.stored, &info.shape, entry.k),
        );
    }
    if let Some(name) = table.keys().next() {
        return Err(wrong(format!(
            "kbit.tensors has {name:?}, which is not in the file"
        )));
    }

    let mut weights = BTreeMap::new();
    let mut permutations = BTreeMap::new();
    for (name, (_, _, _, k)) in &parts {
        if k.as_ref().is_some_and(|k| k.permutation) {
            let from = format!("{name}{PERMUTATION}");
            let (part, ..) = parts
                .get(from.as_str())
                .ok_or_else(|| wrong(format!("no tensor {from:?}")))?;
            let values = part
                .as_slice()
                .as_chunks()
                .0
                .iter()
                .map(|b| u32::from_le_bytes(*b));
            permutations.insert(from, values.collect::<Arc<[u32]>>());
        }
    }
    for (name, (part, stored, shape, k)) in parts {
        if name.starts_with(PAD) || permutations.contains_key(name) {
            continue;
        }
        let weight = match (k, stored) {
            (Some(k), _) => {
                let permutation = permutations.get(&format!("{name}{PERMUTATION}")).cloned();
                Weight::Quantised(
                    matrix(k, permutation, part).map_err(|e| wrong(format!("{name:?}: {e}")))?,
                )
            }
            (None, Stored::Plain(dtype)) => Weight::Dense(part.into_tensor(dtype, shape)?),
            (None, _) => return Err(wrong(format!("{name:?} has type {}", stored.name()))),
        };
        weights.insert(name.to_owned(), weight);
    }
    metadata.remove("kbit.format");
    Ok(Checkpoint {
        spec,
        weights,
        metadata,
    })
}

fn matrix(k: Header, permutation: Option<Arc<[u32]>>, part: Part) -> Result<KTensor> {
    let book = match k.codebook {
        Book::I8(book) => Codebook::I8(book),
        Book::F32Bits(bits) => Codebook::F32(bits.into_iter().map(f32::from_bits).collect()),
    };
    let wanted = KLayout::new(k.bits, k.rows, k.inputs, &k.scales)?.nbytes();
    if wanted != part.len {
        return Err(Error::Format(format!(
            "wants {wanted} bytes, has {}",
            part.len
        )));
    }
    KTensor::new(
        k.bits,
        k.rows,
        k.inputs,
        book,
        k.scales,
        permutation,
        part.bytes,
        part.at,
    )
}

/// All data of a file in one buffer, the position in the file where the buffer starts, and the hash of every piece of
/// every tensor, in order.
fn read_data(file: &TensorFile) -> Result<(Arc<Bytes>, u64, Vec<u64>)> {
    let mut pieces = Vec::new();
    for info in file.tensors() {
        let mut from = 0;
        while from < info.nbytes {
            let len = info.nbytes.saturating_sub(from).min(PIECE as u64);
            pieces.push((info, from, to_usize(len)?));
            from = from.saturating_add(len);
        }
    }
    let mut hashes = vec![0u64; pieces.len()];
    if let Some(data) = file.memory() {
        parallel::for_each_piece(0, &mut hashes, 1, |i, hash| {
            if let Some((info, from, len)) = pieces.get(i) {
                let part = file.read_range(info, *from, *len as u64)?;
                hash.fill(xxh3_64(part.as_slice()));
            }
            Ok(())
        })?;
        return Ok((data, 0, hashes));
    }
    let start = file.tensors().first().map_or(0, |info| info.at);
    let total = file
        .tensors()
        .iter()
        .try_fold(0u64, |n, info| n.checked_add(info.nbytes));
    let total = total.ok_or_else(|| Error::Format(format!("{}: too large", file.path())))?;
    let mut data = Bytes::zeroed(to_usize(total)?)?;
    {
        let mut rest: &mut [u8] = &mut data;
        let mut places = Vec::new();
        for (info, from, len) in &pieces {
            let (place, others) = std::mem::take(&mut rest).split_at_mut(*len);
            rest = others;
            places.push((info, *from, place));
        }
        let mut work: Vec<_> = places.into_iter().zip(&mut hashes).collect();
        parallel::for_each_piece(0, &mut work, 1, |_, work| {
            for ((info, from, place), hash) in work {
                file.read_into(info, *from, place)?;
                **hash = xxh3_64(place);
            }
            Ok(())
        })?;
    }
    Ok((Arc::new(data), start, hashes))
}
