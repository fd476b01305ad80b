//! Rotary embedding: tables of cosines and sines by position, and the rotation.

use kbit_simd::{Isa, Simd, SimdOp, dispatch};
use kbit_tensor::program::Rope;

use crate::norm::{load, store};

/// Cosines and sines of the positions seen so far, for one set of frequencies.
#[derive(Debug)]
struct Table {
    inv_freq: Vec<f32>,
    scale: f32,
    /// Per position: the cosines of all pairs, then the sines.
    rows: Vec<f32>,
}

impl Table {
    /// Makes the rows of positions below `end`.
    fn reach(&mut self, end: usize) {
        let width = 2 * self.inv_freq.len();
        if width == 0 {
            return;
        }
        let scale = f64::from(self.scale);
        for position in self.rows.len() / width..end {
            let angles = self.inv_freq.iter().map(|f| f64::from(position as f32 * f));
            self.rows
                .extend(angles.clone().map(|a| (libm::cos(a) * scale) as f32));
            self.rows
                .extend(angles.map(|a| (libm::sin(a) * scale) as f32));
        }
    }
}

/// The tables of one [`Rope`]: plain and long.
#[derive(Debug)]
pub(crate) struct Tables {
    plain: Table,
    long: Option<(usize, Table)>,
}

impl Tables {
    pub(crate) fn new(rope: &Rope) -> Self {
        let table = |inv_freq: &[f32], scale| Table {
            inv_freq: inv_freq.to_vec(),
            scale,
            rows: Vec::new(),
        };
        let long = rope
            .long
            .as_ref()
            .map(|l| (l.original, table(&l.inv_freq, l.scale)));
        Self {
            plain: table(&rope.inv_freq, rope.scale),
            long,
        }
    }

    /// Makes the rows below `end` for a sequence of `planned` tokens.
    pub(crate) fn reach(&mut self, planned: usize, end: usize) {
        match &mut self.long {
            Some((original, table)) if planned > *original => table.reach(end),
            _ => self.plain.reach(end),
        }
    }

    /// Cosines and sines at `position`, which [`Tables::reach`] has made.
    pub(crate) fn row(&self, planned: usize, position: usize) -> (&[f32], &[f32]) {
        let table = match &self.long {
            Some((original, table)) if planned > *original => table,
            _ => &self.plain,
        };
        let n = table.inv_freq.len();
        table.rows[2 * n * position..2 * n * (position + 1)].split_at(n)
    }
}

/// Rotates every `head_dim` elements of `x` by one row of a table.
pub(crate) fn rotate(isa: Isa, x: &mut [f32], head_dim: usize, (cos, sin): (&[f32], &[f32])) {
    dispatch(
        isa,
        Rotate {
            x,
            head_dim,
            cos,
            sin,
        },
    );
}

struct Rotate<'a> {
    x: &'a mut [f32],
    head_dim: usize,
    cos: &'a [f32],
    sin: &'a [f32],
}

impl SimdOp for Rotate<'_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let n = self.cos.len();
        for head in self.x.chunks_exact_mut(self.head_dim) {
            let (low, high) = head.split_at_mut(n);
            for at in (0..n).step_by(16) {
                let to = n.min(at + 16);
                let (a, b) = (load(s, &low[at..to]), load(s, &high[at..to]));
                let (cos, sin) = (load(s, &self.cos[at..to]), load(s, &self.sin[at..to]));
                store(s, s.sub(s.mul(a, cos), s.mul(b, sin)), &mut low[at..to]);
                store(s, s.add(s.mul(b, cos), s.mul(a, sin)), &mut high[at..to]);
            }
        }
    }
}
