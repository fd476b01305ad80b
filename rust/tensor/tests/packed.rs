//! The dialects of safetensors checkpoints, packed here by their published layouts, against the values they stand for.

mod common;

use common::{Random, tensors};
use half::{bf16, f16};
use kbit_tensor::import::{DIALECTS, PackedOptions, Parts, load_packed};
use kbit_tensor::{Error, KTensor, Result, TensorFile, Transform};

type Tensors = Vec<(&'static str, &'static str, Vec<usize>, Vec<u8>)>;

fn load(dialect: &str, all: &Tensors, steps: &[Transform], bits: usize) -> Result<KTensor> {
    let file = tensors(all);
    load_from(
        &file,
        dialect,
        steps,
        PackedOptions {
            bits: Some(bits),
            block: None,
        },
    )
}

fn load_from(
    file: &TensorFile,
    dialect: &str,
    steps: &[Transform],
    options: PackedOptions,
) -> Result<KTensor> {
    let parts: Parts = file
        .tensors()
        .iter()
        .map(|t| (t.name.clone(), (file, t.name.as_str())))
        .collect();
    load_packed(dialect, &parts, steps, &options)
}

/// Codes one after the other in words of 32 bits, low bits first, padded to whole words.
fn stream(bits: usize, codes: impl Iterator<Item = u32>) -> Vec<u32> {
    let mut all = Vec::new();
    for code in codes {
        (0..bits).for_each(|b| all.push(code >> b & 1));
    }
    all.chunks(32)
        .map(|w| w.iter().rev().fold(0, |n, b| n << 1 | b))
        .collect()
}

fn bytes(words: impl IntoIterator<Item = u32>) -> Vec<u8> {
    words.into_iter().flat_map(u32::to_le_bytes).collect()
}

/// (b, a) of (a, b).
fn transposed<T: Copy>(values: &[T], b: usize) -> Vec<T> {
    (0..b)
        .flat_map(|j| values[j..].iter().step_by(b).copied())
        .collect()
}

fn assert_equal(found: &KTensor, wanted: &[f32], what: &str) {
    let found = found.dequantize();
    assert_eq!(found.len(), wanted.len(), "{what}");
    for (i, (a, b)) in found.iter().zip(wanted).enumerate() {
        assert!(a == b, "{what}: element {i} is {a}, not {b}");
    }
}

/// A matrix of codes (rows, inputs), zero points and scales (rows, groups), and a group for each input.
struct Case {
    bits: usize,
    rows: usize,
    inputs: usize,
    codes: Vec<u32>,
    zeros: Vec<u32>,
    scales: Vec<f16>,
    groups: usize,
    of: Vec<usize>,
}

impl Case {
    fn new(
        bits: usize,
        rows: usize,
        inputs: usize,
        group: usize,
        shuffle: bool,
        same_zero: bool,
    ) -> Self {
        let mut random = Random(bits as u64);
        let groups = inputs / group;
        let mut of: Vec<usize> = (0..inputs).map(|i| i / group).collect();
        if shuffle {
            (1..inputs)
                .rev()
                .for_each(|i| of.swap(i, random.next() as usize % (i + 1)));
        }
        let top = 1 << bits;
        Self {
            bits,
            rows,
            inputs,
            codes: (0..rows * inputs)
                .map(|_| random.next() as u32 % top)
                .collect(),
            zeros: (0..rows * groups)
                .map(|_| {
                    if same_zero {
                        top / 2
                    } else {
                        1 + random.next() as u32 % (top - 1)
                    }
                })
                .collect(),
            scales: (0..rows * groups)
                .map(|_| f16::from_f32(random.next() as f32 / 1e11))
                .collect(),
            groups,
            of,
        }
    }

    fn values(&self) -> Vec<f32> {
        let at = |r: usize, i: usize| r * self.groups + self.of[i];
        let value = |r: usize, i: usize| {
            let q = self.codes[r * self.inputs + i] as i32 - self.zeros[at(r, i)] as i32;
            q as f32 * self.scales[at(r, i)].to_f32()
        };
        (0..self.rows)
            .flat_map(|r| (0..self.inputs).map(move |i| (r, i)))
            .map(|(r, i)| value(r, i))
            .collect()
    }

    fn halves(values: &[f16]) -> Vec<u8> {
        values.iter().flat_map(|s| s.to_le_bytes()).collect()
    }

    fn gptq(&self, less: u32, order: bool) -> Tensors {
        let by_row: Vec<u32> = self
            .codes
            .chunks(self.inputs)
            .flat_map(|row| stream(self.bits, row.iter().copied()))
            .collect();
        let words = self.inputs * self.bits / 32;
        let zeros: Vec<u32> = transposed(&self.zeros, self.groups)
            .chunks(self.rows)
            .flat_map(|line| stream(self.bits, line.iter().map(|z| z - less)))
            .collect();
        let columns = zeros.len() / self.groups;
        let mut all = vec![
            (
                "qweight",
                "I32",
                vec![words, self.rows],
                bytes(transposed(&by_row, words)),
            ),
            ("qzeros", "I32", vec![self.groups, columns], bytes(zeros)),
            (
                "scales",
                "F16",
                vec![self.groups, self.rows],
                Self::halves(&transposed(&self.scales, self.groups)),
            ),
        ];
        if order {
            all.push((
                "g_idx",
                "I32",
                vec![self.inputs],
                bytes(self.of.iter().map(|g| *g as u32)),
            ));
        }
        all
    }
}

#[test]
fn gptq_of_every_width_and_order() {
    for bits in [2, 3, 4, 8] {
        for (shuffle, same) in [(false, false), (true, false), (false, true), (true, true)] {
            let case = Case::new(bits, 32, 384, 96, shuffle, same);
            let what = format!("{bits} bits, shuffled {shuffle}, one zero {same}");
            for (dialect, less) in [("gptq", 1), ("gptq_v2", 0)] {
                let k = load(dialect, &case.gptq(less, shuffle), &[], bits).unwrap();
                assert_equal(&k, &case.values(), &what);
                assert_eq!(k.permutation().is_some(), shuffle, "{what}");
            }
            // Rows are taken and permuted after unpacking.
            let rope = Transform::PermuteRope {
                heads: 2,
                rotary_dim: 8,
            };
            let steps = [Transform::Rows(4, 28), rope];
            let k = load("gptq_v2", &case.gptq(0, true), &steps, bits).unwrap();
            let all = case.values();
            let order = [
                0, 2, 4, 6, 1, 3, 5, 7, 8, 9, 10, 11, 12, 14, 16, 18, 13, 15, 17, 19, 20, 21, 22,
                23,
            ];
            let wanted: Vec<f32> = order
                .iter()
                .flat_map(|r| all[(r + 4) * 384..][..384].to_vec())
                .collect();
            assert_equal(&k, &wanted, &what);
        }
    }
}

/// Words of AWQ hold 8 rows; nibble i is row `ORDER[i]`.
const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

#[test]
fn awq_in_its_order() {
    let case = Case::new(4, 24, 128, 64, false, false);
    let pack = |lines: &[u32]| -> Vec<u8> {
        bytes(
            lines
                .chunks(8)
                .map(|eight| ORDER.iter().rev().fold(0, |word, &i| word << 4 | eight[i])),
        )
    };
    let mut all: Tensors = vec![
        (
            "qweight",
            "I32",
            vec![128, 3],
            pack(&transposed(&case.codes, 128)),
        ),
        (
            "qzeros",
            "I32",
            vec![2, 3],
            pack(&transposed(&case.zeros, 2)),
        ),
        (
            "scales",
            "F16",
            vec![2, 24],
            Case::halves(&transposed(&case.scales, 2)),
        ),
    ];
    assert_equal(&load("awq", &all, &[], 4).unwrap(), &case.values(), "awq");
    all[1].2 = vec![3, 2];
    let error = load("awq", &all, &[], 4).unwrap_err();
    assert!(
        matches!(&error, Error::Format(m) if m.contains("qzeros 3 x 2")),
        "{error}"
    );
}

#[test]
fn compressed_tensors() {
    for bits in [2, 4, 8] {
        for same in [false, true] {
            let case = Case::new(bits, 32, 256, 128, false, same);
            let words = 256 * bits / 32;
            let packed = case
                .codes
                .chunks(256)
                .flat_map(|row| stream(bits, row.iter().copied()));
            let scales: Vec<u8> = case
                .scales
                .iter()
                .flat_map(|s| bf16::from_f32(s.to_f32()).to_le_bytes())
                .collect();
            let mut all: Tensors = vec![
                ("weight_packed", "I32", vec![32, words], bytes(packed)),
                ("weight_scale", "BF16", vec![32, 2], scales),
            ];
            if !same {
                let by_group: Vec<u32> = transposed(&case.zeros, 2)
                    .chunks(32)
                    .flat_map(|line| stream(bits, line.iter().copied()))
                    .collect();
                all.push((
                    "weight_zero_point",
                    "I32",
                    vec![bits, 2],
                    bytes(transposed(&by_group, bits)),
                ));
            }
            let rounded = Case {
                scales: vec![],
                ..Case::new(bits, 32, 256, 128, false, same)
            };
            let wanted: Vec<f32> = (0..32 * 256)
                .map(|i| {
                    let at = i / 256 * 2 + i % 256 / 128;
                    let q = rounded.codes[i] as i32 - rounded.zeros[at] as i32;
                    q as f32 * bf16::from_f32(case.scales[at].to_f32()).to_f32()
                })
                .collect();
            assert_equal(
                &load("compressed", &all, &[], bits).unwrap(),
                &wanted,
                "compressed",
            );
        }
    }
}

#[test]
fn bitsandbytes_plain_and_nested() {
    let mut random = Random(9);
    let (rows, inputs, block) = (6, 128, 64);
    let packed = random.bytes(rows * inputs / 2);
    let map: Vec<f32> = (0..16).map(|i| (i as f32 - 7.5) / 7.3).collect();
    let floats = |v: &[f32]| -> Vec<u8> { v.iter().flat_map(|x| x.to_le_bytes()).collect() };
    let value = |i: usize, absmax: &[f32]| {
        let byte = packed[i / 2];
        map[usize::from(if i.is_multiple_of(2) {
            byte >> 4
        } else {
            byte & 15
        })] * absmax[i / block]
    };
    let state = |extra: &str| {
        format!("{{\"quant_type\":\"nf4\",\"blocksize\":64,\"dtype\":\"bfloat16\",\"shape\":[6,128]{extra}}}").into_bytes()
    };
    let weight = ("weight", "U8", vec![rows * inputs / 2, 1], packed.clone());
    let plain: Vec<f32> = (0..12).map(|i| i as f32 / 3.0).collect();
    let json = state("");
    let all: Tensors = vec![
        weight.clone(),
        ("absmax", "F32", vec![12], floats(&plain)),
        ("quant_map", "F32", vec![16], floats(&map)),
        ("quant_state", "U8", vec![json.len()], json),
    ];
    let wanted: Vec<f32> = (0..rows * inputs).map(|i| value(i, &plain)).collect();
    assert_equal(
        &load("bitsandbytes", &all, &[], 4).unwrap(),
        &wanted,
        "plain",
    );

    let codes = random.bytes(12);
    let (outer, offset) = ([0.5f32, 0.25, 2.0], 0.1f32);
    let inner: Vec<f32> = (0..256).map(|i| (i as f32 - 127.0) / 127.0).collect();
    let absmax: Vec<f32> = codes
        .iter()
        .enumerate()
        .map(|(i, c)| inner[usize::from(*c)] * outer[i / 4] + offset)
        .collect();
    let json = state(&format!(
        ",\"nested_blocksize\":4,\"nested_dtype\":\"float32\",\"nested_offset\":{}",
        f64::from(offset)
    ));
    let all: Tensors = vec![
        weight,
        ("absmax", "U8", vec![12], codes),
        ("quant_map", "F32", vec![16], floats(&map)),
        ("quant_state", "U8", vec![json.len()], json),
        ("nested_absmax", "F32", vec![3], floats(&outer)),
        ("nested_quant_map", "F32", vec![256], floats(&inner)),
    ];
    let wanted: Vec<f32> = (0..rows * inputs).map(|i| value(i, &absmax)).collect();
    assert_equal(
        &load("bitsandbytes", &all, &[], 4).unwrap(),
        &wanted,
        "nested",
    );
}

#[test]
fn mxfp4_experts_and_interleaved_rows() {
    const FP4: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let mut random = Random(4);
    let (experts, rows, groups) = (3, 10, 3);
    let blocks = random.bytes(experts * rows * groups * 16);
    for scales in [
        random.bytes(experts * rows * groups),
        vec![0; experts * rows * groups],
    ] {
        let all: Tensors = vec![
            (
                "blocks",
                "U8",
                vec![experts, rows, groups, 16],
                blocks.clone(),
            ),
            ("scales", "U8", vec![experts, rows, groups], scales.clone()),
        ];
        // Expert 1, its odd rows.
        let steps = [
            Transform::Select { index: 1, axis: 0 },
            Transform::PermuteRope {
                heads: 1,
                rotary_dim: 10,
            },
            Transform::Rows(5, 10),
        ];
        let wanted: Vec<f32> = (0..5)
            .flat_map(|r| (0..groups * 32).map(move |i| (2 * r + 1, i)))
            .map(|(r, i)| {
                let line = (rows + r) * groups + i / 32;
                let byte = blocks[line * 16 + i % 32 / 2];
                let code = if i % 2 == 0 { byte & 15 } else { byte >> 4 };
                let magnitude = f64::from(FP4[usize::from(code & 7)])
                    * (f64::from(scales[line]) - 127.0).exp2();
                (if code & 8 == 0 { magnitude } else { -magnitude }) as f32
            })
            .collect();
        assert_equal(&load("mxfp4", &all, &steps, 4).unwrap(), &wanted, "mxfp4");
    }
}

#[test]
fn fp8_with_scales_of_every_shape() {
    let mut random = Random(6);
    let (rows, inputs) = (20, 192);
    // No NaN.
    let codes: Vec<u8> = random
        .bytes(rows * inputs)
        .iter()
        .map(|b| if b & 0x7f == 0x7f { 0 } else { *b })
        .collect();
    let e4m3 = |b: u8| {
        let (e, m) = (i32::from(b >> 3 & 15), f32::from(b & 7));
        let v = if e == 0 {
            m / 512.0
        } else {
            (1.0 + m / 8.0) * 2f32.powi(e - 7)
        };
        if b & 0x80 == 0 { v } else { -v }
    };
    for (shape, row_block, block) in [
        (vec![1], 20, 192),
        (vec![20, 1], 1, 192),
        (vec![3, 3], 8, 64),
        (vec![20, 2], 1, 96),
    ] {
        let n: usize = shape.iter().product();
        let scales: Vec<f32> = (0..n).map(|_| random.next() as f32 / 1e10).collect();
        let columns = inputs / block;
        let wanted: Vec<f32> = (0..rows * inputs)
            .map(|i| e4m3(codes[i]) * scales[i / inputs / row_block * columns + i % inputs / block])
            .collect();
        let floats = scales.iter().flat_map(|s| s.to_le_bytes()).collect();
        let file = tensors(&[
            ("weight", "F8_E4M3", vec![rows, inputs], codes.clone()),
            ("weight_scale", "F32", shape.clone(), floats),
        ]);
        let options = PackedOptions {
            bits: None,
            block: Some((row_block, block)),
        };
        assert_equal(
            &load_from(&file, "fp8", &[], options).unwrap(),
            &wanted,
            &format!("{shape:?}"),
        );
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let case = Case::new(4, 32, 128, 64, false, false);
    let good = case.gptq(1, true);
    let expect = |all: &Tensors, dialect: &str, bits: usize, words: &str| {
        let error = load(dialect, all, &[], bits).unwrap_err().to_string();
        assert!(error.contains(words), "{error} lacks {words}");
    };
    expect(&good, "gguf", 4, "known are gptq");
    expect(&good, "awq", 4, "awq wants qweight qzeros scales, got");
    expect(&good[..2].to_vec(), "gptq", 4, "gptq wants");
    expect(&good, "gptq", 5, "5 bits");
    expect(&good, "gptq", 8, "qweight 16 x 32 at 8 bits");
    let swap = |at: usize, part: (&'static str, &'static str, Vec<usize>, Vec<u8>)| {
        let mut all = good.clone();
        all[at] = part;
        all
    };
    expect(
        &swap(0, ("qweight", "F32", vec![16, 32], vec![0; 2048])),
        "gptq",
        4,
        "must be a matrix of I32",
    );
    expect(
        &swap(2, ("scales", "I32", vec![2, 32], vec![0; 256])),
        "gptq",
        4,
        "must be floats",
    );
    expect(
        &swap(3, ("g_idx", "I32", vec![128], bytes([7; 128]))),
        "gptq",
        4,
        "group 7 of 2",
    );
    expect(
        &swap(3, ("g_idx", "I32", vec![4], bytes([0; 4]))),
        "gptq",
        4,
        "must be 128 of I32",
    );
    let uneven = (0..128u32).map(|i| u32::from(i > 3));
    expect(
        &swap(3, ("g_idx", "I32", vec![128], bytes(uneven))),
        "gptq",
        4,
        "different sizes",
    );
    let error = load("gptq", &good, &[Transform::Transpose], 4).unwrap_err();
    assert!(matches!(error, Error::Unsupported(_)), "{error}");
    assert_eq!(DIALECTS.len(), 7);
}
