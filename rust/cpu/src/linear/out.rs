//! Where results of a matrix go, and what happens to them on the way: the epilogue, applied to sums that are still at hand.

use kbit_simd::{LANES, Simd, SimdOp};
use kbit_tensor::ROWS;
use kbit_tensor::program::Epilogue;

use crate::activation::finish;
use crate::norm::{load, store};

/// Rows of outputs: row t starts at `at + t * stride`, and `at` may lie before the memory whose rows or columns begin later.
#[derive(Clone, Copy)]
pub(crate) struct Target {
    pub(crate) at: *mut f32,
    pub(crate) stride: usize,
}

impl Target {
    /// The columns of a panel, `n` of them, in row `token`.
    ///
    /// # Safety
    /// They are inside the memory and belong to this thread; the slice must not outlive what it is for.
    #[inline(always)]
    unsafe fn part<'a>(self, token: usize, panel: usize, n: usize) -> &'a mut [f32] {
        let at = self.at.wrapping_add(token * self.stride + panel * ROWS);
        // SAFETY: as the caller says.
        unsafe { std::slice::from_raw_parts_mut(at, n) }
    }
}

/// What happens to outputs before they are stored.
#[derive(Clone, Copy)]
pub(crate) struct Finish<'a> {
    pub(crate) epilogue: Epilogue,
    /// (`out_features`,).
    pub(crate) bias: Option<&'a [f32]>,
}

impl Finish<'_> {
    /// Nothing.
    pub(crate) const STORE: Self = Self {
        epilogue: Epilogue::Store,
        bias: None,
    };
}

/// The output of a matrix: output feature r is number r of a row.
#[derive(Clone, Copy)]
pub(super) struct Out<'a> {
    to: Target,
    rows: usize,
    finish: Finish<'a>,
}

impl<'a> Out<'a> {
    /// Of a matrix of so many rows.
    pub(super) fn new(to: Target, rows: usize, finish: Finish<'a>) -> Self {
        let bias = finish.bias.map_or(rows, <[f32]>::len);
        assert_eq!(bias, rows, "a bias for each row");
        Self { to, rows, finish }
    }

    /// Finishes and stores the results of a panel for the tokens from `first` on.
    ///
    /// # Safety
    /// As [`Matrix::run`](super::Matrix::run).
    #[inline(always)]
    pub(super) unsafe fn put<S: Simd>(self, s: S, first: usize, panel: usize, y: &[S::F32]) {
        let n = ROWS.min(self.rows - panel * ROWS);
        if self.finish.epilogue == Epilogue::Store && self.finish.bias.is_none() {
            for (token, &y) in y.iter().enumerate() {
                // SAFETY: as the caller says.
                store(s, y, unsafe { self.to.part(first + token, panel, n) });
            }
        } else {
            let out = self;
            s.run(Put {
                s,
                out,
                first,
                panel,
                n,
                y,
            });
        }
    }
}

/// [`Out::put`] with an epilogue, which exists once for all kernels.
struct Put<'a, S: Simd> {
    s: S,
    out: Out<'a>,
    first: usize,
    panel: usize,
    n: usize,
    y: &'a [S::F32],
}

impl<S: Simd> SimdOp for Put<'_, S> {
    type Output = ();
    #[inline(always)]
    fn eval<T: Simd>(self, _: T) {
        let Self {
            s,
            out,
            first,
            panel,
            n,
            y,
        } = self;
        let Finish { epilogue, bias } = out.finish;
        let bias = bias.map(|bias| load(s, &bias[panel * ROWS..panel * ROWS + n]));
        for (token, &y) in y.iter().enumerate() {
            let token = first + token;
            let y = bias.map_or(y, |bias| s.add(y, bias));
            // SAFETY: `Matrix::run` has these places to itself.
            let to = unsafe { out.to.part(token, panel, n) };
            store(s, finish(s, epilogue, y, || load(s, to)), to);
        }
    }
}

const _: () = assert!(LANES == ROWS, "a panel is a vector of outputs");
