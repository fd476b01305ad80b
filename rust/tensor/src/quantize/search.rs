//! The search for scale, sub-scales and codes of one row and super-block, against the exact definition of the weight.
//!
//! With a scale `sw`, a weight is `x = w / sw` in units of int8 and is looked at through `X = floor(16 x)`: the cell
//! `X >> 3 = floor(2 x)` names the nearest level exactly (thresholds between integers lie on multiples of a half; a tie
//! goes to the larger level), and `2 X + 1 - 32 level` is its error in 32nds. Errors are squared and added as integers.

use half::bf16;

use super::TINY;
use crate::{SUPER, Scales};

/// Cells of half a unit over -128..128; beyond, the nearest level is the outermost one.
const CELLS: usize = 512;
/// Rungs of a ladder.
const RUNGS: usize = 16;
/// A float whose addition leaves the nearest integer in the lowest bits of the sum.
const MAGIC: f32 = 12582912.0;

/// The levels of a codebook at every rung. [`Scales::Row`] is a ladder of equal rungs and a block of 256.
pub(super) struct Levels {
    /// 32 times the nearest level, by cell and rung.
    level: Vec<[i16; RUNGS]>,
    /// Its (lowest) code.
    code: Vec<[u8; RUNGS]>,
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
    /// `X >> 3`, within the tables.
    cell: [i16; SUPER],
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
    /// Looks at `w / sw`.
    fn set(&mut self, w: &[f32], sw: f32) {
        for ((x, cell), &w) in self.x.iter_mut().zip(&mut self.cell).zip(w) {
            let v = (w / sw * 16.0).clamp(-4095.0, 4095.0);
            let sum = v + MAGIC;
            let nearest = sum.to_bits() as i32 - MAGIC.to_bits() as i32;
            let floor = nearest - i32::from(v < sum - MAGIC);
            *x = (2 * floor + 1) as i16;
            *cell = ((floor >> 3) as i16).clamp(-(CELLS as i16) / 2, CELLS as i16 / 2 - 1);
        }
    }
}

/// Where a cell lies in the tables.
fn slot(cell: i16) -> usize {
    (cell + CELLS as i16 / 2) as usize % CELLS
}

/// The weight that an entry of the codebook has at a ladder value.
fn fold(entry: i8, ladder: u8) -> i32 {
    (i32::from(entry) * i32::from(ladder) + 64) >> 7
}

impl Levels {
    /// The tables of a non-decreasing codebook.
    pub(super) fn new(book: &[i8], scales: &Scales) -> Self {
        let (ladder, block) = match scales {
            Scales::Ladder { block, ladder } => (*ladder, *block),
            _ => ([128; RUNGS], SUPER),
        };
        let mut level = vec![[0; RUNGS]; CELLS];
        let mut code = vec![[0; RUNGS]; CELLS];
        for (rung, &l) in ladder.iter().enumerate() {
            // Levels do not decrease with the code, so neither does the nearest one with the cell.
            let levels: Vec<i32> = book.iter().map(|&c| fold(c, l)).collect();
            let mut nearest = 0;
            for cell in 0..CELLS {
                // Four times the middle of the cell, which is odd; four times that of two levels is even.
                let middle = 2 * (cell as i32 - CELLS as i32 / 2) + 1;
                let mut next = nearest + 1;
                while next < levels.len() && 2 * (levels[nearest] + levels[next]) <= middle {
                    if levels[next] > levels[nearest] {
                        nearest = next;
                    }
                    next += 1;
                }
                code[cell][rung] = nearest as u8;
                level[cell][rung] = 32 * levels[nearest] as i16;
            }
        }
        Self {
            level,
            code,
            block,
            tries: tries(book.len().ilog2() as usize, block < SUPER),
        }
    }

    /// The same levels with a quarter of the scales tried: near enough to learn from.
    pub(super) fn coarse(mut self) -> Self {
        self.tries = self.tries.iter().copied().step_by(4).collect();
        self
    }

    /// The best scale and rungs for `w`, at most 256 weights.
    pub(super) fn search(
        &self,
        w: &[f32],
        importance: Option<&[u32]>,
        scratch: &mut Scratch,
    ) -> Fit {
        let mut best = Fit {
            scale: bf16::ZERO,
            rungs: [0; 16],
            error: 0.0,
        };
        let first_peak = |m: f32, &w: &f32| if w.abs() > m.abs() { w } else { m };
        let peak = w.iter().fold(0f32, first_peak);
        if peak.abs() < TINY {
            return best;
        }
        best.error = f64::MAX;
        for &fraction in &self.tries {
            // The peak is made negative, so that codebooks may reach further on that side.
            let scale = bf16::from_f32(-peak * fraction);
            let fit = self.rungs(w, importance, scale, scratch);
            if fit.error < best.error {
                best = fit;
            }
        }
        best
    }

    /// The best rungs at a scale; of equally good ones, the first.
    fn rungs(
        &self,
        w: &[f32],
        importance: Option<&[u32]>,
        scale: bf16,
        scratch: &mut Scratch,
    ) -> Fit {
        let sw = scale.to_f32();
        scratch.set(w, sw);
        let mut rungs = [0; 16];
        let mut total = 0u64;
        for (k, from) in (0..w.len()).step_by(self.block).enumerate() {
            let to = w.len().min(from + self.block);
            let (x, cell) = (&scratch.x[from..to], &scratch.cell[from..to]);
            let errors = match importance {
                None => self.errors(x, cell),
                Some(i) => self.weighted_errors(x, cell, &i[from..to]),
            };
            let mut least = u64::MAX;
            for (s, &e) in errors.iter().enumerate() {
                if e < least {
                    (least, rungs[k]) = (e, s as u8);
                }
            }
            total += least;
        }
        let error = total as f64 * (f64::from(sw) * f64::from(sw));
        Fit {
            scale,
            rungs,
            error,
        }
    }

    /// Squared errors in 1024ths at every rung.
    fn errors(&self, x: &[i16], cell: &[i16]) -> [u64; RUNGS] {
        let mut sum = [0u64; RUNGS];
        for (x, cell) in x.chunks(16).zip(cell.chunks(16)) {
            // 16 squares of at most 12255 fit 32 bits.
            let mut part = [0u32; RUNGS];
            for (&x, &cell) in x.iter().zip(cell) {
                let level = &self.level[slot(cell)];
                for s in 0..RUNGS {
                    let d = i32::from(x - level[s]);
                    part[s] += (d * d) as u32;
                }
            }
            for s in 0..RUNGS {
                sum[s] += u64::from(part[s]);
            }
        }
        sum
    }

    /// The same, each square times its importance: below 2^27.2 * 2^16 * 2^8.
    fn weighted_errors(&self, x: &[i16], cell: &[i16], importance: &[u32]) -> [u64; RUNGS] {
        let mut sum = [0u64; RUNGS];
        for ((&x, &cell), &i) in x.iter().zip(cell).zip(importance) {
            let level = &self.level[slot(cell)];
            for s in 0..RUNGS {
                let d = i32::from(x - level[s]);
                sum[s] += u64::from((d * d) as u32) * u64::from(i);
            }
        }
        sum
    }

    /// Calls `each(j, code)` for the weights that `fit` was found for.
    pub(super) fn codes(
        &self,
        fit: &Fit,
        w: &[f32],
        scratch: &mut Scratch,
        mut each: impl FnMut(usize, u8),
    ) {
        if fit.scale == bf16::ZERO {
            return;
        }
        scratch.set(w, fit.scale.to_f32());
        for (j, &cell) in scratch.cell[..w.len()].iter().enumerate() {
            let rung = usize::from(fit.rungs[j / self.block]);
            each(j, self.code[slot(cell)][rung]);
        }
    }
}

/// Scales that are tried, as fractions of the peak, evenly up to 1.1 of the one that puts the peak at -127, which is among
/// them. From 0.9 on, as rungs do the rest; twice as many at 6 and 7 bits, where the rounding of the levels to int8
/// differs most from scale to scale. Without a ladder, the fewer the levels, the more of the peak may be cut off.
fn tries(bits: usize, ladder: bool) -> Vec<f32> {
    let (low, n) = match bits {
        6 | 7 if ladder => (0.9, 25),
        2..=7 if !ladder => (0.1 + 0.1 * bits as f32, 41 - 4 * bits),
        _ => (0.9, 13),
    };
    (0..n)
        .map(|i| (low + (1.1 - low) * i as f32 / (n - 1) as f32) / 127.0)
        .collect()
}
