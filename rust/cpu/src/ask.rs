//! Asking for memory before it is read.

use kbit_simd::{Isa, Simd, SimdOp, dispatch};

const LINE: usize = 64;

/// Asks for the lines of `n` bytes, into the second cache. They need not be there: nothing is read.
pub(crate) fn ask(isa: Isa, at: *const u8, n: usize) {
    dispatch(isa, Ask { at, n });
}

struct Ask {
    at: *const u8,
    n: usize,
}

impl SimdOp for Ask {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        ask_with(s, self.at, self.n);
    }
}

/// [`ask`] where the instruction set is known.
#[inline(always)]
pub(crate) fn ask_with<S: Simd>(s: S, at: *const u8, n: usize) {
    for line in (0..n).step_by(LINE) {
        s.prefetch_far(at.wrapping_add(line));
    }
}
