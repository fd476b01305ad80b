//! Sums and element functions: `docs/numerics.md`, sections 1 and 5.

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

pub(super) fn exp(x: f32) -> f32 {
    libm::exp(f64::from(x)) as f32
}

pub(super) fn tanh(x: f32) -> f32 {
    libm::tanh(f64::from(x)) as f32
}

pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

fn erf(x: f32) -> f32 {
    libm::erf(f64::from(x)) as f32
}

pub(super) fn activate(act: Activation, x: f32) -> f32 {
    match act {
        Activation::Identity => x,
        Activation::Silu => x * sigmoid(x),
        Activation::Gelu => 0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2)),
        Activation::GeluTanh => 0.5 * x * (1.0 + tanh(0.797_884_6 * (x + 0.044_715 * x * x * x))),
        Activation::QuickGelu => x * sigmoid(1.702 * x),
        Activation::Relu => x.max(0.0),
        Activation::Relu2 => x.max(0.0) * x.max(0.0),
    }
}
