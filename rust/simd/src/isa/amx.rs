//! AMX int8: products of tiles. Everything else of the instruction set is AVX-512 with VBMI (`avx512.rs`).
//!
//! A tile register holds 16 rows of 64 bytes. Activations of 16 tokens by 64 inputs are one (A), 16 decoded code vectors of 16
//! rows by 4 inputs, which is 64 inputs, are another (B, as the product wants it: four inputs of a column side by side), and
//! the int32 results of 16 tokens by 16 rows a third (C). One instruction adds the product of A and B to C, exactly. Compilers
//! do not allocate tile registers, so what C holds stays there between pieces of assembly: zero, any number of steps of 64 inputs, then to memory. Products
//! of 32 inputs have tiles half as wide (A) and half as high (B).
//!
//! | registers | what |
//! |---|---|
//! | `tmm0`, `tmm1` | C of the first panel: tokens 0..16, 16..32; of fewer than 16 they have as many rows |
//! | `tmm2`, `tmm3` | C of the second panel |
//! | `tmm4`, `tmm5` | A: tokens 0..16, 16..32 |
//! | `tmm6`, `tmm7` | B of the first and the second panel |

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count, __m512i};
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use super::avx512::{Amx, Avx512Vbmi};
use crate::{LANES, Simd, SimdOp};

/// Rows of a tile: tokens of A and C, code vectors of B.
pub(super) const ROWS: usize = 16;
/// Of the lowest A and C in use. Products take as many cycles as A has rows.
pub(super) const ALONE: usize = 4;
/// Inputs of a step, bytes of a row.
pub(super) const STEP: usize = 64;

/// Operand of `ldtilecfg`.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Config {
    /// Eight tiles as the table above names them: A and B of so many inputs, A and C of so many tokens.
    fn of(inputs: usize, tokens: usize) -> Self {
        let (a, b, n) = (inputs as u16, (inputs / 4) as u8, tokens as u8);
        Self {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [64, 64, 64, 64, a, a, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
            rows: [n, n, n, n, n, n, b, b, 0, 0, 0, 0, 0, 0, 0, 0],
        }
    }
}

/// Declares all tile registers as overwritten.
macro_rules! tiles {
    ($($line:literal)* ; $($operand:tt)*) => {
        asm!(
            $($line,)*
            $($operand)*
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
}

/// Gives this thread's tiles their shapes, for products of `inputs` inputs, 32 or a multiple of 64, and so many tokens.
///
/// # Safety
/// The process may use AMX.
#[inline(always)]
pub(super) unsafe fn configure(inputs: usize, tokens: usize) {
    debug_assert!(inputs == STEP / 2 || inputs.is_multiple_of(STEP));
    let config = Config::of(inputs.min(STEP), tokens.min(ROWS));
    // SAFETY: as the caller says; the operand has the 64 bytes and the values that the instruction wants.
    unsafe { tiles!("ldtilecfg [{config}]"; config = in(reg) &raw const config,) }
}

/// Back to the state of a thread that never used tiles, which costs nothing to switch from.
///
/// # Safety
/// The process may use AMX.
#[inline(always)]
pub(super) unsafe fn release() {
    // SAFETY: as the caller says.
    unsafe { tiles!("tilerelease";) }
}

/// Sums of the tokens of one tile or two by two panels: zero.
///
/// # Safety
/// [`configure`] was called.
#[inline(always)]
pub(super) unsafe fn zero<const M: usize>() {
    // SAFETY: as the caller says.
    unsafe {
        if M <= ROWS {
            tiles!("tilezero tmm0" "tilezero tmm2";);
        } else {
            tiles!("tilezero tmm0" "tilezero tmm1" "tilezero tmm2" "tilezero tmm3";);
        }
    }
}

/// Adds products to the sums.
///
/// # Safety
/// As [`Simd::product`]; [`configure`] was called.
#[inline(always)]
pub(super) unsafe fn add<const P: usize, const M: usize>(
    weights: [*const u8; P],
    acts: *const u8,
    groups: Range<usize>,
) {
    assert!(P == 2 && (M <= ROWS || M == 2 * ROWS));
    // Half a step is all of a product, and the only one that may begin within a step.
    let (step, within) = (groups.start / ROWS, groups.start % ROWS);
    let steps = groups.len().div_ceil(ROWS);
    debug_assert!(
        steps > 0 && (groups.len().is_multiple_of(ROWS) && within == 0 || groups.len() == ROWS / 2)
    );
    let acts = acts.wrapping_add(step * STEP * M + within * 4);
    /// What is read, how often, and the bytes of a row.
    macro_rules! add {
        ($($line:literal)*) => {
            tiles!(
                $($line)* ;
                a = inout(reg) acts => _,
                b = inout(reg) weights[0] => _,
                d = inout(reg) weights[1] => _,
                n = inout(reg) steps => _,
                s = in(reg) STEP,
                t = in(reg) STEP * M,
            )
        };
    }
    // SAFETY: the caller says that all of it is readable.
    unsafe {
        if M <= ROWS {
            add!(
                "2:"
                "tileloadd tmm4, [{a} + {s}*1]"
                "tileloadd tmm6, [{b} + {s}*1]"
                "tdpbssd tmm0, tmm4, tmm6"
                "tileloadd tmm7, [{d} + {s}*1]"
                "tdpbssd tmm2, tmm4, tmm7"
                "add {a}, {t}"
                "add {b}, 1024"
                "add {d}, 1024"
                "dec {n}"
                "jnz 2b"
            );
        } else {
            add!(
                "2:"
                "tileloadd tmm4, [{a} + {s}*1]"
                "tileloadd tmm6, [{b} + {s}*1]"
                "tdpbssd tmm0, tmm4, tmm6"
                "tileloadd tmm7, [{d} + {s}*1]"
                "tdpbssd tmm2, tmm4, tmm7"
                "tileloadd tmm5, [{a} + {s}*1 + 1024]"
                "tdpbssd tmm1, tmm5, tmm6"
                "tdpbssd tmm3, tmm5, tmm7"
                "add {a}, {t}"
                "add {b}, 1024"
                "add {d}, 1024"
                "dec {n}"
                "jnz 2b"
            );
        }
    }
}

/// The sums to memory.
///
/// # Safety
/// [`zero`] was called with the same number of tokens.
#[inline(always)]
pub(super) unsafe fn store<const P: usize, const M: usize>(
    sums: &mut MaybeUninit<[[__m512i; M]; P]>,
) {
    // SAFETY: `sums` is C as the tiles lie, `[P][M]` rows of 64 bytes.
    unsafe {
        if M <= ROWS {
            tiles!(
                "tilestored [{c} + {s}*1], tmm0"
                "tilestored [{d} + {s}*1], tmm2" ;
                c = in(reg) sums.as_mut_ptr(),
                d = in(reg) sums.as_mut_ptr().cast::<[__m512i; M]>().wrapping_add(1),
                s = in(reg) STEP,
            );
        } else {
            tiles!(
                "tilestored [{c} + {s}*1], tmm0"
                "tilestored [{c} + {s}*1 + 1024], tmm1"
                "tilestored [{c} + {s}*1 + 2048], tmm2"
                "tilestored [{c} + {s}*1 + 3072], tmm3" ;
                c = in(reg) sums.as_mut_ptr(),
                s = in(reg) STEP,
            );
        }
    }
}

/// Set by [`assume`].
static ASSUMED: AtomicBool = AtomicBool::new(false);

/// Whether this process may use AMX int8 tiles and they give the right results. Looked at once a process, then remembered.
pub(super) fn usable() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    ASSUMED.load(Ordering::Relaxed)
        // SAFETY: the processor has the instructions, and the system gave permission.
        || *FOUND.get_or_init(|| detected() && permitted() && unsafe { right() })
}

/// For tests on processors without AMX, whose instructions a signal handler then carries out: skips detection. Gives the result of the
/// self-check.
///
/// # Safety
/// AMX int8 instructions run or are emulated on every thread.
pub unsafe fn assume() -> bool {
    // SAFETY: as the caller says.
    let good = unsafe { right() };
    ASSUMED.store(good, Ordering::Relaxed);
    good
}

/// Whether the processor has int8 tiles as large as the code wants, and the system saves them.
fn detected() -> bool {
    const TILE_INT8: u32 = 1 << 24 | 1 << 25;
    const OSXSAVE: u32 = 1 << 27;
    /// Tile configuration and data.
    const SAVED: u32 = 1 << 17 | 1 << 18;
    /// Bytes of a row and number of tiles; rows.
    const PALETTE_1: (u32, u32) = (8 << 16 | 64, 16);
    if __cpuid(0).eax < 0x1d
        || __cpuid_count(7, 0).edx & TILE_INT8 != TILE_INT8
        || __cpuid(1).ecx & OSXSAVE == 0
    {
        return false;
    }
    let saved: u32;
    // SAFETY: OSXSAVE says that the instruction exists and may be used.
    unsafe {
        asm!("xgetbv", in("ecx") 0, out("eax") saved, out("edx") _, options(nomem, nostack));
    }
    let palette = __cpuid_count(0x1d, 1);
    saved & SAVED == SAVED
        && __cpuid_count(0x1d, 0).eax >= 1
        && (palette.ebx, palette.ecx & 0xffff) == PALETTE_1
}

/// Asks Linux for the tile registers, for all threads of the process. It refuses where a thread's signal stack is too small for them.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_PRCTL: usize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const XTILEDATA: usize = 18;
    let result: isize;
    // SAFETY: the call reads and writes no memory; systems that do not know it return an error.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XTILEDATA,
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    result == 0
}

/// Elsewhere there is nobody to ask: what the system saves may be used.
#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    true
}

/// Whether products are right: every shape once, compared with plain loops.
///
/// # Safety
/// AMX int8 instructions may run.
unsafe fn right() -> bool {
    // SAFETY: as the caller says.
    Avx512Vbmi::new().is_some_and(|s| unsafe { Amx::over(s) }.run(Check))
}

/// Steps of the check.
const STEPS: usize = 2;

struct Check;

impl SimdOp for Check {
    type Output = bool;
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) -> bool {
        let sizes = [0..STEPS * ROWS, ROWS..2 * ROWS];
        let halves = [0..ROWS / 2, ROWS + ROWS / 2..2 * ROWS];
        (sizes.into_iter().chain(halves)).all(|groups| {
            check::<S, ALONE>(s, groups.clone())
                && check::<S, ROWS>(s, groups.clone())
                && check::<S, { 2 * ROWS }>(s, groups)
        })
    }
}

/// A decoded code vector: [16 rows][4 inputs] of weights.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Vector([u8; STEP]);

/// One product of two panels and `M` tokens.
#[inline(always)]
fn check<S: Simd, const M: usize>(s: S, groups: Range<usize>) -> bool {
    let mut state = 1u32;
    let mut byte = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    let weights =
        [[(); STEPS * ROWS]; 2].map(|panel| panel.map(|()| Vector([(); STEP].map(|()| byte()))));
    let acts = [[[(); STEP]; M]; STEPS].map(|step| step.map(|row| row.map(|()| byte())));
    let mut sums = MaybeUninit::uninit();
    s.begin_products(groups.len() * 4, M);
    // SAFETY: there are `STEPS` steps of weights and activations, and products have begun.
    let sums = unsafe {
        let from = weights
            .each_ref()
            .map(|panel| panel.as_ptr().add(groups.start).cast());
        s.product(
            from,
            acts.as_ptr().cast(),
            groups.clone(),
            [s.splat_i32(0); M],
            &mut sums,
        );
        sums.assume_init()
    };
    s.end_products();
    let right = |p: usize, n: usize, row: usize| {
        let products = (groups.start * 4..groups.end * 4).map(|i| {
            let w = weights[p][i / 4].0[row * 4 + i % 4];
            i32::from(w as i8) * i32::from(acts[i / STEP][n][i % STEP] as i8)
        });
        products.sum::<i32>()
    };
    (0..2 * M).all(|i| {
        let (p, n) = (i / M, i % M);
        let mut got = [0; LANES];
        s.store_i32(sums[p][n], &mut got);
        got == std::array::from_fn(|row| right(p, n, row))
    })
}
