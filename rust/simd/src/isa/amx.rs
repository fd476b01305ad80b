//! AMX int8: products of tiles. Everything else of the instruction set is AVX-512 with VBMI (`avx512.rs`).
//!
//! A tile register holds 16 rows of 64 bytes. Activations of 16 tokens by 64 inputs are one (A), 16 decoded code vectors of 16
//! rows by 4 inputs, which is 64 inputs, are another (B, as the product wants it: four inputs of a column side by side), and
//! the int32 results of 16 tokens by 16 rows a third (C). One instruction adds the product of A and B to C, exactly. Compilers
//! do not allocate tile registers, so a product is one piece of assembly: C from memory, all steps of 64 inputs, C to memory.
//!
//! | registers | what |
//! |---|---|
//! | `tmm0`, `tmm1` | C of the first panel: tokens 0..16, 16..32 |
//! | `tmm2`, `tmm3` | C of the second panel |
//! | `tmm4`, `tmm5` | A: tokens 0..16, 16..32 |
//! | `tmm6`, `tmm7` | B of the first and the second panel |

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count, __m512i};
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use super::avx512::{Amx, Avx512Vbmi};
use crate::{LANES, Simd, SimdOp};

/// Rows of a tile: tokens of A and C, code vectors of B.
pub(super) const ROWS: usize = 16;
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

/// All eight tiles full: 16 rows of 64 bytes. Smaller ones would take as long.
static CONFIG: Config = Config {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

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

/// Gives this thread's tiles their shapes.
///
/// # Safety
/// The process may use AMX.
#[inline(always)]
pub(super) unsafe fn configure() {
    // SAFETY: as the caller says; the operand has the 64 bytes and the values that the instruction wants.
    unsafe { tiles!("ldtilecfg [{config}]"; config = in(reg) &raw const CONFIG,) }
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

/// [`Simd::product`] of 16 or 32 tokens by one or two panels.
///
/// # Safety
/// As [`Simd::product`]; [`configure`] was called.
#[inline(always)]
pub(super) unsafe fn multiply<const P: usize, const M: usize>(
    weights: [*const u8; P],
    acts: *const u8,
    groups: Range<usize>,
    dots: &mut [[__m512i; M]; P],
) {
    assert!((P == 1 || P == 2) && (M == ROWS || M == 2 * ROWS));
    debug_assert!(groups.start.is_multiple_of(ROWS) && groups.end.is_multiple_of(ROWS));
    let steps = groups.len() / ROWS;
    if steps == 0 {
        return;
    }
    let (first, second) = (weights[0], weights[P - 1]);
    let acts = acts.wrapping_add(groups.start * 4 * M);
    /// Where results are, what is read, how often, and the bytes of a row.
    macro_rules! product {
        ($($line:literal)* ; $($second:tt)*) => {
            tiles!(
                $($line)* ;
                c = in(reg) dots.as_mut_ptr(),
                a = inout(reg) acts => _,
                b = inout(reg) first => _,
                n = inout(reg) steps => _,
                s = in(reg) STEP,
                $($second)*
            )
        };
    }
    // SAFETY: `dots` is C as the tiles lie, `[P][M]` rows of 64 bytes; the caller says that the rest is readable.
    unsafe {
        match (P, M) {
            (1, ROWS) => product!(
                "tileloadd tmm0, [{c} + {s}*1]"
                "2:"
                "tileloadd tmm4, [{a} + {s}*1]"
                "tileloadd tmm6, [{b} + {s}*1]"
                "tdpbsud tmm0, tmm4, tmm6"
                "add {a}, 1024"
                "add {b}, 1024"
                "dec {n}"
                "jnz 2b"
                "tilestored [{c} + {s}*1], tmm0";
            ),
            (1, _) => product!(
                "tileloadd tmm0, [{c} + {s}*1]"
                "tileloadd tmm1, [{c} + {s}*1 + 1024]"
                "2:"
                "tileloadd tmm4, [{a} + {s}*1]"
                "tileloadd tmm6, [{b} + {s}*1]"
                "tdpbsud tmm0, tmm4, tmm6"
                "tileloadd tmm5, [{a} + {s}*1 + 1024]"
                "tdpbsud tmm1, tmm5, tmm6"
                "add {a}, 2048"
                "add {b}, 1024"
                "dec {n}"
                "jnz 2b"
                "tilestored [{c} + {s}*1], tmm0"
                "tilestored [{c} + {s}*1 + 1024], tmm1";
            ),
            (_, ROWS) => product!(
                "tileloadd tmm0, [{c} + {s}*1]"
                "tileloadd tmm2, [{c} + {s}*1 + 1024]"
                "2:"
                "tileloadd tmm4, [{a} + {s}*1]"
                "tileloadd tmm6, [{b} + {s}*1]"
                "tdpbsud tmm0, tmm4, tmm6"
                "tileloadd tmm7, [{d} + {s}*1]"
                "tdpbsud tmm2, tmm4, tmm7"
                "add {a}, 1024"
                "add {b}, 1024"
                "add {d}, 1024"
                "dec {n}"
                "jnz 2b"
                "tilestored [{c} + {s}*1], tmm0"
                "tilestored [{c} + {s}*1 + 1024], tmm2";
                d = inout(reg) second => _,
            ),
            _ => product!(
                "tileloadd tmm0, [{c} + {s}*1]"
                "tileloadd tmm1, [{c} + {s}*1 + 1024]"
                "tileloadd tmm2, [{c} + {s}*1 + 2048]"
                "tileloadd tmm3, [{c} + {s}*1 + 3072]"
                "2:"
                "tileloadd tmm4, [{a} + {s}*1]"
                "tileloadd tmm6, [{b} + {s}*1]"
                "tdpbsud tmm0, tmm4, tmm6"
                "tileloadd tmm7, [{d} + {s}*1]"
                "tdpbsud tmm2, tmm4, tmm7"
                "tileloadd tmm5, [{a} + {s}*1 + 1024]"
                "tdpbsud tmm1, tmm5, tmm6"
                "tdpbsud tmm3, tmm5, tmm7"
                "add {a}, 2048"
                "add {b}, 1024"
                "add {d}, 1024"
                "dec {n}"
                "jnz 2b"
                "tilestored [{c} + {s}*1], tmm0"
                "tilestored [{c} + {s}*1 + 1024], tmm1"
                "tilestored [{c} + {s}*1 + 2048], tmm2"
                "tilestored [{c} + {s}*1 + 3072], tmm3";
                d = inout(reg) second => _,
            ),
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
        check::<S, 1, ROWS>(s)
            && check::<S, 2, ROWS>(s)
            && check::<S, 1, { 2 * ROWS }>(s)
            && check::<S, 2, { 2 * ROWS }>(s)
    }
}

/// A decoded code vector: [16 rows][4 inputs] of weights plus 128.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Vector([u8; STEP]);

/// One product of `P` panels and `M` tokens.
#[inline(always)]
fn check<S: Simd, const P: usize, const M: usize>(s: S) -> bool {
    let mut state = 1u32;
    let mut byte = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    let weights =
        [[(); STEPS * ROWS]; P].map(|panel| panel.map(|()| Vector([(); STEP].map(|()| byte()))));
    let acts = [[[(); STEP]; M]; STEPS].map(|step| step.map(|row| row.map(|()| byte())));
    let mut dots = [[s.splat_i32(0); M]; P];
    for n in 0..M {
        dots[P - 1][n] = s.splat_i32(-1000 * n as i32);
    }
    s.begin_products();
    // SAFETY: there are `STEPS` steps of weights and activations, and products have begun.
    unsafe {
        let from = weights.each_ref().map(|panel| panel.as_ptr().cast());
        s.product(from, acts.as_ptr().cast(), 0..STEPS * ROWS, &mut dots);
    }
    s.end_products();
    let right = |p: usize, n: usize, row: usize| {
        let products = (0..STEPS * STEP).map(|i| {
            let w = weights[p][i / 4].0[row * 4 + i % 4];
            i32::from(w) * i32::from(acts[i / STEP][n][i % STEP] as i8)
        });
        products.sum::<i32>() - if p == P - 1 { 1000 * n as i32 } else { 0 }
    };
    (0..P * M).all(|i| {
        let (p, n) = (i / M, i % M);
        let mut got = [0; LANES];
        s.store_i32(dots[p][n], &mut got);
        got == std::array::from_fn(|row| right(p, n, row))
    })
}
