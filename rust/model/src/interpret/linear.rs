//! Matrix times vector: `docs/numerics.md`, sections 2, 3 and 4, one weight at a time.

use half::{bf16, f16};
use kbit_tensor::program::{Activations, Linear, WeightId};
use kbit_tensor::{Codebook, KTensor, Offset, SUPER, Scales, SubScale, Weight};

use super::Weights;

impl Weights {
    /// Row `row` of a matrix as f32.
    pub(super) fn row(&self, id: WeightId, row: usize, out: &mut [f32]) {
        match &self.stored[id.0 as usize] {
            Weight::Quantised(k) => k.dequantize_row(row, out),
            Weight::Dense(_) => {
                out.copy_from_slice(&self.dense[id.0 as usize][row * out.len()..][..out.len()]);
            }
        }
    }

    /// `W x + b`.
    pub(super) fn linear(&self, linear: &Linear, x: &[f32]) -> Vec<f32> {
        let weight = &self.stored[linear.weight.0 as usize];
        let mut y = match weight {
            Weight::Quantised(k) if integer(k) && self.activations == Activations::Int8 => {
                integer_matmul(k, x)
            }
            _ => {
                let mut w = vec![0.0; x.len()];
                let mut float_row = |r| {
                    self.row(linear.weight, r, &mut w);
                    float_dot(&w, x)
                };
                (0..weight.shape()[0]).map(&mut float_row).collect()
            }
        };
        if let Some(bias) = linear.bias {
            y.iter_mut()
                .zip(&self.dense[bias.0 as usize])
                .for_each(|(y, b)| *y += b);
        }
        y
    }
}

fn integer(k: &KTensor) -> bool {
    matches!(k.codebook(), Codebook::I8(_))
}

/// Section 4: four partial sums.
fn float_dot(w: &[f32], x: &[f32]) -> f32 {
    let mut p = [0f32; 4];
    for (i, (w, x)) in w.iter().zip(x).enumerate() {
        p[i % 4] = w.mul_add(*x, p[i % 4]);
    }
    (p[0] + p[2]) + (p[1] + p[3])
}

/// Section 2: one block of at most 256 inputs to int8 and its scale.
pub(super) fn quantise_block(x: &[f32]) -> (f32, Vec<i8>) {
    if x.iter().any(|v| !v.is_finite()) {
        return (f32::NAN, vec![0; x.len()]);
    }
    let amax = x.iter().fold(0f32, |m, v| m.max(v.abs()));
    if amax <= 1e-30 {
        return (0.0, vec![0; x.len()]);
    }
    let inv = 127.0 / amax;
    (
        amax / 127.0,
        x.iter()
            .map(|v| (v * inv).round_ties_even() as i8)
            .collect(),
    )
}

/// Section 3, all rows.
fn integer_matmul(k: &KTensor, x: &[f32]) -> Vec<f32> {
    let x: Vec<f32> = match k.permutation() {
        Some(p) => p.iter().map(|&i| x[i as usize]).collect(),
        None => x.to_vec(),
    };
    let blocks: Vec<(f32, Vec<i8>)> = x.chunks(SUPER).map(quantise_block).collect();
    (0..k.rows())
        .map(|row| integer_row(k, row, &blocks))
        .collect()
}

/// Section 3, one row; `blocks`: the activations of each super-block.
fn integer_row(k: &KTensor, row: usize, blocks: &[(f32, Vec<i8>)]) -> f32 {
    let Codebook::I8(codebook) = k.codebook() else {
        return f32::NAN;
    };
    let (layout, bytes, scales) = (k.layout(), k.bytes(), k.scales());
    let half_at = |at: usize| f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32();
    let brain_at = |at: usize| bf16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32();
    let block = scales.block();
    let mut y = 0f32;
    for (sup, (sa, a8)) in blocks.iter().enumerate() {
        // Per block of the scale kind: where it starts, its dot product, and the sum of its activations.
        let dots = a8.chunks(block).enumerate().map(|(i, a)| {
            let start = sup * SUPER + i * block;
            let code = |j: usize| i32::from(codebook[layout.code(bytes, row, start + j) as usize]);
            let weight = |j: usize| match scales {
                Scales::Ladder { ladder, .. } => {
                    let (at, high) = layout.rung_offset(row, start / block);
                    let rung = if high { bytes[at] >> 4 } else { bytes[at] & 15 };
                    (code(j) * i32::from(ladder[rung as usize]) + 64) >> 7
                }
                _ => code(j),
            };
            let dot: i32 = a
                .iter()
                .enumerate()
                .map(|(j, &a)| weight(j) * i32::from(a))
                .sum();
            let asum: i32 = a.iter().map(|&a| i32::from(a)).sum();
            (start / block, dot, asum)
        });
        match *scales {
            Scales::Ladder { .. } | Scales::Row => {
                let dot: i32 = dots.map(|(_, dot, _)| dot).sum();
                y = (dot as f32).mul_add(brain_at(layout.wide_offset(row, sup, 0)) * sa, y);
            }
            Scales::Block { scale, offset, .. } => {
                for (b, dot, asum) in dots {
                    let s = scale.read(&bytes[layout.fine_offset(row, b, scale.size())..]);
                    let dot = match offset {
                        Offset::Zero => {
                            let shift = if k.bits() == 8 { 128 } else { 0 };
                            dot - (i32::from(bytes[layout.offset_offset(row, b, 1)]) - shift) * asum
                        }
                        _ => dot,
                    };
                    y = (dot as f32).mul_add(s * sa, y);
                    if offset == Offset::Min {
                        let m = scale.read(&bytes[layout.offset_offset(row, b, scale.size())..]);
                        y = (asum as f32).mul_add(m * sa, y);
                    }
                }
            }
            Scales::Super { sub, min, .. } => {
                let (mut isum, mut msum) = (0i32, 0i32);
                for (b, dot, asum) in dots {
                    let fine = bytes[layout.fine_offset(row, b, 1)];
                    let s = match sub {
                        SubScale::U8 => i32::from(fine),
                        SubScale::I8 => i32::from(fine as i8),
                        SubScale::U4 => i32::from(fine & 15),
                    };
                    isum += s * dot;
                    if min {
                        let m = if sub == SubScale::U4 {
                            fine >> 4
                        } else {
                            bytes[layout.offset_offset(row, b, 1)]
                        };
                        msum += i32::from(m) * asum;
                    }
                }
                y = (isum as f32).mul_add(half_at(layout.wide_offset(row, sup, 0)) * sa, y);
                if min {
                    y = (msum as f32).mul_add(-(half_at(layout.wide_offset(row, sup, 1)) * sa), y);
                }
            }
        }
    }
    y
}
