//! Matrix products of every kind on every instruction set this machine has, compared as bits with plain loops over
//! [`KTensor`]'s accessors that share no code with the kernels.
#![allow(
    clippy::print_stdout,
    reason = "the counts belong to the result of the test"
)]
#![allow(unsafe_code, reason = "Matrix::run writes where its caller says")]

mod common;
#[path = "../../simd/tests/emulator/mod.rs"]
mod emulator;

use std::collections::BTreeMap;
use std::ops::Range;

use common::{Random, random_codebook, random_matrix, random_row};
use emulator::instruction_sets;
use kbit_cpu::acts::{Acts, WHOLE_TILES};
use kbit_cpu::linear::{Matrix, trace};
use kbit_simd::Isa;
use kbit_tensor::program::Activations;
use kbit_tensor::{
    Bytes, Codebook, DType, KTensor, Offset, SUPER, ScaleType, Scales, SubScale, Tensor, Weight,
};

/// Scale kinds that exist: every ladder, block and sub-scale type with every offset.
fn kinds(random: &mut Random) -> Vec<Scales> {
    let mut all = vec![Scales::Row];
    for block in [16, 32, 64] {
        all.push(Scales::Ladder {
            block,
            ladder: random.ladder(),
        });
        for sub in [SubScale::U8, SubScale::I8, SubScale::U4] {
            for min in [false, true] {
                all.push(Scales::Super { block, sub, min });
            }
        }
    }
    for block in [16, 32, 64, 128, 256] {
        for scale in [
            ScaleType::F16,
            ScaleType::BF16,
            ScaleType::F32,
            ScaleType::E8M0,
        ] {
            for offset in [Offset::None, Offset::Min, Offset::Zero] {
                all.push(Scales::Block {
                    block,
                    scale,
                    offset,
                });
            }
        }
    }
    all
}

/// `docs/numerics.md` section 2, in plain code: scales per super-block, and int8.
fn quantise(x: &[f32]) -> (Vec<f32>, Vec<i32>) {
    let mut scales = Vec::new();
    let mut a8 = Vec::new();
    for block in x.chunks(SUPER) {
        let amax = block.iter().fold(0f32, |m, v| m.max(v.abs()));
        if block.iter().any(|v| !v.is_finite()) {
            scales.push(f32::NAN);
            a8.extend(block.iter().map(|_| 0));
        } else if amax <= 1e-30 {
            scales.push(0.0);
            a8.extend(block.iter().map(|_| 0));
        } else {
            scales.push(amax / 127.0);
            let inverse = 127.0 / amax;
            a8.extend(block.iter().map(|v| (v * inverse).round_ties_even() as i32));
        }
    }
    (scales, a8)
}

/// Section 3, in plain code: one output.
fn output(k: &KTensor, row: usize, sa: &[f32], a8: &[i32]) -> f32 {
    let (l, b) = (k.layout(), k.bytes());
    let Codebook::I8(codebook) = k.codebook() else {
        unreachable!("int8 cases only")
    };
    let value = |j: usize| i32::from(codebook[usize::from(l.code(b, row, j))]);
    let f16 = |at: usize| half::f16::from_le_bytes([b[at], b[at + 1]]).to_f32();
    let bf16 = |at: usize| half::bf16::from_le_bytes([b[at], b[at + 1]]).to_f32();
    let mut y = 0f32;
    for sup in 0..k.inputs().div_ceil(SUPER) {
        let inputs = sup * SUPER..k.inputs().min(sup * SUPER + SUPER);
        let sa = sa[sup];
        let wide = |which| l.wide_offset(row, sup, which);
        let block = k.scales().block();
        let blocks = inputs
            .clone()
            .step_by(block)
            .map(|j| (j / block, j..inputs.end.min(j + block)));
        match *k.scales() {
            Scales::Ladder { ref ladder, .. } => {
                let mut dot = 0;
                for j in inputs {
                    let (at, high) = l.rung_offset(row, j / block);
                    let s = if high { b[at] >> 4 } else { b[at] & 15 };
                    dot += ((value(j) * i32::from(ladder[usize::from(s)]) + 64) >> 7) * a8[j];
                }
                y = (dot as f32).mul_add(bf16(wide(0)) * sa, y);
            }
            Scales::Row => {
                let dot: i32 = inputs.map(|j| value(j) * a8[j]).sum();
                y = (dot as f32).mul_add(bf16(wide(0)) * sa, y);
            }
            Scales::Block { scale, offset, .. } => {
                for (n, inputs) in blocks {
                    let mut dot: i32 = inputs.clone().map(|j| value(j) * a8[j]).sum();
                    let asum: i32 = inputs.map(|j| a8[j]).sum();
                    if offset == Offset::Zero {
                        let zero = i32::from(b[l.offset_offset(row, n, 1)]);
                        dot -= (zero - if k.bits() == 8 { 128 } else { 0 }) * asum;
                    }
                    let s = scale.read(&b[l.fine_offset(row, n, scale.size())..]);
                    y = (dot as f32).mul_add(s * sa, y);
                    if offset == Offset::Min {
                        let m = scale.read(&b[l.offset_offset(row, n, scale.size())..]);
                        y = (asum as f32).mul_add(m * sa, y);
                    }
                }
            }
            Scales::Super { sub, min, .. } => {
                let (mut isum, mut msum) = (0i32, 0i32);
                for (n, inputs) in blocks {
                    let byte = b[l.fine_offset(row, n, 1)];
                    let (s, m) = match sub {
                        SubScale::U8 => {
                            (i32::from(byte), b.get(l.offset_offset(row, n, 1)).copied())
                        }
                        SubScale::I8 => (
                            i32::from(byte as i8),
                            b.get(l.offset_offset(row, n, 1)).copied(),
                        ),
                        SubScale::U4 => (i32::from(byte & 15), Some(byte >> 4)),
                    };
                    isum += s * inputs.clone().map(|j| value(j) * a8[j]).sum::<i32>();
                    if min {
                        msum +=
                            i32::from(m.expect("a minimum")) * inputs.map(|j| a8[j]).sum::<i32>();
                    }
                }
                y = (isum as f32).mul_add(f16(wide(0)) * sa, y);
                if min {
                    y = (msum as f32).mul_add(-(f16(wide(1)) * sa), y);
                }
            }
        }
    }
    y
}

/// All outputs of a k-bit matrix by [`output`]: (tokens, rows).
fn reference(k: &KTensor, x: &[f32], tokens: usize) -> Vec<f32> {
    let mut all = Vec::new();
    for t in 0..tokens {
        let row = &x[t * k.inputs()..][..k.inputs()];
        let gathered: Vec<f32> = match k.permutation() {
            Some(p) => p.iter().map(|&i| row[i as usize]).collect(),
            None => row.to_vec(),
        };
        let (sa, a8) = quantise(&gathered);
        all.extend((0..k.rows()).map(|r| output(k, r, &sa, &a8)));
    }
    all
}

/// `matrix` on `isa`, its panels dealt to `threads`; the output has a margin that must stay NaN.
fn on_threads(matrix: &Matrix, isa: Isa, x: &[f32], tokens: usize, threads: usize) -> Vec<f32> {
    struct Shared(*mut f32);
    // SAFETY: threads write different panels.
    unsafe impl Sync for Shared {}
    let stride = matrix.rows() + 3;
    let mut out = vec![f32::NAN; tokens * stride];
    let mut acts = Acts::new().expect("memory");
    acts.reserve(isa, matrix.input(), tokens).expect("memory");
    acts.fill_all(x, matrix.inputs());
    let (at, panels) = (&Shared(out.as_mut_ptr()), matrix.panels());
    std::thread::scope(|scope| {
        for t in 0..threads {
            let (acts, range) = (&acts, t * panels / threads..(t + 1) * panels / threads);
            // SAFETY: the ranges are disjoint and `out` has a row for every token.
            scope.spawn(move || unsafe { matrix.run(acts, 0..tokens, range, { at }.0, stride) });
        }
    });
    for row in out.chunks(stride) {
        assert!(
            row[matrix.rows()..].iter().all(|v| v.is_nan()),
            "{isa}: wrote past the last row"
        );
    }
    out.chunks(stride)
        .flat_map(|row| row[..matrix.rows()].to_vec())
        .collect()
}

/// Bits, NaN as one value.
fn bits(values: &[f32]) -> Vec<u32> {
    values
        .iter()
        .map(|v| if v.is_nan() { 0x7fc0_0000 } else { v.to_bits() })
        .collect()
}

const SHAPES: [(usize, usize); 9] = [
    (16, 256),
    (33, 64),
    (1, 31),
    (47, 320),
    (64, 896),
    (20, 1100),
    (17, 512),
    (5, 2050),
    (40, 127),
];
const BATCHES: [usize; 7] = [1, 2, 3, 5, 8, 16, 33];

#[test]
fn every_kind_gives_the_same_bits_on_every_instruction_set() {
    let mut random = Random::new(1);
    let mut compared = BTreeMap::<&str, usize>::new();
    let mut case = 0;
    trace::enable(true);
    for scales in kinds(&mut random) {
        for bits_per_code in 2..=8 {
            let (rows, inputs) = SHAPES[case % SHAPES.len()];
            // The first two batches of every kind are 1 and something larger.
            let batches = [1, BATCHES[1 + case % 6]];
            let codebook = random_codebook(&mut random, bits_per_code, &scales, case % 2 == 0);
            let k = random_matrix(
                &mut random,
                bits_per_code,
                rows,
                inputs,
                codebook,
                &scales,
                case % 5 == 4,
            );
            let matrix = Matrix::prepare(&Weight::Quantised(k.clone()), Activations::Int8)
                .expect("a matrix");
            for tokens in batches {
                let x: Vec<f32> = (0..tokens)
                    .flat_map(|_| random_row(&mut random, inputs))
                    .collect();
                let want = bits(&reference(&k, &x, tokens));
                for isa in instruction_sets() {
                    let threads = 1 + (case + tokens) % 4;
                    let got = bits(&on_threads(&matrix, isa, &x, tokens, threads));
                    let wrong = got.iter().zip(&want).position(|(g, w)| g != w);
                    assert!(
                        wrong.is_none(),
                        "{isa}, {bits_per_code} bits, {scales:?}, {rows} x {inputs}, {tokens} tokens, {threads} threads: \
                         output {wrong:?}: {:?} for {:?}",
                        wrong.map(|i| f32::from_bits(got[i])),
                        wrong.map(|i| f32::from_bits(want[i])),
                    );
                    *compared.entry(isa.name()).or_default() += got.len();
                }
            }
            case += 1;
        }
    }
    let ran = trace::seen();
    trace::enable(false);
    println!(
        "{case} matrices; outputs compared per instruction set: {compared:?}; {} kernels ran",
        ran.len()
    );
    assert_eq!(case, 82 * 7);
    for isa in instruction_sets() {
        assert!(
            compared[isa.name()] >= 100_000,
            "{isa} was compared on {} outputs only",
            compared[isa.name()]
        );
        if isa == Isa::Amx {
            // It has the kernels for many tokens and all but blocks of 16 inputs under floats; AVX-512 has the others.
            for kind in [
                "ladder16", "ladder32", "ladder64", "row", "block32", "block64", "block128",
                "block256", "super16", "super32", "super64",
            ] {
                let mut of_kind = ran
                    .keys()
                    .filter(|name| name.contains(&format!(" {kind} ")));
                assert!(
                    of_kind.any(|name| name.contains(" amx m")),
                    "{kind} did not run on AMX"
                );
            }
            continue;
        }
        for k in 2..=8 {
            for kind in ["ladder32", "row", "block32 f16 none", "super32 u8 min"] {
                let name = format!("k{k} {kind} {isa} m1");
                assert!(ran.contains_key(&name), "{name} did not run: {ran:?}");
            }
        }
    }
}

#[test]
fn every_batch_gives_the_bits_of_one_token() {
    let mut random = Random::new(2);
    for bits_per_code in 2..=8 {
        for scales in [
            Scales::Ladder {
                block: 32,
                ladder: random.ladder(),
            },
            Scales::Block {
                block: if bits_per_code % 2 == 0 { 32 } else { 128 },
                scale: ScaleType::F16,
                offset: Offset::Min,
            },
            Scales::Super {
                block: if bits_per_code % 2 == 0 { 64 } else { 32 },
                sub: SubScale::U8,
                min: true,
            },
        ] {
            let codebook = random_codebook(&mut random, bits_per_code, &scales, true);
            let k = random_matrix(
                &mut random,
                bits_per_code,
                53,
                1344,
                codebook,
                &scales,
                false,
            );
            let matrix =
                Matrix::prepare(&Weight::Quantised(k), Activations::Int8).expect("a matrix");
            let x: Vec<f32> = (0..40)
                .flat_map(|_| random_row(&mut random, 1344))
                .collect();
            for isa in instruction_sets() {
                let one: Vec<f32> = x
                    .chunks(1344)
                    .flat_map(|row| matrix.multiply(isa, row).expect("memory"))
                    .collect();
                for tokens in 1..=40 {
                    let got = matrix.multiply(isa, &x[..tokens * 1344]).expect("memory");
                    assert_eq!(
                        bits(&got),
                        bits(&one[..tokens * 53]),
                        "{isa}, {bits_per_code} bits, {tokens} tokens"
                    );
                }
            }
        }
    }
}

/// More tokens than have room for their results at a time (`RESULTS` in `tiles.rs`), which are done one lot after the other; and tokens that
/// a caller cuts itself.
#[test]
fn many_tokens_give_the_bits_of_a_few() {
    let mut random = Random::new(3);
    let (rows, inputs, tokens) = (53, 320, 2111);
    let scales = [
        Scales::Ladder {
            block: 32,
            ladder: random.ladder(),
        },
        Scales::Block {
            block: 32,
            scale: ScaleType::F16,
            offset: Offset::Zero,
        },
    ];
    for scales in scales {
        let codebook = random_codebook(&mut random, 4, &scales, true);
        let k = random_matrix(&mut random, 4, rows, inputs, codebook, &scales, false);
        let x: Vec<f32> = (0..tokens)
            .flat_map(|_| random_row(&mut random, inputs))
            .collect();
        for activations in [Activations::Int8, Activations::F32] {
            let weight = Weight::Quantised(k.clone());
            let matrix = Matrix::prepare(&weight, activations).expect("a matrix");
            for isa in instruction_sets() {
                let few: Vec<f32> = x
                    .chunks(40 * inputs)
                    .flat_map(|some| matrix.multiply(isa, some).expect("memory"))
                    .collect();
                let all = matrix.multiply(isa, &x).expect("memory");
                assert!(bits(&all) == bits(&few), "{isa}, {scales:?}");

                let parts = [WHOLE_TILES..960, 960..tokens, 0..WHOLE_TILES];
                let cut = in_parts(&matrix, isa, &x, parts);
                assert!(bits(&cut) == bits(&few), "{isa}, {scales:?}, cut");
            }
        }
    }
}

/// [`Matrix::multiply`], its tokens cut by the caller.
fn in_parts<const N: usize>(
    matrix: &Matrix,
    isa: Isa,
    x: &[f32],
    parts: [Range<usize>; N],
) -> Vec<f32> {
    let tokens = x.len() / matrix.inputs();
    let mut acts = Acts::new().expect("memory");
    acts.reserve(isa, matrix.input(), tokens).expect("memory");
    acts.fill_all(x, matrix.inputs());
    let mut out = vec![f32::NAN; tokens * matrix.rows()];
    for part in parts {
        // SAFETY: there is a place for every token and row.
        unsafe {
            matrix.run(
                &acts,
                part,
                0..matrix.panels(),
                out.as_mut_ptr(),
                matrix.rows(),
            );
        }
    }
    out
}

/// What a caller cuts off may be less than a tile that is not the first.
#[test]
fn a_last_cut_of_any_size_gives_the_same_bits() {
    let mut random = Random::new(5);
    let (rows, inputs) = (53, 320);
    let kinds = [
        Scales::Ladder {
            block: 32,
            ladder: random.ladder(),
        },
        Scales::Super {
            block: 32,
            sub: SubScale::U8,
            min: true,
        },
        Scales::Block {
            block: 32,
            scale: ScaleType::F16,
            offset: Offset::None,
        },
    ];
    for scales in kinds {
        let codebook = random_codebook(&mut random, 4, &scales, true);
        let k = random_matrix(&mut random, 4, rows, inputs, codebook, &scales, false);
        let weight = Weight::Quantised(k.clone());
        let matrix = Matrix::prepare(&weight, Activations::Int8).expect("a matrix");
        for last in [1, 7, 16, 17, 32, 40] {
            let whole = 2 * WHOLE_TILES;
            let tokens = whole + last;
            let x: Vec<f32> = (0..tokens)
                .flat_map(|_| random_row(&mut random, inputs))
                .collect();
            let want = bits(&reference(&k, &x, tokens));
            for isa in instruction_sets() {
                let cut = in_parts(&matrix, isa, &x, [0..whole, whole..tokens]);
                assert!(
                    bits(&cut) == want,
                    "{isa}, {scales:?}, {last} after {whole}"
                );
            }
        }
    }
}

#[test]
#[should_panic(expected = "tokens 0..50 of 100 in tiles of")]
fn tokens_are_cut_between_tiles_only() {
    let mut random = Random::new(3);
    let scales = Scales::Ladder {
        block: 32,
        ladder: random.ladder(),
    };
    let codebook = random_codebook(&mut random, 4, &scales, true);
    let k = random_matrix(&mut random, 4, 16, 64, codebook, &scales, false);
    let matrix = Matrix::prepare(&Weight::Quantised(k), Activations::Int8).expect("a matrix");
    let mut acts = Acts::new().expect("memory");
    acts.reserve(Isa::Scalar, matrix.input(), 100)
        .expect("memory");
    acts.fill_all(&vec![1.0; 6400], 64);
    let mut out = vec![0.0; 1600];
    // SAFETY: it panics before it writes.
    unsafe { matrix.run(&acts, 0..50, 0..1, out.as_mut_ptr(), 16) };
}

#[test]
fn special_activations() {
    let mut random = Random::new(3);
    let scales = Scales::Ladder {
        block: 32,
        ladder: random.ladder(),
    };
    let codebook = random_codebook(&mut random, 4, &scales, false);
    let k = random_matrix(&mut random, 4, 16, 600, codebook, &scales, false);
    let matrix =
        Matrix::prepare(&Weight::Quantised(k.clone()), Activations::Int8).expect("a matrix");
    for special in [
        f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::MAX,
        f32::MIN_POSITIVE,
        1e-45,
        -0.0,
        1e-30,
    ] {
        for at in [0, 15, 16, 255, 256, 599] {
            for rest in [0.0, 1e-31, 1.0] {
                let mut x: Vec<f32> = random_row(&mut random, 600)
                    .iter()
                    .map(|v| v * rest)
                    .collect();
                x[at] = special;
                let want = bits(&reference(&k, &x, 1));
                for isa in instruction_sets() {
                    assert_eq!(
                        bits(&matrix.multiply(isa, &x).expect("memory")),
                        want,
                        "{isa}: {special} at {at}"
                    );
                }
                assert_eq!(want[0] == 0x7fc0_0000, !special.is_finite());
            }
        }
    }
}

/// Section 4, in plain code, over dequantised rows.
fn float_reference(w: &[f32], x: &[f32], inputs: usize) -> Vec<f32> {
    let mut out = Vec::new();
    for x in x.chunks(inputs) {
        for w in w.chunks(inputs) {
            let mut p = [0f32; 4];
            for (i, (w, x)) in w.iter().zip(x).enumerate() {
                p[i % 4] = w.mul_add(*x, p[i % 4]);
            }
            out.push((p[0] + p[2]) + (p[1] + p[3]));
        }
    }
    out
}

#[test]
fn the_float_path_gives_the_same_bits_on_every_instruction_set() {
    let mut random = Random::new(4);
    let mut compared = BTreeMap::<&str, usize>::new();
    let mut check = |matrix: &Matrix, w: &[f32], random: &mut Random, what: &str| {
        for tokens in BATCHES {
            let x: Vec<f32> = (0..tokens)
                .flat_map(|_| random_row(random, matrix.inputs()))
                .collect();
            let want = bits(&float_reference(w, &x, matrix.inputs()));
            for isa in instruction_sets() {
                let got = bits(&on_threads(matrix, isa, &x, tokens, 1 + tokens % 4));
                assert_eq!(got, want, "{isa}: {what}, {tokens} tokens");
                *compared.entry(isa.name()).or_default() += got.len();
            }
        }
    };
    for (rows, inputs) in SHAPES {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let values: Vec<f32> = (0..rows)
                .flat_map(|_| random_row(&mut random, inputs))
                .collect();
            let bytes: Vec<u8> = match dtype {
                DType::F16 => values
                    .iter()
                    .flat_map(|&v| half::f16::from_f32(v).to_le_bytes())
                    .collect(),
                DType::BF16 => values
                    .iter()
                    .flat_map(|&v| half::bf16::from_f32(v).to_le_bytes())
                    .collect(),
                _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            };
            let bytes = std::sync::Arc::new(Bytes::copy_of(&bytes).expect("memory"));
            let array = Tensor::new(dtype, &[rows, inputs], bytes).expect("an array");
            let w = array.to_f32();
            let matrix =
                Matrix::prepare(&Weight::Dense(array), Activations::Int8).expect("a matrix");
            check(
                &matrix,
                &w,
                &mut random,
                &format!("{dtype:?} {rows} x {inputs}"),
            );
        }
    }
    for (case, scales) in kinds(&mut random).into_iter().enumerate() {
        let (bits_per_code, (rows, inputs)) = (2 + case % 7, SHAPES[case % SHAPES.len()]);
        let mut codebook = random_codebook(&mut random, bits_per_code, &scales, case % 2 == 0);
        if matches!(scales, Scales::Block { .. } | Scales::Super { .. }) {
            let Codebook::I8(entries) = codebook else {
                unreachable!("random_codebook is int8")
            };
            codebook = Codebook::F32(entries.iter().map(|&e| f32::from(e) * 0.0137).collect());
        }
        let k = random_matrix(
            &mut random,
            bits_per_code,
            rows,
            inputs,
            codebook,
            &scales,
            case % 5 == 4,
        );
        let w = k.dequantize();
        let matrix = Matrix::prepare(&Weight::Quantised(k), Activations::F32).expect("a matrix");
        // The rows of `w` are in the order of the given inputs; the contract sums in stored order.
        if matrix.input().permutation.is_none() {
            check(
                &matrix,
                &w,
                &mut random,
                &format!("{scales:?} {rows} x {inputs}"),
            );
        }
    }
    println!("outputs compared per instruction set: {compared:?}");
    for isa in instruction_sets() {
        assert!(
            compared[isa.name()] >= 50_000,
            "{isa} was compared on {} outputs only",
            compared[isa.name()]
        );
    }
}

/// What a kernel that made this mistake would compute: the comparison above must be able to see it.
/// A name and what it does to the bytes of a matrix.
type Fault<'a> = (&'a str, Box<dyn Fn(&mut [u8]) + 'a>);

#[test]
fn planted_faults_change_the_bits() {
    let mut random = Random::new(5);
    let scales = Scales::Ladder {
        block: 32,
        ladder: std::array::from_fn(|i| 40 + 5 * i as u8),
    };
    let codebook = random_codebook(&mut random, 5, &scales, false);
    let k = random_matrix(&mut random, 5, 32, 832, codebook.clone(), &scales, false);
    let x = random_row(&mut random, 832);
    let want = bits(&reference(&k, &x, 1));
    let layout = k.layout().clone();
    let mutated = |change: &dyn Fn(&mut [u8])| {
        let mut bytes = Bytes::copy_of(k.bytes()).expect("memory");
        change(&mut bytes);
        let k = KTensor::new(
            5,
            32,
            832,
            codebook.clone(),
            scales.clone(),
            None,
            bytes.into(),
            0,
        )
        .expect("a matrix");
        Matrix::prepare(&Weight::Quantised(k), Activations::Int8).expect("a matrix")
    };
    let l = &layout;
    let faults: [Fault<'_>; 4] = [
        (
            "a scale index of the neighbour block",
            Box::new(|b| {
                for panel in b.chunks_exact_mut(l.panel_bytes) {
                    for byte in &mut panel[l.fine_at..l.fine_at + l.chunks * 16] {
                        *byte = byte.rotate_left(4);
                    }
                }
            }),
        ),
        (
            "a missing tail",
            Box::new(|b| {
                for row in 0..32 {
                    for input in 768..832 {
                        l.set_code(b, row, input, 0);
                    }
                }
            }),
        ),
        (
            "swapped planes",
            Box::new(|b| {
                for panel in b.chunks_exact_mut(l.panel_bytes) {
                    for chunk in panel[l.codes_at..].chunks_exact_mut(640) {
                        let (low, high) = chunk.split_at_mut(512);
                        low[..128].swap_with_slice(high);
                    }
                }
            }),
        ),
        (
            "a wrong wide scale",
            Box::new(|b| {
                for panel in b.chunks_exact_mut(l.panel_bytes) {
                    panel.copy_within(0..32, 32);
                }
            }),
        ),
    ];
    for isa in instruction_sets() {
        assert_eq!(
            bits(&mutated(&|_| {}).multiply(isa, &x).expect("memory")),
            want,
            "{isa}: nothing changed"
        );
        for (what, fault) in &faults {
            let got = bits(&mutated(fault).multiply(isa, &x).expect("memory"));
            let differ = got.iter().zip(&want).filter(|(g, w)| g != w).count();
            assert!(
                differ >= 24,
                "{isa}: {what} changed {differ} of 32 outputs only"
            );
        }
    }
    // A correction that is skipped: -128 times the sum of activations, where weights are stored plus 128.
    let (sa, a8) = quantise(&x);
    assert!(
        a8[..SUPER].iter().sum::<i32>() != 0 && sa[0] > 0.0,
        "these activations could not show it"
    );
}
