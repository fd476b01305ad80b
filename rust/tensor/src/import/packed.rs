//! The dialects of safetensors checkpoints: GPTQ, AWQ, compressed-tensors, bitsandbytes, MXFP4 and fp8 with scales.
//! Each becomes a [`KTensor`] of the same values; what cannot is refused with the reason.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Deserialize;

use super::ggml;
use super::grouped::{Grouped, Zeros, take_rows};
use crate::file::{Stored, TensorFile};
use crate::transform::{Transform, View};
use crate::{Bytes, Codebook, DType, Error, KTensor, Result, ScaleType, Tensor};

/// What a checkpoint's config says about its packing.
#[derive(Clone, Copy, Debug, Default)]
pub struct PackedOptions {
    /// Bits of a code; needed by GPTQ and compressed-tensors.
    pub bits: Option<usize>,
    /// (rows, inputs) under one scale of block-wise fp8, where the shapes alone do not tell.
    pub block: Option<(usize, usize)>,
}

/// The tensors of one weight, by the part they play: `("qweight", (file, name))`.
pub type Parts<'a> = BTreeMap<String, (&'a TensorFile, &'a str)>;

/// The dialects by name, each with its parts; those in brackets may be absent.
pub const DIALECTS: [(&str, &str); 7] = [
    ("gptq", "qweight qzeros scales [g_idx]"),
    ("gptq_v2", "qweight qzeros scales [g_idx]"),
    ("awq", "qweight qzeros scales"),
    (
        "compressed",
        "weight_packed weight_scale [weight_zero_point] [weight_g_idx]",
    ),
    (
        "bitsandbytes",
        "weight absmax quant_map quant_state [nested_absmax] [nested_quant_map]",
    ),
    ("mxfp4", "blocks scales"),
    ("fp8", "weight weight_scale"),
];

/// Reads a weight of a dialect with all its values as they are. Transforms may take and rearrange rows; of MXFP4, which
/// stacks experts, they may select first.
///
/// # Errors
/// [`Error::Argument`] for an unknown dialect, a missing or unknown part; [`Error::Format`] for parts that do not fit
/// each other; [`Error::Unsupported`] for what [`KTensor`] cannot hold.
pub fn load_packed(
    dialect: &str,
    parts: &Parts<'_>,
    transforms: &[Transform],
    options: &PackedOptions,
) -> Result<KTensor> {
    let known = DIALECTS.iter().find(|(name, _)| *name == dialect);
    let (dialect, wanted) = *known.ok_or_else(|| {
        let names: Vec<&str> = DIALECTS.iter().map(|(name, _)| *name).collect();
        Error::Argument(format!(
            "dialect {dialect:?}; known are {}",
            names.join(", ")
        ))
    })?;
    let is = |part: &str, word: &str| word.trim_matches(['[', ']']) == part;
    let missing = wanted
        .split(' ')
        .find(|w| !w.starts_with('[') && !parts.contains_key(*w));
    let unknown = parts
        .keys()
        .find(|part| !wanted.split(' ').any(|w| is(part, w)));
    if missing.is_some() || unknown.is_some() {
        let names: Vec<&str> = parts.keys().map(String::as_str).collect();
        return Err(Error::Argument(format!(
            "{dialect} wants {wanted}, got {}",
            names.join(" ")
        )));
    }
    if dialect == "mxfp4" {
        return mxfp4(
            &view(parts, "blocks", transforms)?,
            &view(parts, "scales", transforms)?,
        );
    }
    let set = Set { dialect, parts };
    let k = match dialect {
        "gptq" | "gptq_v2" => gptq(&set, options, dialect == "gptq")?,
        "awq" => awq(&set)?,
        "compressed" => compressed(&set, options)?,
        "bitsandbytes" => bitsandbytes(&set)?,
        _ => fp8(&set, options)?,
    };
    if transforms.is_empty() {
        return Ok(k);
    }
    // What the steps do to the numbers of the rows, they do to the rows.
    let numbers: Vec<u32> = (0..k.rows() as u32).collect();
    let numbers = Bytes::copy_of(bytemuck::cast_slice(&numbers))?;
    let mut rows = View::of_memory(DType::U32, vec![k.rows()], numbers)?;
    for step in transforms {
        if !matches!(step, Transform::Rows(..) | Transform::PermuteRope { .. }) {
            return Err(Error::Unsupported(format!(
                "{dialect} weights only have their rows taken and permuted, not {step:?}"
            )));
        }
        rows = rows.apply(step)?;
    }
    let mut numbers = vec![0; rows.rows() * 4];
    rows.read_rows(0, &mut numbers)?;
    let numbers: Vec<u32> = numbers
        .as_chunks()
        .0
        .iter()
        .map(|b| u32::from_le_bytes(*b))
        .collect();
    take_rows(&k, &numbers)
}

fn view<'a>(parts: &Parts<'a>, part: &str, transforms: &[Transform]) -> Result<View<'a>> {
    let source = parts
        .get(part)
        .ok_or_else(|| Error::Argument(format!("no {part}")))?;
    let mut view = View::new(&[*source])?;
    if part == "blocks" {
        // (..., groups, 16) is rows of groups * 16 bytes.
        let mut shape = view.shape().to_vec();
        if let (Some(bytes), Some(groups)) = (shape.pop(), shape.last_mut()) {
            *groups *= bytes;
        }
        view = view.apply(&Transform::Reshape(shape))?;
    }
    transforms.iter().try_fold(view, View::apply)
}

/// The parts of a weight of one dialect.
struct Set<'a> {
    dialect: &'a str,
    parts: &'a Parts<'a>,
}

impl Set<'_> {
    fn wrong(&self, what: impl std::fmt::Display) -> Error {
        let first = self.parts.values().next();
        let (file, name) = first.map_or(("", ""), |(file, name)| (file.path(), *name));
        Error::Format(format!("{file}: {name:?}: {}: {what}", self.dialect))
    }

    fn read(&self, part: &str) -> Result<Tensor> {
        let (file, name) = self
            .parts
            .get(part)
            .ok_or_else(|| Error::Argument(format!("no {part}")))?;
        file.read(name)
    }

    /// A matrix of 32-bit words: (words, rows, columns).
    fn words(&self, part: &str) -> Result<(Words, usize, usize)> {
        let t = self.read(part)?;
        match (t.dtype(), t.shape()) {
            (DType::I32 | DType::U32, &[a, b]) => Ok((Words(t), a, b)),
            (dtype, shape) => Err(self.wrong(format!(
                "{part} must be a matrix of I32, is {} {shape:?}",
                dtype.name()
            ))),
        }
    }

    /// A matrix of scales: (scales, rows, columns).
    fn scales(&self, part: &str) -> Result<(ScaleTable, usize, usize)> {
        let t = self.read(part)?;
        let (rows, columns) = match *t.shape() {
            [] => (1, 1),
            [n] => (n, 1),
            [a, b] => (a, b),
            _ => return Err(self.wrong(format!("{part} must be a matrix, is {:?}", t.shape()))),
        };
        let kind = match t.dtype() {
            DType::F16 => ScaleType::F16,
            DType::BF16 => ScaleType::BF16,
            DType::F32 => ScaleType::F32,
            other => return Err(self.wrong(format!("{part} must be floats, is {}", other.name()))),
        };
        Ok((ScaleTable { t, kind }, rows, columns))
    }

    /// Group size and column order from the group of each input.
    fn order(
        &self,
        part: &str,
        inputs: usize,
        groups: usize,
    ) -> Result<(usize, Option<Arc<[u32]>>)> {
        let even = || match inputs.checked_rem(groups) {
            Some(0) => Ok((inputs / groups, None)),
            _ => Err(self.wrong(format!(
                "{inputs} inputs do not divide into {groups} groups"
            ))),
        };
        if !self.parts.contains_key(part) {
            return even();
        }
        let t = self.read(part)?;
        if t.is_empty() {
            return even();
        }
        if t.dtype() != DType::I32 || t.shape() != [inputs] {
            return Err(self.wrong(format!(
                "{part} must be {inputs} of I32, is {} {:?}",
                t.dtype().name(),
                t.shape()
            )));
        }
        let of: Vec<u32> = t
            .bytes()
            .as_chunks()
            .0
            .iter()
            .map(|b| u32::from_le_bytes(*b))
            .collect();
        if of.iter().all(|g| *g == u32::MAX) {
            // compressed-tensors: -1 throughout means that there is no order.
            return even();
        }
        if let Some(g) = of.iter().find(|g| **g as usize >= groups) {
            return Err(self.wrong(format!("{part} names group {g} of {groups}")));
        }
        let size = of.iter().filter(|g| **g == of[0]).count();
        let mut order: Vec<u32> = (0..inputs as u32).collect();
        order.sort_by_key(|&i| of[i as usize]);
        let regular = order
            .iter()
            .enumerate()
            .all(|(j, &i)| of[i as usize] as usize == j / size);
        if !regular {
            return Err(Error::Unsupported(format!(
                "{}: groups of different sizes ({size} and others)",
                self.dialect
            )));
        }
        let moved = order.iter().enumerate().any(|(j, &i)| j != i as usize);
        Ok((size, moved.then(|| order.into())))
    }
}

/// 32-bit words of a matrix.
struct Words(Tensor);

impl Words {
    fn get(&self, at: usize) -> u32 {
        self.0
            .bytes()
            .as_chunks()
            .0
            .get(at)
            .map_or(0, |b| u32::from_le_bytes(*b))
    }

    /// Element `index` of a little-endian stream of `bits` each, whose word k is word `word(k)`.
    fn stream(&self, bits: usize, index: usize, word: impl Fn(usize) -> usize) -> u8 {
        let (k, shift) = (index * bits / 32, index * bits % 32);
        let mut found = u64::from(self.get(word(k)));
        if shift + bits > 32 {
            found |= u64::from(self.get(word(k + 1))) << 32;
        }
        (found >> shift & ((1 << bits) - 1)) as u8
    }
}

struct ScaleTable {
    t: Tensor,
    kind: ScaleType,
}

impl ScaleTable {
    fn get(&self, at: usize) -> [u8; 4] {
        let mut out = [0; 4];
        let size = self.kind.size();
        if let Some(found) = self.t.bytes().chunks_exact(size).nth(at) {
            out[..size].copy_from_slice(found);
        }
        out
    }
}

fn bits_of(set: &Set, options: &PackedOptions, allowed: &[usize]) -> Result<usize> {
    match options.bits {
        Some(bits) if allowed.contains(&bits) => Ok(bits),
        Some(bits) => Err(Error::Unsupported(format!(
            "{} of {bits} bits; read are {allowed:?}",
            set.dialect
        ))),
        None => Err(Error::Argument(format!("{} wants bits", set.dialect))),
    }
}

/// `qweight` (inputs * bits / 32, rows) streams along inputs, `qzeros` (groups, rows * bits / 32) along rows, `scales`
/// (groups, rows). The first version stores zero points less one.
fn gptq(set: &Set, options: &PackedOptions, less_one: bool) -> Result<KTensor> {
    let bits = bits_of(set, options, &[2, 3, 4, 8])?;
    let (q, q_rows, rows) = set.words("qweight")?;
    let (z, z_groups, z_columns) = set.words("qzeros")?;
    let (scales, groups, columns) = set.scales("scales")?;
    let inputs = q_rows * 32 / bits;
    if q_rows * 32 % bits != 0
        || columns != rows
        || z_groups != groups
        || z_columns != (rows * bits).div_ceil(32)
    {
        return Err(set.wrong(format!(
            "qweight {q_rows} x {rows} at {bits} bits, qzeros {z_groups} x {z_columns}, scales {groups} x {columns}"
        )));
    }
    let (group, permutation) = set.order("g_idx", inputs, groups)?;
    // One was taken from whole words, where a zero point of 0 borrows from its neighbour. At 3 bits, fields lie across
    // words and each wraps for itself.
    let mask = (1 << bits) - 1;
    let ones = if less_one { u32::MAX / mask } else { 0 };
    let zeros = Zeros::new(set.dialect, bits, rows, groups, |row, g| {
        let zero = if bits == 3 {
            u32::from(z.stream(bits, row, |k| g * z_columns + k)) + u32::from(less_one)
        } else {
            let word = z.get(g * z_columns + row * bits / 32);
            word.wrapping_add(ones) >> (row * bits % 32)
        };
        (zero & mask) as i32
    })?;
    Grouped {
        dialect: set.dialect,
        bits,
        rows,
        inputs,
        group,
        codebook: zeros.book.clone(),
        scale_type: scales.kind,
        permutation,
        code: &|row, input| q.stream(bits, input, |k| k * rows + row),
        scale: &|row, g| scales.get(g * rows + row),
        zeros: Some(&zeros),
    }
    .build()
}

/// Eight 4-bit codes of neighbouring rows a word, in the order 0 2 4 6 1 3 5 7: `qweight` (inputs, rows / 8), `qzeros`
/// (groups, rows / 8), `scales` (groups, rows).
fn awq(set: &Set) -> Result<KTensor> {
    const PLACE: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];
    let (q, inputs, words) = set.words("qweight")?;
    let (z, z_groups, z_words) = set.words("qzeros")?;
    let (scales, groups, rows) = set.scales("scales")?;
    if words * 8 != rows || z_words != words || z_groups != groups {
        return Err(set.wrong(format!(
            "qweight {inputs} x {words}, qzeros {z_groups} x {z_words}, scales {groups} x {rows}"
        )));
    }
    let (group, _) = set.order("", inputs, groups)?;
    let four = |w: &Words, line: usize, row: usize| {
        (w.get(line * words + row / 8) >> (4 * PLACE[row % 8]) & 15) as u8
    };
    let zeros = Zeros::new(set.dialect, 4, rows, groups, |row, g| {
        i32::from(four(&z, g, row))
    })?;
    Grouped {
        dialect: set.dialect,
        bits: 4,
        rows,
        inputs,
        group,
        codebook: zeros.book.clone(),
        scale_type: scales.kind,
        permutation: None,
        code: &|row, input| four(&q, input, row),
        scale: &|row, g| scales.get(g * rows + row),
        zeros: Some(&zeros),
    }
    .build()
}

/// `weight_packed` (rows, inputs * bits / 32), `weight_scale` (rows, groups), `weight_zero_point` (rows * bits / 32,
/// groups); codes and zero points are shifted by half the range.
fn compressed(set: &Set, options: &PackedOptions) -> Result<KTensor> {
    let bits = bits_of(set, options, &[2, 4, 8])?;
    let (q, rows, words) = set.words("weight_packed")?;
    let (scales, s_rows, groups) = set.scales("weight_scale")?;
    let inputs = words * 32 / bits;
    if s_rows != rows {
        return Err(set.wrong(format!(
            "weight_packed has {rows} rows, weight_scale {s_rows}"
        )));
    }
    let (group, permutation) = set.order("weight_g_idx", inputs, groups)?;
    let half = 1 << (bits - 1);
    let zeros = if set.parts.contains_key("weight_zero_point") {
        let (z, z_rows, z_groups) = set.words("weight_zero_point")?;
        if z_groups != groups || z_rows != (rows * bits).div_ceil(32) {
            return Err(set.wrong(format!(
                "weight_zero_point {z_rows} x {z_groups} for {rows} rows and {groups} groups"
            )));
        }
        Zeros::new(set.dialect, bits, rows, groups, |row, g| {
            i32::from(z.stream(bits, row, |k| k * groups + g))
        })?
    } else {
        Zeros::new(set.dialect, bits, rows, groups, |_, _| half)?
    };
    Grouped {
        dialect: set.dialect,
        bits,
        rows,
        inputs,
        group,
        codebook: zeros.book.clone(),
        scale_type: scales.kind,
        permutation,
        code: &|row, input| q.stream(bits, input, |k| row * words + k),
        scale: &|row, g| scales.get(row * groups + g),
        zeros: Some(&zeros),
    }
    .build()
}

/// The JSON that bitsandbytes stores beside a weight.
#[derive(Deserialize)]
struct QuantState {
    quant_type: String,
    blocksize: usize,
    shape: Vec<usize>,
    #[serde(default)]
    nested_blocksize: usize,
    #[serde(default)]
    nested_offset: f64,
}

/// Two codes a byte, the first in the high nibble, over the flattened matrix; one absmax a block, which may itself be
/// stored as 8-bit codes under a scale per block of blocks, plus an offset.
fn bitsandbytes(set: &Set) -> Result<KTensor> {
    let state = set.read("quant_state")?;
    let state: QuantState = serde_json::from_slice(state.bytes())
        .map_err(|e| set.wrong(format!("quant_state: {e}")))?;
    if !matches!(state.quant_type.as_str(), "nf4" | "fp4") {
        return Err(Error::Unsupported(format!(
            "bitsandbytes type {:?}; nf4 and fp4 are read",
            state.quant_type
        )));
    }
    let &[rows, inputs] = state.shape.as_slice() else {
        return Err(set.wrong(format!(
            "a matrix is wanted, quant_state says {:?}",
            state.shape
        )));
    };
    let (weight, map) = (set.read("weight")?, set.read("quant_map")?);
    let block = state.blocksize;
    let elements = rows.checked_mul(inputs);
    let (Some(n), true) = (elements, block > 0 && inputs.checked_rem(block) == Some(0)) else {
        return Err(Error::Unsupported(format!(
            "bitsandbytes: blocks of {block} across rows of {inputs} inputs"
        )));
    };
    if weight.dtype() != DType::U8 || weight.len() != n.div_ceil(2) {
        return Err(set.wrong(format!(
            "{rows} x {inputs} codes want {} bytes, weight is {} {:?}",
            n.div_ceil(2),
            weight.dtype().name(),
            weight.shape()
        )));
    }
    let book = map.to_f32();
    if book.len() != 16 {
        return Err(set.wrong(format!("quant_map has {} entries, not 16", book.len())));
    }
    let stored = set.read("absmax")?;
    let absmax: Vec<f32> = if stored.dtype() == DType::U8 {
        let (outer, code) = (
            set.read("nested_absmax")?.to_f32(),
            set.read("nested_quant_map")?.to_f32(),
        );
        let per = state.nested_blocksize;
        if per == 0 || outer.len() < stored.len().div_ceil(per) || code.len() != 256 {
            return Err(set.wrong(format!(
                "{} absmax in blocks of {per}, {} scales, {} codes",
                stored.len(),
                outer.len(),
                code.len()
            )));
        }
        let values = stored.bytes().iter().enumerate();
        values
            .map(|(i, &c)| code[usize::from(c)] * outer[i / per] + state.nested_offset as f32)
            .collect()
    } else {
        stored.to_f32()
    };
    if absmax.len() != n / block {
        return Err(set.wrong(format!(
            "{} blocks of {block}, {} absmax",
            n / block,
            absmax.len()
        )));
    }
    let (bytes, groups) = (weight.bytes(), inputs / block);
    Grouped {
        dialect: set.dialect,
        bits: 4,
        rows,
        inputs,
        group: block,
        codebook: Codebook::F32(book),
        scale_type: ScaleType::F32,
        permutation: None,
        code: &|row, input| {
            let at = row * inputs + input;
            let byte = bytes.get(at / 2).copied().unwrap_or(0);
            if at % 2 == 0 { byte >> 4 } else { byte & 15 }
        },
        scale: &|row, g| {
            absmax
                .get(row * groups + g)
                .map_or([0; 4], |v| v.to_le_bytes())
        },
        zeros: None,
    }
    .build()
}

/// `weight` of fp8 (rows, inputs) with one scale for all, a row, or a block of rows and inputs.
fn fp8(set: &Set, options: &PackedOptions) -> Result<KTensor> {
    let weight = set.read("weight")?;
    let (scales, s_rows, s_columns) = set.scales("weight_scale")?;
    let (dtype, &[rows, inputs]) = (weight.dtype(), weight.shape()) else {
        return Err(set.wrong(format!("weight must be a matrix, is {:?}", weight.shape())));
    };
    if !matches!(dtype, DType::F8E4M3 | DType::F8E5M2) {
        return Err(set.wrong(format!("weight must be fp8, is {}", dtype.name())));
    }
    let (row_block, block) = match options.block {
        Some(block) if s_rows * s_columns > 1 => block,
        _ => (
            rows.div_ceil(s_rows.max(1)),
            inputs.div_ceil(s_columns.max(1)),
        ),
    };
    if row_block == 0
        || block == 0
        || rows.div_ceil(row_block) != s_rows
        || inputs.div_ceil(block) != s_columns
    {
        return Err(set.wrong(format!(
            "{rows} x {inputs} in blocks of {row_block} x {block}, scales {s_rows} x {s_columns}"
        )));
    }
    let all: Vec<u8> = (0..=u8::MAX).collect();
    let mut book = vec![0.0; 256];
    dtype.decode(&all, &mut book);
    let bytes = weight.bytes();
    Grouped {
        dialect: set.dialect,
        bits: 8,
        rows,
        inputs,
        group: block,
        codebook: Codebook::F32(book),
        scale_type: scales.kind,
        permutation: None,
        code: &|row, input| bytes.get(row * inputs + input).copied().unwrap_or(0),
        scale: &|row, g| scales.get(row / row_block * s_columns + g),
        zeros: None,
    }
    .build()
}

/// Rows of FP4 pairs, the first in the low nibble, and one power of two per 32 of them.
fn mxfp4(blocks: &View, scales: &View) -> Result<KTensor> {
    let wrong = |what: String| Error::Format(format!("mxfp4: {what}"));
    let bytes = |view: &View| view.stored() == Stored::Plain(DType::U8) && !view.is_computed();
    let (&[rows, width], &[s_rows, groups]) = (blocks.shape(), scales.shape()) else {
        return Err(wrong(format!(
            "blocks {:?} and scales {:?} must be matrices",
            blocks.shape(),
            scales.shape()
        )));
    };
    if !bytes(blocks) || !bytes(scales) || rows != s_rows || groups.checked_mul(16) != Some(width) {
        return Err(wrong(format!(
            "blocks {} {rows} x {width}, scales {} {s_rows} x {groups}",
            blocks.stored().name(),
            scales.stored().name()
        )));
    }
    // GGUF's MXFP4 holds the same values, with the nibbles of a block in another order.
    let mut out = Bytes::zeroed(
        rows.checked_mul(groups)
            .and_then(|n| n.checked_mul(17))
            .ok_or_else(|| wrong("too large".into()))?,
    )?;
    crate::parallel::for_each_piece(0, &mut out, groups * 17, |row, out| {
        let (mut pairs, mut exponents) = (vec![0; width], vec![0; groups]);
        blocks.read_rows(row, &mut pairs)?;
        scales.read_rows(row, &mut exponents)?;
        for ((out, pairs), exponent) in out
            .as_chunks_mut::<17>()
            .0
            .iter_mut()
            .zip(pairs.as_chunks::<16>().0)
            .zip(exponents)
        {
            out[0] = exponent;
            let nibble = |e: usize| pairs[e / 2] >> (e % 2 * 4) & 15;
            for (e, byte) in out[1..].iter_mut().enumerate() {
                *byte = nibble(e) | nibble(e + 16) << 4;
            }
        }
        Ok(())
    })?;
    ggml::import_bytes(crate::gguf::GgmlType::MXFP4, rows, groups * 32, out)
}
