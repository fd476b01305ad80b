//! Codebook and ladder of a tensor, from a sample of its super-blocks.

use rayon::prelude::*;

use super::codebook::{CodebookFormat, curve, rounded};
use super::search::{Fit, Levels, Scratch};
use super::{ReadRows, check_finite, scales};
use crate::{Result, SUPER};

/// Super-blocks of a sample.
const SAMPLE: usize = 256;
/// Rows they come from.
const SAMPLE_ROWS: usize = 64;
/// Neighbouring rungs differ by one of these factors.
const RATIOS: [f64; 8] = [1.03, 1.05, 1.07, 1.09, 1.12, 1.16, 1.22, 1.3];
/// Learning starts from the best of the curves with these slopes at zero. At 6 and 7 bits it hardly leaves it, since the
/// entries are whole numbers.
const SLOPES: [f64; 8] = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3];
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

    /// The number of the codebook and ladder that err least.
    fn best<const N: usize>(&self, tables: [(&[f64], [u8; 16]); N], block: usize) -> usize {
        let errors = tables.map(|(book, ladder)| {
            let levels = Levels::new(&rounded(book), &scales(block, ladder)).coarse();
            self.fits(&levels).iter().map(|f| f.error).sum::<f64>()
        });
        (0..N)
            .min_by(|&a, &b| errors[a].total_cmp(&errors[b]))
            .unwrap_or(0)
    }
}

/// Codebook and ladder for a tensor.
pub(super) fn tables(
    bits: usize,
    format: CodebookFormat,
    block: usize,
    sample: &Sample,
) -> (Vec<i8>, [u8; 16]) {
    let mut book = format.values(bits);
    let mut ladder = geometric(1.1);
    let learned = format == CodebookFormat::Learned && bits < 8;
    let rounds = if learned { ROUNDS } else { 0 };
    if learned {
        let curves = SLOPES.map(|slope| curve(bits, slope));
        let best = sample.best(curves.each_ref().map(|c| (&c[..], ladder)), block);
        book.clone_from(&curves[best]);
    }
    for _ in 0..rounds {
        learn(&mut book, &ladder, block, sample);
    }
    if block < SUPER {
        let ladders = RATIOS.map(geometric);
        ladder = ladders[sample.best(ladders.map(|l| (&book[..], l)), block)];
    }
    for _ in 0..rounds {
        learn(&mut book, &ladder, block, sample);
    }
    (rounded(&book), ladder)
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

/// One step of Lloyd's algorithm: fit the sample, then move each entry to the least-squares value of its weights. The
/// entries stay real between the steps: rounded ones would stop moving.
fn learn(book: &mut [f64], ladder: &[u8; 16], block: usize, sample: &Sample) {
    let levels = Levels::new(&rounded(book), &scales(block, *ladder)).coarse();
    let fits = sample.fits(&levels);
    let (mut wc, mut cc) = (vec![0f64; book.len()], vec![0f64; book.len()]);
    let mut scratch = Scratch::default();
    for ((w, importance), fit) in sample.runs.iter().zip(&fits) {
        let sw = f64::from(fit.scale.to_f32());
        levels.codes(fit, w, &mut scratch, |j, code| {
            let rung = if block < SUPER {
                ladder[usize::from(fit.rungs[j / block])]
            } else {
                128
            };
            let step = sw * f64::from(rung) / 128.0;
            let i = importance.as_ref().map_or(1.0, |i| f64::from(i[j]));
            wc[usize::from(code)] += i * step * f64::from(w[j]);
            cc[usize::from(code)] += i * step * step;
        });
    }
    let peak = book.iter().fold(0f64, |m, v| m.max(v.abs()));
    for (c, entry) in book.iter_mut().enumerate() {
        if cc[c] > 0.0 {
            *entry = wc[c] / cc[c] * (peak / 127.0);
        }
    }
    book.sort_by(f64::total_cmp);
}
