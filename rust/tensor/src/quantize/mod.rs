//! How codes, sub-scales and scales are chosen. What they then mean is `docs/numerics.md`; where they lie, `ktensor.rs`.
//!
//! A matrix is quantised in two passes over its rows, neither of which holds it whole:
//!
//! ```text
//! sample: up to 256 super-blocks, evenly spread  ->  codebook and ladder of the tensor   (learn.rs, codebook.rs)
//! rows:   16 at a time, panels in parallel       ->  scale, sub-scales, codes            (search.rs)
//! ```
//!
//! Every choice is made by integer sums or by single IEEE operations in a written order, so that the result is the same
//! on every machine and with any number of threads.

mod codebook;
mod learn;
mod search;

use std::sync::Arc;

use rayon::prelude::*;

pub use codebook::CodebookFormat;
use search::{Levels, Scratch};

use crate::{Bytes, CHUNK, Codebook, Error, KLayout, KTensor, ROWS, Result, SUPER, Scales};

/// How a matrix is to be quantised.
#[derive(Clone, Copy, Debug)]
pub struct QuantizeOptions<'a> {
    /// Width of a code, 2..=8.
    pub bits: usize,
    /// What the codes stand for.
    pub format: CodebookFormat,
    /// Inputs under one sub-scale: 16, 32 or 64; 256 for one scale per row and super-block without sub-scales.
    /// `None`: [`default_block`].
    pub block: Option<usize>,
    /// Weight of each input's squared error, (inputs,): not negative, not all zero.
    pub importance: Option<&'a [f32]>,
    /// Threads; 0 for all of rayon's pool.
    pub threads: usize,
}

impl QuantizeOptions<'_> {
    /// The defaults at a width: learned codebook, [`default_block`], no importance, all threads.
    pub fn new(bits: usize) -> Self {
        Self {
            bits,
            format: CodebookFormat::Learned,
            block: None,
            importance: None,
            threads: 0,
        }
    }
}

/// The block with the least error for its bits (measured in `docs/formats.md`): at 8 bits sub-scales cannot help.
pub fn default_block(bits: usize) -> usize {
    match bits {
        0..=7 => 32,
        _ => SUPER,
    }
}

/// Quantises `values` (rows, inputs), row-major.
///
/// ```
/// use kbit_tensor::{QuantizeOptions, quantize};
///
/// let values: Vec<f32> = (0..32 * 64).map(|i| (i as f32).sin()).collect();
/// let k = quantize(&values, 32, 64, &QuantizeOptions::new(4))?;
/// let worst = values.iter().zip(k.dequantize()).map(|(a, b)| (a - b).abs());
/// assert!(worst.fold(0.0, f32::max) < 0.12);
/// # Ok::<(), kbit_tensor::Error>(())
/// ```
///
/// # Errors
/// [`Error::Argument`] for options out of range, a length other than `rows * inputs`, or a value that is not finite
/// (named by row and column); [`Error::Memory`] without room for the result.
pub fn quantize(
    values: &[f32],
    rows: usize,
    inputs: usize,
    options: &QuantizeOptions,
) -> Result<KTensor> {
    if rows.checked_mul(inputs) != Some(values.len()) {
        return Err(Error::Argument(format!(
            "quantize: {rows} rows x {inputs} inputs want {} values, got {}",
            rows as u128 * inputs as u128,
            values.len()
        )));
    }
    quantize_rows(rows, inputs, options, &|first, out| {
        let at = first * inputs;
        out.copy_from_slice(&values[at..at + out.len()]);
        Ok(())
    })
}

/// Writes rows `first..first + out.len() / inputs` of a matrix to `out`.
pub type ReadRows<'a> = dyn Fn(usize, &mut [f32]) -> Result<()> + Sync + 'a;

/// Quantises the matrix (rows, inputs) that `read` gives piece by piece: single rows for the sample, then 16 at a time,
/// from several threads. Holds the result and 16 rows a thread.
///
/// # Errors
/// As [`quantize`], and what `read` returns.
pub fn quantize_rows(
    rows: usize,
    inputs: usize,
    options: &QuantizeOptions,
    read: &ReadRows,
) -> Result<KTensor> {
    let bits = options.bits;
    let block = options.block.unwrap_or_else(|| default_block(bits));
    let wrong = |what: String| {
        Error::Argument(format!("quantize {rows} x {inputs} to {bits} bits: {what}"))
    };
    if !(2..=8).contains(&bits) {
        return Err(wrong("bits must be 2..=8".into()));
    }
    if ![16, 32, 64, SUPER].contains(&block) {
        return Err(wrong(format!(
            "block must be 16, 32, 64 or 256, is {block}"
        )));
    }
    let importance = options
        .importance
        .map(|i| integer_importance(i, inputs).map_err(wrong))
        .transpose()?;
    // Refuses empty and oversized matrices before anything is read.
    KLayout::new(bits, rows, inputs, &scales(block, [0; 16]))
        .map_err(|e| Error::Argument(e.to_string()))?;
    let work = || {
        let sample = learn::Sample::read(rows, inputs, importance.as_deref(), read)?;
        let (book, ladder) = learn::tables(bits, options.format, block, &sample);
        panels(
            rows,
            inputs,
            book,
            scales(block, ladder),
            importance.as_deref(),
            read,
        )
    };
    if options.threads == 0 {
        return work();
    }
    rayon::ThreadPoolBuilder::new()
        .num_threads(options.threads)
        .build()
        .map_err(|e| {
            Error::Memory(format!(
                "quantize: cannot start {} threads: {e}",
                options.threads
            ))
        })?
        .install(work)
}

fn scales(block: usize, ladder: [u8; 16]) -> Scales {
    if block == SUPER {
        Scales::Row
    } else {
        Scales::Ladder { block, ladder }
    }
}

/// Importance as integers, 64 at the mean, so that weighted errors add up exactly.
fn integer_importance(importance: &[f32], inputs: usize) -> std::result::Result<Vec<u32>, String> {
    if importance.len() != inputs {
        return Err(format!(
            "importance wants {inputs} values, has {}",
            importance.len()
        ));
    }
    if let Some(j) = importance
        .iter()
        .position(|i| !(i.is_finite() && *i >= 0.0))
    {
        return Err(format!(
            "importance must be finite and not negative, is {} at input {j}",
            importance[j]
        ));
    }
    let mean = importance.iter().map(|&i| f64::from(i)).sum::<f64>() / inputs as f64;
    if mean == 0.0 {
        return Err("importance is zero everywhere".into());
    }
    Ok(importance
        .iter()
        .map(|&i| (f64::from(i) / mean * 64.0 + 0.5).clamp(1.0, 65535.0) as u32)
        .collect())
}

/// The position of the first value that is not finite, as an error.
fn check_finite(values: &[f32], first: usize, inputs: usize) -> Result<()> {
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(()),
        Some(i) => Err(Error::Argument(format!(
            "quantize: the value at row {}, column {} is {}, not finite",
            first + i / inputs,
            i % inputs,
            values[i]
        ))),
    }
}

/// Second pass: every panel by itself.
fn panels(
    rows: usize,
    inputs: usize,
    book: Vec<i8>,
    scales: Scales,
    importance: Option<&[u32]>,
    read: &ReadRows,
) -> Result<KTensor> {
    let bits = book.len().ilog2() as usize;
    let layout = KLayout::new(bits, rows, inputs, &scales)?;
    let levels = Levels::new(&book, &scales);
    let mut bytes = Bytes::zeroed(layout.nbytes())?;
    let failed = bytes
        .par_chunks_mut(layout.panel_bytes)
        .enumerate()
        .map_init(
            || Panel::new(&layout),
            |state, (panel, out)| {
                let first = panel * ROWS;
                let count = (rows - first).min(ROWS);
                let values = &mut state.values[..count * inputs];
                read(first, values)?;
                check_finite(values, first, inputs)?;
                state.quantize(&layout, &levels, count, importance, out);
                Ok(())
            },
        )
        .find_map_first(Result::err);
    if let Some(error) = failed {
        return Err(error);
    }
    KTensor::new(
        bits,
        rows,
        inputs,
        Codebook::I8(book),
        scales,
        None,
        Arc::new(bytes),
        0,
    )
}

/// What a thread needs to quantise 16 rows.
struct Panel {
    /// (rows of the panel, inputs).
    values: Vec<f32>,
    /// Codes of 16 rows x 256 inputs in the order of code vectors.
    codes: Vec<u8>,
    scratch: Scratch,
}

impl Panel {
    fn new(layout: &KLayout) -> Self {
        Self {
            values: vec![0.0; ROWS.min(layout.rows) * layout.inputs],
            codes: vec![0; ROWS * SUPER],
            scratch: Scratch::default(),
        }
    }

    /// Quantises the first `count` rows of `values` into `out`, the zeroed bytes of one panel.
    fn quantize(
        &mut self,
        layout: &KLayout,
        levels: &Levels,
        count: usize,
        importance: Option<&[u32]>,
        out: &mut [u8],
    ) {
        let inputs = layout.inputs;
        for sup in 0..layout.supers {
            let (from, to) = (sup * SUPER, inputs.min((sup + 1) * SUPER));
            self.codes.fill(0);
            for row in 0..count {
                let run = &self.values[row * inputs + from..row * inputs + to];
                let weights = importance.map(|i| &i[from..to]);
                let fit = levels.search(run, weights, &mut self.scratch);
                let at = layout.wide_offset(row, sup, 0);
                out[at..at + 2].copy_from_slice(&fit.scale.to_le_bytes());
                if levels.block < SUPER {
                    let first = sup * (SUPER / levels.block);
                    let blocks = run.len().div_ceil(levels.block);
                    for (k, &rung) in fit.rungs.iter().take(blocks).enumerate() {
                        let (at, high) = layout.rung_offset(row, first + k);
                        out[at] |= if high { rung << 4 } else { rung };
                    }
                }
                levels.codes(&fit, run, &mut self.scratch, |j, code| {
                    self.codes[j / 4 * 64 + row * 4 + j % 4] = code;
                });
            }
            for (chunk, codes) in self.codes.chunks_exact(ROWS * CHUNK).enumerate() {
                let chunk = sup * (SUPER / CHUNK) + chunk;
                if chunk < layout.chunks {
                    layout.pack_chunk(
                        codes,
                        &mut out[layout.codes_at + chunk * layout.bits * 128..],
                    );
                }
            }
        }
    }
}

/// Weights below 2^-100 in a whole super-block are stored as zeros (an activation below it is zero, too).
const TINY: f32 = f32::from_bits((127 - 100) << 23);
