//! The search for scale, sub-scales and codes of one row and super-block, against the exact definition of the weight.
//!
//! With a scale `sw`, a weight is `x = w / sw` in units of int8 and is looked at through `X = floor(16 x)`: the cell
//! `X >> 3 = floor(2 x)` names the nearest level exactly (thresholds between integers lie on multiples of a half; a tie
//! goes to the larger level), and `2 X + 1 - 32 level` is its error in 32nds. Errors are squared and added as integers.

use half::bf16;

use super::{TINY, round_bf16};
use crate::{SUPER, Scales};

/// Cells of half a unit over -128..128; beyond, the nearest level is the outermost one.
const CELLS: usize = 512;

/// What codes are worth at one rung of the ladder.
struct Rung {
    /// 32 times the nearest level, by cell.
    level: [i16; CELLS],
    /// Its (lowest) code.
    code: [u8; CELLS],
}

/// The levels of a codebook at every rung. [`Scales::Row`] is one rung that covers a super-block.
pub(super) struct Levels {
    rungs: Vec<Rung>,
    /// Inputs under one rung.
    pub(super) block: usize,
    /// Scales that are tried, as fractions of the peak.
    tries: Vec<f32>,
}

/// What was found for a row and super-block.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Fit {
    pub(super) scale: bf16,
    /// A rung for each block.
    pub(super) rungs: [u8; 16],
    /// Squared error in units of the weights squared (weighted by the importance).
    pub(super) error: f64,
}

/// Room for one super-block.
pub(super) struct Scratch {
    /// `2 X + 1`.
    x: [i16; SUPER],
    cell: [u16; SUPER],
}

impl Default for Scratch {
    fn default() -> Self {
        Self {
            x: [0; SUPER],
            cell: [0; SUPER],
        }
    }
}

impl Scratch {
    /// `w / sw`, in 16ths.
    fn set(&mut self, w: &[f32], sw: f32) {
        for ((x, cell), &w) in self.x.iter_mut().zip(&mut self.cell).zip(w) {
            let v = (w / sw * 16.0).clamp(-4095.0, 4095.0);
            let whole = v as i32;
            let floor = whole - i32::from(v < whole as f32);
            *x = (2 * floor + 1) as i16;
            *cell = ((floor >> 3) + CELLS as i32 / 2).clamp(0, CELLS as i32 - 1) as u16;
        }
    }
}

/// The weight that an entry of the codebook has at a ladder value.
pub(super) fn fold(entry: i8, ladder: u8) -> i32 {
    (i32::from(entry) * i32::from(ladder) + 64) >> 7
}

impl Levels {
    pub(super) fn new(book: &[i8], scales: &Scales) -> Self {
        let (ladder, block): (&[u8], usize) = match scales {
            Scales::Ladder { block, ladder } => (ladder, *block),
            _ => (&[128], SUPER),
        };
        Self {
            rungs: ladder.iter().map(|&l| Rung::new(book, l)).collect(),
            block,
            tries: tries(book.len().ilog2() as usize),
        }
    }

    /// The best scale and rungs for `w` (at most 256 weights); leaves the scaled weights in `scratch` for [`Self::codes`].
    pub(super) fn search(
        &self,
        w: &[f32],
        importance: Option<&[u32]>,
        scratch: &mut Scratch,
    ) -> Fit {
        let mut peak = 0f32;
        for &w in w {
            if w.abs() > peak.abs() {
                peak = w;
            }
        }
        let mut best = Fit {
            scale: bf16::ZERO,
            rungs: [0; 16],
            error: 0.0,
        };
        if peak.abs() < TINY {
            return best;
        }
        best.error = f64::MAX;
        let mut last = bf16::ZERO;
        // The peak is made negative: that is where codebooks reach furthest.
        for &f in &self.tries {
            last = round_bf16(-peak * f);
            self.improve(w, importance, last, scratch, &mut best);
        }
        // Least squares for the codes found.
        for _ in 0..2 {
            if last != best.scale {
                scratch.set(w, best.scale.to_f32());
            }
            let refit = self.refit(&best, importance, scratch, w.len());
            last = best.scale;
            if refit == last {
                break;
            }
            last = refit;
            if !self.improve(w, importance, refit, scratch, &mut best) {
                break;
            }
        }
        if last != best.scale {
            scratch.set(w, best.scale.to_f32());
        }
        best
    }

    /// The best rungs at a scale; keeps them in `best` if they err less.
    fn improve(
        &self,
        w: &[f32],
        importance: Option<&[u32]>,
        scale: bf16,
        scratch: &mut Scratch,
        best: &mut Fit,
    ) -> bool {
        let sw = scale.to_f32();
        scratch.set(w, sw);
        let mut rungs = [0; 16];
        let mut error = 0u64;
        for (k, from) in (0..w.len()).step_by(self.block).enumerate() {
            let to = w.len().min(from + self.block);
            let (x, cell) = (&scratch.x[from..to], &scratch.cell[from..to]);
            let mut least = u64::MAX;
            for (s, rung) in self.rungs.iter().enumerate() {
                let e = match importance {
                    None => rung.error(x, cell),
                    Some(i) => rung.weighted_error(x, cell, &i[from..to]),
                };
                if e < least {
                    (least, rungs[k]) = (e, s as u8);
                }
            }
            error += least;
        }
        let error = error as f64 * (f64::from(sw) * f64::from(sw) / 1024.0);
        let better = error < best.error;
        if better {
            *best = Fit {
                scale,
                rungs,
                error,
            };
        }
        better
    }

    /// The scale that minimises the squared error for the codes and rungs of `fit`.
    fn refit(&self, fit: &Fit, importance: Option<&[u32]>, scratch: &Scratch, n: usize) -> bf16 {
        let (mut xl, mut ll) = (0i64, 0i64);
        for j in 0..n {
            let level = i64::from(
                self.rungs[usize::from(fit.rungs[j / self.block])].level
                    [usize::from(scratch.cell[j])],
            );
            let i = importance.map_or(1, |i| i64::from(i[j]));
            xl += i * level * i64::from(scratch.x[j]);
            ll += i * level * level;
        }
        if xl <= 0 {
            return fit.scale;
        }
        round_bf16((f64::from(fit.scale.to_f32()) * (xl as f64 / ll as f64)) as f32)
    }

    /// Puts the weights that `fit` was found for back into `scratch`.
    pub(super) fn rescale(fit: &Fit, w: &[f32], scratch: &mut Scratch) {
        scratch.set(w, fit.scale.to_f32());
    }

    /// Calls `each(j, code)` for the `n` weights that `fit` was found for.
    pub(super) fn codes(
        &self,
        fit: &Fit,
        scratch: &Scratch,
        n: usize,
        mut each: impl FnMut(usize, u8),
    ) {
        if fit.scale == bf16::ZERO {
            return;
        }
        for j in 0..n {
            let rung = &self.rungs[usize::from(fit.rungs[j / self.block])];
            each(j, rung.code[usize::from(scratch.cell[j])]);
        }
    }
}

impl Rung {
    fn new(book: &[i8], ladder: u8) -> Self {
        let mut rung = Self {
            level: [0; CELLS],
            code: [0; CELLS],
        };
        for cell in 0..CELLS {
            // Twice the lower end of the cell, which is half a unit wide.
            let x2 = cell as i32 - CELLS as i32 / 2;
            let mut best = (i32::MAX, 0, 0);
            for (code, &entry) in book.iter().enumerate() {
                let level = fold(entry, ladder);
                // The middle of the cell is as far from two levels only if it is no threshold: there is no tie.
                let distance = (4 * level - (2 * x2 + 1)).abs();
                if distance < best.0 {
                    best = (distance, code, level);
                }
            }
            rung.code[cell] = best.1 as u8;
            rung.level[cell] = 32 * best.2 as i16;
        }
        rung
    }

    /// Squared error in 1024ths.
    fn error(&self, x: &[i16], cell: &[u16]) -> u64 {
        let mut sum = 0u64;
        for (x, cell) in x.chunks(16).zip(cell.chunks(16)) {
            // 16 squares of at most 12257 fit 32 bits.
            let mut part = 0u32;
            for (&x, &cell) in x.iter().zip(cell) {
                let d = i32::from(x) - i32::from(self.level[usize::from(cell) % CELLS]);
                part += (d * d) as u32;
            }
            sum += u64::from(part);
        }
        sum
    }

    fn weighted_error(&self, x: &[i16], cell: &[u16], importance: &[u32]) -> u64 {
        let mut sum = 0u64;
        for ((&x, &cell), &i) in x.iter().zip(cell).zip(importance) {
            let d = i32::from(x) - i32::from(self.level[usize::from(cell) % CELLS]);
            sum += u64::from((d * d) as u32) * u64::from(i);
        }
        sum
    }
}

/// Scales that are tried at a width, as fractions of the peak.
fn tries(bits: usize) -> Vec<f32> {
    let (low, high, n) = match bits {
        2 => (0.45, 1.1, 12),
        3 => (0.60, 1.1, 12),
        4 => (0.70, 1.1, 12),
        _ => (0.80, 1.1, 12),
    };
    (0..n)
        .map(|i| (low + (high - low) * i as f32 / (n - 1) as f32) / 127.0)
        .collect()
}
