//! [`RopeSpec`] to frequencies: the formulas of the six rope types, in the f32 steps that trained checkpoints assume.
//!
//! Powers are taken in f64 of f32 operands and rounded once, so that each is the f32 nearest to the exact value.

use std::f64::consts::PI;

use kbit_tensor::program::{LongRope, Rope};
use kbit_tensor::{Error, Result};

use crate::spec::RopeSpec;

/// The rotary table of one [`RopeSpec`].
///
/// `context`: positions a sequence may have; `max_positions`: the model's `max_position_embeddings`.
///
/// # Errors
/// [`Error::Unsupported`] for unknown types, [`Error::Format`] for fields that are missing or out of range.
pub fn rope(spec: &RopeSpec, max_positions: usize, context: usize) -> Result<Rope> {
    let original = spec
        .original_max_position_embeddings
        .unwrap_or(max_positions);
    if !(spec.rope_theta.is_finite() && spec.rope_theta > 1.0) {
        return Err(wrong(
            spec,
            &format!(
                "rope_theta must be finite and above 1, is {}",
                spec.rope_theta
            ),
        ));
    }
    if original == 0 {
        return Err(wrong(
            spec,
            "original_max_position_embeddings must be at least 1, is 0",
        ));
    }
    let plain = |inv_freq| {
        Ok(Rope {
            inv_freq,
            scale: 1.0,
            long: None,
        })
    };
    let divided = |theta| {
        powers(theta, spec.rotary_dim)
            .into_iter()
            .map(|p| 1.0 / p)
            .collect::<Vec<f32>>()
    };
    match spec.rope_type.as_str() {
        "default" => plain(divided(spec.rope_theta)),
        "linear" => {
            let factor = need(spec, "factor", spec.factor)? as f32;
            plain(
                divided(spec.rope_theta)
                    .into_iter()
                    .map(|f| f / factor)
                    .collect(),
            )
        }
        "dynamic" => dynamic(spec, original, context, divided),
        "llama3" => plain(llama3(spec, original, divided(spec.rope_theta))?),
        "yarn" => yarn(spec, original, max_positions),
        "longrope" => longrope(spec, original, max_positions),
        other => Err(Error::Unsupported(format!(
            "rope_type '{other}': kbit knows default, linear, dynamic, yarn, llama3 and longrope"
        ))),
    }
}

fn wrong(spec: &RopeSpec, what: &str) -> Error {
    Error::Format(format!("rope of type '{}': {what}", spec.rope_type))
}

/// A field that the type cannot do without; finite and positive.
fn need(spec: &RopeSpec, name: &str, value: Option<f64>) -> Result<f64> {
    match value {
        Some(v) if v.is_finite() && v > 0.0 => Ok(v),
        Some(v) => Err(wrong(
            spec,
            &format!("{name} must be finite and positive, is {v}"),
        )),
        None => Err(wrong(spec, &format!("{name} is missing"))),
    }
}

/// `theta ^ (2 j / dim)` for every pair j.
fn powers(theta: f64, dim: usize) -> Vec<f32> {
    let theta = f64::from(theta as f32);
    (0..dim / 2)
        .map(|j| libm::pow(theta, f64::from((2 * j) as f32 / dim as f32)) as f32)
        .collect()
}

/// NTK scaling by the length of the sequence. A runner knows two tables, not one a length: a sequence that is planned to
/// pass the original context uses the base for the whole context from its first token on.
fn dynamic(
    spec: &RopeSpec,
    original: usize,
    context: usize,
    divided: impl Fn(f64) -> Vec<f32>,
) -> Result<Rope> {
    let factor = need(spec, "factor", spec.factor)?;
    let dim = spec.rotary_dim as f64;
    let mut rope = Rope {
        inv_freq: divided(spec.rope_theta),
        scale: 1.0,
        long: None,
    };
    if context > original && spec.rotary_dim > 2 {
        let stretch = factor * context as f64 / original as f64 - (factor - 1.0);
        let theta = spec.rope_theta * libm::pow(stretch, dim / (dim - 2.0));
        rope.long = Some(LongRope {
            original,
            inv_freq: divided(theta),
            scale: 1.0,
        });
    }
    Ok(rope)
}

fn llama3(spec: &RopeSpec, original: usize, inv_freq: Vec<f32>) -> Result<Vec<f32>> {
    let factor = need(spec, "factor", spec.factor)? as f32;
    let low = need(spec, "low_freq_factor", spec.low_freq_factor)?;
    let high = need(spec, "high_freq_factor", spec.high_freq_factor)?;
    if high <= low {
        return Err(wrong(
            spec,
            &format!("high_freq_factor {high} must be above low_freq_factor {low}"),
        ));
    }
    let (low_wave, high_wave) = (
        (original as f64 / low) as f32,
        (original as f64 / high) as f32,
    );
    let scaled = |f: f32| {
        let wave = (2.0 * PI) as f32 / f;
        if wave > low_wave {
            f / factor
        } else if wave < high_wave {
            f
        } else {
            let smooth = (original as f32 / wave - low as f32) / (high - low) as f32;
            (1.0 - smooth) * f / factor + smooth * f
        }
    };
    Ok(inv_freq.into_iter().map(scaled).collect())
}

fn yarn(spec: &RopeSpec, original: usize, max_positions: usize) -> Result<Rope> {
    let factor = match spec.factor {
        None => max_positions as f64 / original as f64,
        given => need(spec, "factor", given)?,
    };
    let mscale = |m: f64| {
        if factor <= 1.0 {
            1.0
        } else {
            0.1 * m * libm::log(factor) + 1.0
        }
    };
    let scale = match (spec.attention_factor, spec.mscale, spec.mscale_all_dim) {
        (Some(given), ..) => given,
        (None, Some(m), Some(all)) if m != 0.0 && all != 0.0 => mscale(m) / mscale(all),
        _ => mscale(1.0),
    };
    let (dim, log_theta) = (spec.rotary_dim as f64, libm::log(spec.rope_theta));
    // The dimension whose wave turns `rotations` times within the original context.
    let turns = |rotations: f64| {
        dim * libm::log(original as f64 / (rotations * 2.0 * PI)) / (2.0 * log_theta)
    };
    let set = |v: Option<f64>, default: f64| v.filter(|&v| v != 0.0).unwrap_or(default);
    let (mut low, mut high) = (
        turns(set(spec.beta_fast, 32.0)),
        turns(set(spec.beta_slow, 1.0)),
    );
    if spec.truncate.unwrap_or(true) {
        (low, high) = (low.floor(), high.ceil());
    }
    (low, high) = (low.max(0.0), high.min(dim - 1.0));
    if low == high {
        high += 0.001;
    }
    let blend = |(j, power): (usize, f32)| {
        let ramp = ((j as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
        let keep = 1.0 - ramp;
        1.0 / (factor as f32 * power) * (1.0 - keep) + 1.0 / power * keep
    };
    let inv_freq = powers(spec.rope_theta, spec.rotary_dim)
        .into_iter()
        .enumerate()
        .map(blend)
        .collect();
    Ok(Rope {
        inv_freq,
        scale: scale as f32,
        long: None,
    })
}

fn longrope(spec: &RopeSpec, original: usize, max_positions: usize) -> Result<Rope> {
    let factor = match spec.factor {
        None => max_positions as f64 / original as f64,
        given => need(spec, "factor", given)?,
    };
    let scale = match spec.attention_factor {
        Some(given) => given,
        None if factor <= 1.0 || original < 2 => 1.0,
        None => libm::sqrt(1.0 + libm::log(factor) / libm::log(original as f64)),
    } as f32;
    let table = |name: &str, factors: &Option<Vec<f64>>| {
        let factors = factors
            .as_ref()
            .ok_or_else(|| wrong(spec, &format!("{name} is missing")))?;
        if factors.len() != spec.rotary_dim / 2 {
            let what = format!(
                "{name} wants {} entries (rotary_dim / 2), has {}",
                spec.rotary_dim / 2,
                factors.len()
            );
            return Err(wrong(spec, &what));
        }
        let powers = powers(spec.rope_theta, spec.rotary_dim);
        Ok(factors
            .iter()
            .zip(powers)
            .map(|(&f, p)| 1.0 / (f as f32 * p))
            .collect::<Vec<f32>>())
    };
    let long = LongRope {
        original,
        inv_freq: table("long_factor", &spec.long_factor)?,
        scale,
    };
    Ok(Rope {
        inv_freq: table("short_factor", &spec.short_factor)?,
        scale,
        long: Some(long),
    })
}
