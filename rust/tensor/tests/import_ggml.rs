//! GGUF's block types: the values of the import against decoders written from the format, element by element.

mod common;

use common::{Gguf, Random, open};
use half::f16;
use kbit_tensor::gguf::GgmlType;
use kbit_tensor::{Keep, Weight, load_weight};

fn half(b: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([b[at], b[at + 1]]).to_f32()
}

fn nibble(b: &[u8], at: usize, e: usize, lanes: usize) -> u8 {
    let byte = b[at + e / (2 * lanes) * lanes + e % lanes];
    if (e / lanes).is_multiple_of(2) {
        byte & 15
    } else {
        byte >> 4
    }
}

/// Sub-scale and minimum j of `Q4_K` and `Q5_K`, whose 12 bytes start at 4.
fn six(b: &[u8], j: usize) -> (f32, f32) {
    let q = &b[4..16];
    let (s, m) = if j < 4 {
        (q[j] & 63, q[j + 4] & 63)
    } else {
        (
            q[j + 4] & 15 | (q[j - 4] >> 6) << 4,
            q[j + 4] >> 4 | (q[j] >> 6) << 4,
        )
    };
    (f32::from(s), f32::from(m))
}

const NL: [f32; 16] = [
    -127., -104., -83., -65., -49., -35., -22., -10., 1., 13., 25., 38., 53., 69., 89., 113.,
];
const FP4: [f32; 16] = [
    0., 1., 2., 3., 4., 6., 8., 12., 0., -1., -2., -3., -4., -6., -8., -12.,
];

/// Element `e` of a block.
fn value(kind: GgmlType, b: &[u8], e: usize) -> f32 {
    let bit = |at: usize| b[at + e / 8] >> (e % 8) & 1;
    match kind {
        GgmlType::Q4_0 => half(b, 0) * (f32::from(nibble(b, 2, e, 16)) - 8.0),
        GgmlType::Q4_1 => half(b, 0) * f32::from(nibble(b, 4, e, 16)) + half(b, 2),
        GgmlType::Q5_0 => half(b, 0) * (f32::from(nibble(b, 6, e, 16) | bit(2) << 4) - 16.0),
        GgmlType::Q5_1 => half(b, 0) * f32::from(nibble(b, 8, e, 16) | bit(4) << 4) + half(b, 2),
        GgmlType::Q8_0 => half(b, 0) * f32::from(b[2 + e] as i8),
        GgmlType::IQ4_NL => half(b, 0) * NL[nibble(b, 2, e, 16) as usize],
        GgmlType::MXFP4 => {
            let exponent = if b[0] < 2 {
                0x0020_0000 << b[0]
            } else {
                (u32::from(b[0]) - 1) << 23
            };
            f32::from_bits(exponent) * FP4[nibble(b, 1, e, 16) as usize]
        }
        GgmlType::Q2_K => {
            let (s, q) = (
                b[e / 16],
                b[16 + e / 128 * 32 + e % 32] >> (e % 128 / 32 * 2) & 3,
            );
            half(b, 80) * f32::from(s & 15) * f32::from(q) - half(b, 82) * f32::from(s >> 4)
        }
        GgmlType::Q3_K => {
            let j = e / 16;
            let low = b[96 + j % 8] >> (j / 8 * 4) & 15;
            let high = b[96 + 8 + j % 4] >> (j / 4 * 2) & 3;
            let scale = f32::from(low | high << 4) - 32.0;
            let q = b[32 + e / 128 * 32 + e % 32] >> (e % 128 / 32 * 2) & 3;
            let q = f32::from(q)
                - if b[e % 32] >> (e / 32) & 1 == 1 {
                    0.0
                } else {
                    4.0
                };
            half(b, 108) * scale * q
        }
        GgmlType::Q4_K => {
            let (s, m) = six(b, e / 32);
            half(b, 0) * s * f32::from(nibble(b, 16, e, 32)) - half(b, 2) * m
        }
        GgmlType::Q5_K => {
            let (s, m) = six(b, e / 32);
            let q = nibble(b, 48, e, 32) | (b[16 + e % 32] >> (e / 32) & 1) << 4;
            half(b, 0) * s * f32::from(q) - half(b, 2) * m
        }
        GgmlType::Q6_K => {
            let low = b[e / 128 * 64 + e % 64] >> (e % 128 / 64 * 4) & 15;
            let high = b[128 + e / 128 * 32 + e % 32] >> (e % 128 / 32 * 2) & 3;
            half(b, 208) * f32::from(b[192 + e / 16] as i8) * (f32::from(low | high << 4) - 32.0)
        }
        GgmlType::IQ4_XS => {
            let j = e / 32;
            let low = b[4 + j / 2] >> (j % 2 * 4) & 15;
            let high = (u16::from_le_bytes([b[2], b[3]]) >> (2 * j) & 3) as u8;
            let scale = f32::from(low | high << 4) - 32.0;
            half(b, 0) * scale * NL[nibble(b, 8, e, 16) as usize]
        }
        _ => unreachable!("not imported"),
    }
}

fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan()
}

#[test]
fn every_type_keeps_every_value() {
    let mut random = Random(7);
    let mut types = 0;
    for &kind in GgmlType::ALL.iter().filter(|t| t.is_imported()) {
        types += 1;
        // Ragged panels and, for blocks of 32, a ragged last chunk.
        for (rows, blocks) in [(1, 1), (19, 3), (32, 4), (5, 10)] {
            let inputs = blocks * kind.block();
            let data = random.bytes(rows * blocks * kind.block_bytes());
            let file = Gguf::new()
                .tensor("w", &[inputs as u64, rows as u64], kind.id(), 0)
                .file(32, &data);
            let file = open(&file).unwrap();
            let Weight::Quantised(k) =
                load_weight(&[(&file, "w")], &[], Keep::AsStored, 2).unwrap()
            else {
                panic!("{}: dense", kind.name())
            };
            let expected: Vec<f32> = data
                .chunks_exact(kind.block_bytes())
                .flat_map(|b| (0..kind.block()).map(move |e| value(kind, b, e)))
                .collect();
            let dense = file.read("w").unwrap();
            assert_eq!(dense.shape(), [rows, inputs]);
            for (i, ((&want, got), read)) in expected
                .iter()
                .zip(k.dequantize())
                .zip(dense.to_f32())
                .enumerate()
            {
                assert!(
                    same(want, got),
                    "{} element {i}: {want} imported as {got}",
                    kind.name()
                );
                assert!(
                    same(want, read),
                    "{} element {i}: {want} read as {read}",
                    kind.name()
                );
            }
            if rows == 32 && blocks == 4 {
                let ratio = k.nbytes() as f64 / data.len() as f64;
                assert!(ratio <= 1.15, "{}: {ratio} of the file", kind.name());
            }
        }
    }
    assert_eq!(types, 13);
}
