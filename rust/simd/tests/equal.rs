//! Every operation of every instruction set against the scalar definition, compared as bits.

#![allow(unsafe_code, reason = "weights and activations pass through memory")]

mod emulator;

use std::mem::MaybeUninit;
use std::ops::Range;

use emulator::instruction_sets;
use kbit_simd::{Book, Isa, LANES, Simd, SimdOp, dispatch, half, math};

/// A repeatable stream of numbers (xorshift).
struct Random(u64);
impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    /// Floats of all magnitudes, with special values among them.
    fn float(&mut self) -> f32 {
        const SPECIAL: [f32; 8] = [
            0.0,
            -0.0,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::NAN,
            1e-40,
            65520.0,
            0.5,
        ];
        match self.next() % 8 {
            0 => SPECIAL[self.next() as usize % 8],
            1 => f32::from_bits(self.next() as u32),
            _ => (self.next() as i32) as f32 / 2f32.powi((self.next() % 40) as i32),
        }
    }
}

/// NaN counts as one value: which operand's payload survives is not part of the contract.
fn bits(x: f32) -> u32 {
    if x.is_nan() { 0x7fc0_0000 } else { x.to_bits() }
}

/// All float and i32 operations on one set of inputs.
struct Floats<'a> {
    a: &'a [f32; LANES],
    b: &'a [f32; LANES],
    c: &'a [f32; LANES],
    n: usize,
}

impl SimdOp for Floats<'_> {
    type Output = Vec<u32>;
    const TILES: bool = true;
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) -> Vec<u32> {
        let mut all = Vec::new();
        let (a, b, c) = (s.load(self.a), s.load(self.b), s.load(self.c));
        macro_rules! floats { ($($v:expr),* $(,)?) => { $({
            let mut out = [f32::NAN; LANES];
            s.store($v, &mut out);
            all.extend(out.map(bits));
        })* } }
        floats![
            s.add(a, b),
            s.sub(a, b),
            s.mul(a, b),
            s.div(a, b),
            s.fma(a, b, c),
            s.sqrt(a),
            s.max(a, b),
            s.min(a, b),
            s.abs(a),
            s.neg(a),
            s.round(a),
            s.select(s.lt(a, b), a, c),
            s.select(s.first(self.n), a, c),
            s.load_part(&self.a[..self.n]),
            math::exp(s, a),
            math::sigmoid(s, a),
            math::silu(s, a),
            math::quick_gelu(s, a),
            math::tanh(s, a),
            math::erf(s, a),
            math::gelu(s, a),
            math::gelu_tanh(s, a),
        ];
        let mut part = vec![0.0; self.n];
        s.store_part(a, &mut part);
        all.extend(part.iter().map(|&x| bits(x)));
        let mut h = [0u16; LANES];
        s.store_f16(a, &mut h);
        all.extend(h.map(u32::from));
        floats![s.load_f16(&h)];
        s.store_bf16(b, &mut h);
        all.extend(h.map(u32::from));
        floats![s.load_bf16(&h)];
        let small = s.to_i32(s.mul(s.min(s.max(a, s.splat(-1.0)), s.splat(1.0)), s.splat(127.0)));
        let (x, y) = (s.bits(b), s.bits(c));
        for v in [
            small,
            s.add_i32(x, y),
            s.sub_i32(x, y),
            s.mul_i32(x, y),
            s.and_i32(x, y),
            s.shl_i32(x, 7),
            s.shr_i32(x, 7),
        ] {
            let mut out = [0; LANES];
            s.store_i32(v, &mut out);
            all.extend(out.map(|i| i as u32));
        }
        let mut i8s = [0i8; LANES];
        s.store_i8(small, &mut i8s);
        all.extend(i8s.map(|i| i as u32));
        floats![
            s.to_f32(s.load_i8(&i8s)),
            s.to_f32(s.load_u8(&i8s.map(|i| i as u8))),
            s.to_f32(x)
        ];
        all.push(s.reduce_add_i32(x) as u32);
        all.push(bits(s.reduce_add(s.mul(s.to_f32(small), s.splat(0.1)))));
        all.push(bits(s.reduce_max(s.to_f32(small))));
        all
    }
}

/// Decoding and dot products at one width, over random bytes. Gives the weights' dot products with unit activations.
#[allow(clippy::struct_field_names, reason = "the codes are what it is about")]
struct Codes<'a> {
    codes: &'a [u8; 64],
    book: &'a Book,
    s: &'a [u8; 16],
    acts: [i8; 4],
    bits: usize,
}

impl SimdOp for Codes<'_> {
    type Output = Vec<i32>;
    const TILES: bool = true;
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) -> Vec<i32> {
        match self.bits {
            2 => self.at::<S, 2>(s),
            3 => self.at::<S, 3>(s),
            4 => self.at::<S, 4>(s),
            5 => self.at::<S, 5>(s),
            6 => self.at::<S, 6>(s),
            7 => self.at::<S, 7>(s),
            _ => self.at::<S, 8>(s),
        }
    }
}

impl Codes<'_> {
    /// Under the ladder indices of low and of high nibbles.
    #[inline(always)]
    fn folds<S: Simd, const BITS: usize, const SINGLE: bool>(&self, s: S) -> [S::Weights; 2] {
        let (codes, ladder) = (s.load_bytes(self.codes), s.ladder::<BITS>(self.book));
        let low = s.rungs::<BITS, SINGLE>(&ladder, self.s, false);
        let high = s.rungs::<BITS, SINGLE>(&ladder, self.s, true);
        [
            s.fold::<BITS, SINGLE>(&ladder, &low, codes),
            s.fold::<BITS, SINGLE>(&ladder, &high, codes),
        ]
    }

    #[inline(always)]
    fn at<S: Simd, const BITS: usize>(self, s: S) -> Vec<i32> {
        #[repr(align(64))]
        struct Line([u8; 128]);
        let codes = s.load_bytes(self.codes);
        let table = s.table(self.book);
        let several = self.folds::<S, BITS, false>(s);
        let one = self.folds::<S, BITS, true>(s);
        let masked = s.merge(((1u16 << BITS) - 1) as u8, codes, s.splat_bytes(0));
        let minus = s.splat_bytes((1u8 << (BITS - 1)).wrapping_neg() ^ S::BIAS);
        let all = [
            s.weights(s.lookup::<BITS>(&table, codes)),
            one[0],
            one[1],
            several[0],
            several[1],
            s.weights(s.linear(masked, minus, s.splat_bytes(0x81 ^ S::BIAS))),
            s.weights(s.lookup::<BITS>(&table, s.shr(codes, 3))),
            s.weights(s.lookup::<BITS>(&table, s.shl(codes, 2))),
        ];
        let a = self.acts;
        let mut bytes = [0u8; 8];
        for (i, j) in [0, 2, 1, 3].into_iter().enumerate() {
            if S::PAIRS {
                bytes[2 * i..2 * i + 2].copy_from_slice(&i16::from(a[j]).to_le_bytes());
            } else {
                bytes[i] = a[i] as u8;
            }
        }
        let sum: i32 = a.iter().map(|&x| i32::from(x)).sum();
        let start = s.splat_i32(if S::BIAS == 0 { 0 } else { -128 * sum });
        let mut out = Vec::new();
        for w in all {
            let mut line = Line([0; 128]);
            // SAFETY: the line is aligned and holds the largest kind of weights; there are 8 bytes of activations.
            let dot = unsafe {
                s.store_weights(w, line.0.as_mut_ptr());
                s.dot(
                    start,
                    s.load_weights(line.0.as_ptr()),
                    s.acts(bytes.as_ptr()),
                )
            };
            let mut lanes = [0; LANES];
            s.store_i32(dot, &mut lanes);
            out.extend(lanes);
        }
        out
    }
}

#[test]
fn floats_equal_the_scalar_definition() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for round in 0..4000 {
        let mut input = || std::array::from_fn::<f32, LANES, _>(|_| random.float());
        let (a, b, c) = (input(), input(), input());
        let op = |isa| {
            dispatch(
                isa,
                Floats {
                    a: &a,
                    b: &b,
                    c: &c,
                    n: round % 17,
                },
            )
        };
        let want = op(Isa::Scalar);
        for isa in instruction_sets() {
            let got = op(isa);
            for (i, (g, w)) in got.iter().zip(&want).enumerate() {
                assert_eq!(
                    g, w,
                    "{isa}: value {i}: {g:x} for {w:x}; a {a:?} b {b:?} c {c:?}"
                );
            }
            assert_eq!(got.len(), want.len());
        }
    }
}

#[test]
fn codes_equal_the_scalar_definition() {
    let mut random = Random(0x0123_4567_89ab_cdef);
    for round in 0..3000 {
        let codes: [u8; 64] = std::array::from_fn(|_| random.next() as u8);
        let bits = 2 + round % 7;
        let entry: [i8; 256] = std::array::from_fn(|_| (random.next() % 255) as i8);
        let entries: Vec<i8> = entry[..1 << bits].iter().map(|&e| e.max(-127)).collect();
        let book = Book::new(
            bits,
            &entries,
            // The last rung of most ladders is the identity.
            std::array::from_fn(|i| {
                if i == 15 {
                    128
                } else {
                    (random.next() % 129) as u8
                }
            }),
        );
        let s = std::array::from_fn(|_| random.next() as u8);
        let acts = std::array::from_fn(|_| ((random.next() % 255) as i32 - 127) as i8);
        let op = |isa| {
            dispatch(
                isa,
                Codes {
                    codes: &codes,
                    book: &book,
                    s: &s,
                    acts,
                    bits,
                },
            )
        };
        let want = op(Isa::Scalar);
        for isa in instruction_sets() {
            assert_eq!(op(isa), want, "{isa} at {bits} bits");
        }
    }
}

/// 64 bytes as registers want them.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[allow(dead_code, reason = "memory for registers")] [u8; 64]);

/// A product of decoded panels with a tile of `tokens`.
struct Products<'a> {
    /// One to two panels, \[inputs / 4\]\[16 rows\]\[4 inputs\].
    panels: &'a [Vec<[i8; 64]>],
    /// \[tokens\]\[inputs\].
    acts: &'a [Vec<i8>],
    groups: Range<usize>,
}

impl SimdOp for Products<'_> {
    /// \[panel\]\[token\]\[row\], None where the instruction set has no such tile.
    type Output = Option<Vec<i32>>;
    const TILES: bool = true;
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) -> Option<Vec<i32>> {
        macro_rules! at {
            ($($m:literal)*) => {
                match (self.acts.len(), self.panels.len()) {
                    $(
                        ($m, 1) if const { S::LEAST <= $m && $m <= S::TILE && !S::STORED } => {
                            Some(self.at::<S, 1, $m>(s))
                        }
                        ($m, 2) if const { S::ALONE <= $m && $m <= S::TILE && S::PANELS == 2 } => {
                            Some(self.at::<S, 2, $m>(s))
                        }
                    )*
                    _ => None,
                }
            };
        }
        at!(1 2 4 6 8 12 16 32)
    }
}

impl Products<'_> {
    #[inline(always)]
    fn at<S: Simd, const P: usize, const M: usize>(self, s: S) -> Vec<i32> {
        let lines = S::WEIGHT_BYTES / 64;
        let mut weights = vec![vec![Line([0; 64]); self.groups.len() * lines]; P];
        for (panel, to) in self.panels.iter().zip(&mut weights) {
            for pair in 0..self.groups.len() / 2 {
                let w = [0, 1].map(|i| {
                    let w = panel[self.groups.start + 2 * pair + i];
                    s.weights(s.load_bytes(&w.map(|w| w as u8 ^ S::BIAS)))
                });
                // SAFETY: there is room for every group.
                unsafe { s.store_pair(w, to.as_mut_ptr().add(2 * pair * lines).cast()) };
            }
        }
        let (inputs, size) = (self.acts[0].len(), if S::PAIRS { 2 } else { 1 });
        let rows: Vec<Vec<i16>> = if S::rows(M) == M {
            let wide = |row: &Vec<i8>| row.iter().map(|&a| a.into()).collect();
            self.acts.iter().map(wide).collect()
        } else {
            let differences = |a: &[i8], b: &[i8]| {
                let both = a.iter().zip(b);
                both.map(|(&a, &b)| 256 * i16::from(a) - i16::from(b))
                    .collect()
            };
            let fours = self.acts.as_chunks::<4>().0.iter();
            fours
                .flat_map(|four| four.windows(2))
                .map(|two| differences(&two[0], &two[1]))
                .collect()
        };
        assert_eq!(rows.len(), S::rows(M));
        let mut tile = vec![0u8; inputs * rows.len() * size];
        for (n, row) in rows.iter().enumerate() {
            for (i, &a) in row.iter().enumerate() {
                let i = if S::PAIRS {
                    i / 4 * 4 + [0, 2, 1, 3][i % 4]
                } else {
                    i
                };
                let at = (i / S::RUN * rows.len() + n) * S::RUN + i % S::RUN;
                if S::PAIRS {
                    tile[2 * at..2 * at + 2].copy_from_slice(&a.to_le_bytes());
                } else {
                    tile[at] = a as u8;
                }
            }
        }
        let covered = self.groups.start * 4..self.groups.end * 4;
        let mut start = [s.splat_i32(0); M];
        for n in 0..M {
            let sum: i32 = self.acts[n][covered.clone()]
                .iter()
                .map(|&a| i32::from(a))
                .sum();
            if S::BIAS != 0 {
                start[n] = s.splat_i32(-128 * sum);
            }
        }
        let from = std::array::from_fn(|p| weights[p].as_ptr().cast());
        let mut sums = MaybeUninit::uninit();
        s.begin_products(self.groups.len() * 4, M);
        // SAFETY: weights and activations are there for all of `groups`, and products have begun.
        let sums = unsafe {
            s.product::<P, M>(from, tile.as_ptr(), self.groups, start, &mut sums);
            sums.assume_init()
        };
        s.end_products();
        let mut out = Vec::new();
        for v in sums.into_iter().flatten() {
            let mut lanes = [0; LANES];
            s.store_i32(v, &mut lanes);
            out.extend(lanes);
        }
        out
    }
}

#[test]
fn products_equal_plain_loops() {
    let mut random = Random(0x51ed_270b_a1f3_9c65);
    let mut compared = std::collections::BTreeMap::<Isa, usize>::new();
    for tokens in [1, 2, 4, 6, 8, 12, 16, 32] {
        // The last is as large as sums get, with signs that take turns.
        for (panels, inputs, largest) in [
            (1, 512, false),
            (2, 512, false),
            (2, 320, false),
            (1, 64, false),
            (1, 256, true),
        ] {
            let panels: Vec<Vec<[i8; 64]>> = (0..panels)
                .map(|_| {
                    let mut weight = || if largest { -128 } else { random.next() as i8 };
                    let vector = |_| std::array::from_fn(|_| weight());
                    (0..inputs / 4).map(vector).collect()
                })
                .collect();
            let acts: Vec<Vec<i8>> = (0..tokens)
                .map(|token| {
                    let mut activation = || match (largest, token % 2) {
                        (true, 0) => 127,
                        (true, _) => -127,
                        _ => ((random.next() % 255) as i16 - 127) as i8,
                    };
                    (0..inputs).map(|_| activation()).collect()
                })
                .collect();
            for start in (0..inputs / 4).step_by(8) {
                // Half a step of matrix tiles, or whole ones.
                let whole = if start % 16 == 0 { 4 } else { 0 };
                let ends = (start + 16..=inputs / 4).step_by(16).take(whole);
                for end in std::iter::once(start + 8).chain(ends) {
                    let mut want = Vec::new();
                    for panel in &panels {
                        for row in &acts {
                            want.extend((0..16).map(|r| {
                                let product = |i: usize| {
                                    i32::from(panel[i / 4][r * 4 + i % 4]) * i32::from(row[i])
                                };
                                (4 * start..4 * end).map(product).sum::<i32>()
                            }));
                        }
                    }
                    for isa in instruction_sets() {
                        let op = Products {
                            panels: &panels,
                            acts: &acts,
                            groups: start..end,
                        };
                        if let Some(got) = dispatch(isa, op) {
                            let at = format!(
                                "{isa}: {tokens} tokens, {} panels, groups {start}..{end}",
                                panels.len()
                            );
                            assert_eq!(got, want, "{at}");
                            *compared.entry(isa).or_default() += got.len();
                        }
                    }
                }
            }
        }
    }
    eprintln!("results compared: {compared:?}");
    for isa in instruction_sets() {
        assert!(compared[&isa] >= 3_000, "{isa}: {compared:?}");
    }
    amx_ran();
}

/// Under emulation every instruction was encoded as meant, and the tiles of this thread are released.
fn amx_ran() {
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    if emulator::emulated() {
        let counts = emulator::counts();
        eprintln!("carried out: {:?} {counts:?}", emulator::COUNTED);
        assert!(counts.iter().all(|&n| n > 100), "{counts:?}");
        assert!(!emulator::configured());
        return;
    }
    let has = if Isa::Amx.is_available() {
        "has"
    } else {
        "lacks"
    };
    eprintln!("AMX is not emulated: this machine {has} it");
}

#[test]
fn halves_round_trip_and_round_to_even() {
    for bits in 0..=u16::MAX {
        let (h, b) = (half::f16_to_f32(bits), half::bf16_to_f32(bits));
        assert!(h.is_nan() || half::f32_to_f16(h) == bits, "{bits:x}");
        assert!(b.is_nan() || half::f32_to_bf16(b) == bits, "{bits:x}");
    }
    assert_eq!(half::f32_to_f16(2049.0), half::f32_to_f16(2048.0));
    assert_eq!(half::f32_to_f16(65519.9), 0x7bff);
    assert_eq!(half::f32_to_f16(65520.0), 0x7c00);
}

/// `f` of 16 numbers on one instruction set.
struct Math<'a>(&'a [f32; LANES], usize);
impl SimdOp for Math<'_> {
    type Output = [f32; LANES];
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) -> [f32; LANES] {
        let x = s.load(self.0);
        let mut out = [0.0; LANES];
        let y = match self.1 {
            0 => math::exp(s, x),
            1 => math::tanh(s, x),
            2 => math::erf(s, x),
            _ => math::sigmoid(s, x),
        };
        s.store(y, &mut out);
        out
    }
}

/// The error function by its Taylor series in f64.
fn erf(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    if x.abs() > 4.0 {
        x.signum()
    } else {
        sum * std::f64::consts::FRAC_2_SQRT_PI
    }
}

#[test]
fn element_functions_are_near_the_true_ones() {
    // exp and sigmoid: error relative to the value; tanh and erf: absolute error.
    for (which, bound) in [(0, 2.5e-7), (1, 2.5e-7), (2, 3e-7), (3, 3e-7)] {
        let mut worst = (0.0f64, 0.0f32);
        for i in 0..200_000 {
            let x = std::array::from_fn(|l| {
                ((i * LANES + l) as f32 - 1.6e6) * if which == 0 { 5.4e-5 } else { 6e-6 }
            });
            let y = dispatch(Isa::Scalar, Math(&x, which));
            for l in 0..LANES {
                let (t, got) = (f64::from(x[l]), f64::from(y[l]));
                let error = match which {
                    0 => (got / t.exp() - 1.0).abs(),
                    1 => (got - t.tanh()).abs(),
                    2 => (got - erf(t)).abs(),
                    _ => (got * (1.0 + (-t).exp()) - 1.0).abs(),
                };
                if error > worst.0 {
                    worst = (error, x[l]);
                }
            }
        }
        eprintln!("function {which}: error {:.2e} at {}", worst.0, worst.1);
        assert!(worst.0 < bound, "function {which}: error {worst:?}");
    }
}
