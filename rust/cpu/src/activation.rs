//! Epilogues: what happens to finished outputs of a matrix before they are stored.

use kbit_simd::{Simd, math};
use kbit_tensor::program::{Activation, Epilogue};

/// One of the element-wise activations.
#[inline(always)]
pub(crate) fn activate<S: Simd>(s: S, act: Activation, x: S::F32) -> S::F32 {
    let zero = s.splat(0.0);
    match act {
        Activation::Identity => x,
        Activation::Silu => math::silu(s, x),
        Activation::Gelu => math::gelu(s, x),
        Activation::GeluTanh => math::gelu_tanh(s, x),
        Activation::QuickGelu => math::quick_gelu(s, x),
        // The order of operands keeps NaN.
        Activation::Relu => s.max(zero, x),
        Activation::Relu2 => {
            let x = s.max(zero, x);
            s.mul(x, x)
        }
    }
}

/// `y` to an output whose old value is `old`: what it is added to, or the gate of a gated epilogue.
#[inline(always)]
pub(crate) fn finish<S: Simd>(
    s: S,
    epilogue: Epilogue,
    y: S::F32,
    old: impl FnOnce() -> S::F32,
) -> S::F32 {
    match epilogue {
        Epilogue::Store => y,
        Epilogue::Act(act) => activate(s, act, y),
        Epilogue::Gated(act) => s.mul(activate(s, act, old()), y),
        Epilogue::GatedClamped { alpha, limit } => {
            let (low, high, one) = (s.splat(-limit), s.splat(limit), s.splat(1.0));
            let g = s.min(high, old());
            let u = s.min(high, s.max(low, y));
            s.mul(
                s.mul(g, math::sigmoid(s, s.mul(s.splat(alpha), g))),
                s.add(u, one),
            )
        }
        Epilogue::AddTo { scale: 1.0 } => s.add(old(), y),
        Epilogue::AddTo { scale } => s.add(old(), s.mul(s.splat(scale), y)),
    }
}

/// Whether an epilogue takes a gate and an up matrix.
pub(crate) fn is_gated(epilogue: Epilogue) -> bool {
    matches!(epilogue, Epilogue::Gated(_) | Epilogue::GatedClamped { .. })
}
