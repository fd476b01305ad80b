//! Sums and element functions: `docs/numerics.md`, sections 1 and 5.

use kbit_simd::{Isa, LANES, Simd, SimdOp, dispatch, math};
use kbit_tensor::program::Activation;

/// Section 1: 16 lanes, reduced by halves.
pub(super) fn lane_sum(values: impl IntoIterator<Item = f32>) -> f32 {
    let mut lanes = [0f32; 16];
    values
        .into_iter()
        .enumerate()
        .for_each(|(i, v)| lanes[i % 16] += v);
    reduce(lanes)
}

/// Section 1: the fma lane sum of `a * b`.
pub(super) fn lane_dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; 16];
    a.iter()
        .zip(b)
        .enumerate()
        .for_each(|(i, (a, b))| lanes[i % 16] = a.mul_add(*b, lanes[i % 16]));
    reduce(lanes)
}

fn reduce(mut lanes: [f32; 16]) -> f32 {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
    }
    lanes[0]
}

/// An element function.
#[derive(Clone, Copy)]
pub(super) enum Function {
    Exp,
    Tanh,
    Sigmoid,
    Act(Activation),
}

/// Section 5 is defined by the scalar code of `kbit_simd`; there is no second copy of its polynomials here.
struct Apply<'a>(Function, &'a mut [f32]);

impl SimdOp for Apply<'_> {
    type Output = ();

    fn eval<S: Simd>(self, s: S) {
        for part in self.1.chunks_mut(LANES) {
            let x = s.load_part(part);
            let y = match self.0 {
                Function::Exp => math::exp(s, x),
                Function::Tanh => math::tanh(s, x),
                Function::Sigmoid => math::sigmoid(s, x),
                Function::Act(act) => activation(s, act, x),
            };
            s.store_part(y, part);
        }
    }
}

fn activation<S: Simd>(s: S, act: Activation, x: S::F32) -> S::F32 {
    // The order of operands keeps NaN.
    let positive = |x| s.max(s.splat(0.0), x);
    match act {
        Activation::Identity => x,
        Activation::Silu => math::silu(s, x),
        Activation::Gelu => math::gelu(s, x),
        Activation::GeluTanh => math::gelu_tanh(s, x),
        Activation::QuickGelu => math::quick_gelu(s, x),
        Activation::Relu => positive(x),
        Activation::Relu2 => s.mul(positive(x), positive(x)),
    }
}

/// Of every element, in place.
pub(super) fn apply(function: Function, x: &mut [f32]) {
    dispatch(Isa::Scalar, Apply(function, x));
}

pub(super) fn exp(x: f32) -> f32 {
    let mut x = [x];
    apply(Function::Exp, &mut x);
    x[0]
}
