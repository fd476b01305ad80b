//! Codebook and ladder of a tensor, from a sample of its super-blocks.

use half::bf16;
use rayon::prelude::*;

use super::codebook::{CodebookFormat, rounded};
use super::search::{Fit, Levels, Scratch};
use super::{ReadRows, check_finite, scales};
use crate::{Result, SUPER};

/// Super-blocks of a sample.
const SAMPLE: usize = 256;
/// Rows they come from.
const SAMPLE_ROWS: usize = 64;
/// Neighbouring rungs differ by one of these factors.
const RATIOS: [f64; 8] = [1.03, 1.05, 1.07, 1.09, 1.12, 1.16, 1.22, 1.3];
/// Rounds of learning before and after the ladder's ratio is chosen.
const ROUNDS: usize = 4;

/// Super-blocks that stand for a tensor.
pub(super) struct Sample {
    runs: Vec<(Vec<f32>, Option<Vec<u32>>)>,
}

impl Sample {
    /// Reads up to 64 rows, evenly spread, and takes up to 256 of their super-blocks.
    pub(super) fn read(
        rows: usize,
        inputs: usize,
        importance: Option<&[u32]>,
        read: &ReadRows,
    ) -> Result<Self> {
        let count = rows.min(SAMPLE_ROWS);
        let supers = inputs.div_ceil(SUPER);
        let each = SAMPLE.div_ceil(count).min(supers);
        let mut row = vec![0.0; inputs];
        let mut runs = vec![];
        for i in 0..count {
            let r = i * rows / count;
            read(r, &mut row)?;
            check_finite(&row, r, inputs)?;
            for k in 0..each {
                let from = (k * supers / each + i) % supers * SUPER;
                let to = inputs.min(from + SUPER);
                runs.push((
                    row[from..to].to_vec(),
                    importance.map(|m| m[from..to].to_vec()),
                ));
            }
        }
        Ok(Self { runs })
    }

    fn fits(&self, levels: &Levels) -> Vec<Fit> {
        let search = |scratch: &mut Scratch, (w, importance): &(Vec<f32>, Option<Vec<u32>>)| {
            levels.search(w, importance.as_deref(), scratch)
        };
        self.runs
            .par_iter()
            .map_init(Scratch::default, search)
            .collect()
    }

    fn error(&self, levels: &Levels) -> f64 {
        self.fits(levels).iter().map(|f| f.error).sum()
    }
}

/// Codebook and ladder for a tensor.
pub(super) fn tables(
    bits: usize,
    format: CodebookFormat,
    block: usize,
    sample: &Sample,
) -> (Vec<i8>, [u8; 16]) {
    let mut book = format.entries(bits);
    let mut ladder = geometric(1.1);
    let learned = format == CodebookFormat::Learned && bits < 8;
    let rounds = if learned { ROUNDS } else { 0 };
    for _ in 0..rounds {
        book = learn(&book, &ladder, block, sample);
    }
    if block < SUPER {
        let error =
            |r: f64| sample.error(&Levels::new(&book, &scales(block, geometric(r))).coarse());
        let errors = RATIOS.map(error);
        let best = (0..RATIOS.len())
            .min_by(|&a, &b| errors[a].total_cmp(&errors[b]))
            .unwrap_or(0);
        ladder = geometric(RATIOS[best]);
    }
    for _ in 0..rounds {
        book = learn(&book, &ladder, block, sample);
    }
    (book, ladder)
}

/// `128 / ratio^(15 - i)`, and 0 first, so that a block of zeros stays zero.
fn geometric(ratio: f64) -> [u8; 16] {
    let mut value = 128f64;
    let mut ladder = [0; 16];
    for entry in ladder.iter_mut().skip(1).rev() {
        *entry = libm::rint(value) as u8;
        value /= ratio;
    }
    ladder
}

/// One step of Lloyd's algorithm: fit the sample, then move each entry to the least-squares value of its weights.
fn learn(book: &[i8], ladder: &[u8; 16], block: usize, sample: &Sample) -> Vec<i8> {
    let levels = Levels::new(book, &scales(block, *ladder)).coarse();
    let fits = sample.fits(&levels);
    let (mut wc, mut cc) = (vec![0f64; book.len()], vec![0f64; book.len()]);
    let mut scratch = Scratch::default();
    for ((w, importance), fit) in sample.runs.iter().zip(&fits) {
        if fit.scale == bf16::ZERO {
            continue;
        }
        let sw = f64::from(fit.scale.to_f32());
        levels.codes(fit, w, &mut scratch, |j, code| {
            let rung = usize::from(fit.rungs[j / block]);
            let step = sw
                * if block < SUPER {
                    f64::from(ladder[rung]) / 128.0
                } else {
                    1.0
                };
            let i = importance.as_ref().map_or(1.0, |i| f64::from(i[j]));
            wc[usize::from(code)] += i * step * f64::from(w[j]);
            cc[usize::from(code)] += i * step * step;
        });
    }
    let mut moved: Vec<f64> = (0..book.len())
        .map(|c| {
            if cc[c] > 0.0 {
                wc[c] / cc[c]
            } else {
                f64::from(book[c])
            }
        })
        .collect();
    moved.sort_by(f64::total_cmp);
    if moved.iter().all(|m| *m == 0.0) {
        return book.to_vec();
    }
    rounded(&moved)
}
