//! Random matrices and activations for tests of kernels.

use std::sync::Arc;

use kbit_tensor::{Bytes, Codebook, KLayout, KTensor, Offset, ScaleType, Scales};

/// A repeatable stream of numbers (xorshift).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    /// In -1..1.
    pub(crate) fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
    /// 16 values of 0..=128 that do not decrease.
    pub(crate) fn ladder(&mut self) -> [u8; 16] {
        let mut ladder = std::array::from_fn(|_| (self.next() % 129) as u8);
        ladder.sort_unstable();
        ladder
    }
}

/// A row of activations of mixed magnitude, now and then all zero.
pub(crate) fn random_row(random: &mut Random, n: usize) -> Vec<f32> {
    let scale = match random.next() % 16 {
        0 => 0.0,
        1 => 1e-20,
        _ => 1.0,
    };
    (0..n)
        .map(|_| random.unit() * random.unit() * scale)
        .collect()
}

/// `2^bits` int8 entries: random ones, or the linear ones that integer formats have.
pub(crate) fn random_codebook(
    random: &mut Random,
    bits: usize,
    scales: &Scales,
    linear: bool,
) -> Codebook {
    let native = matches!(scales, Scales::Ladder { .. } | Scales::Row);
    let least = if native { -127 } else { -128 };
    let entries = (0..1 << bits).map(|c: i32| {
        if linear {
            (c - (1 << (bits - 1))).max(least)
        } else {
            ((random.next() % 256) as i32 - 128).max(least)
        }
    });
    Codebook::I8(entries.map(|e| e as i8).collect())
}

/// A matrix of random codes and sane scales.
pub(crate) fn random_matrix(
    random: &mut Random,
    bits: usize,
    rows: usize,
    inputs: usize,
    codebook: Codebook,
    scales: &Scales,
    permuted: bool,
) -> KTensor {
    let layout = KLayout::new(bits, rows, inputs, scales).expect("a layout");
    let mut bytes = Bytes::zeroed(layout.nbytes()).expect("memory");
    for word in bytes.chunks_exact_mut(8) {
        word.copy_from_slice(&random.next().to_le_bytes());
    }
    let mut float = |kind: ScaleType, to: &mut [u8]| {
        let value = 0.01 + 0.005 * random.unit();
        match kind {
            ScaleType::F16 => to.copy_from_slice(&half::f16::from_f32(value).to_le_bytes()),
            ScaleType::BF16 => to.copy_from_slice(&half::bf16::from_f32(value).to_le_bytes()),
            ScaleType::F32 => to.copy_from_slice(&value.to_le_bytes()),
            ScaleType::E8M0 => to[0] = (100.0 + 2000.0 * value) as u8,
        }
    };
    for row in 0..layout.panels * 16 {
        for sup in 0..layout.supers {
            let mut wide = |which, kind| {
                let at = layout.wide_offset(row, sup, which);
                float(kind, &mut bytes[at..at + 2]);
            };
            match *scales {
                Scales::Ladder { .. } | Scales::Row => wide(0, ScaleType::BF16),
                Scales::Super { min, .. } => {
                    wide(0, ScaleType::F16);
                    if min {
                        wide(1, ScaleType::F16);
                    }
                }
                Scales::Block { .. } => {}
            }
        }
        if let Scales::Block { scale, offset, .. } = *scales {
            for block in 0..layout.blocks {
                let at = layout.fine_offset(row, block, scale.size());
                float(scale, &mut bytes[at..at + scale.size()]);
                if offset == Offset::Min {
                    let at = layout.offset_offset(row, block, scale.size());
                    float(scale, &mut bytes[at..at + scale.size()]);
                }
            }
        }
    }
    let mut permutation: Vec<u32> = (0..inputs as u32).collect();
    for i in (1..inputs).rev() {
        permutation.swap(i, random.next() as usize % (i + 1));
    }
    let permutation: Option<Arc<[u32]>> = permuted.then(|| permutation.into());
    KTensor::new(
        bits,
        rows,
        inputs,
        codebook,
        scales.clone(),
        permutation,
        bytes.into(),
        0,
    )
    .expect("a matrix")
}
