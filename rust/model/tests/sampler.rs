//! Laws of the sampler.

use kbit_model::{LogProbs, Sampling, philox, uniform};
use kbit_tensor::Error;
use proptest::prelude::*;

fn softmax(logits: &[f32], temperature: f32) -> Vec<f64> {
    let scaled: Vec<f64> = logits.iter().map(|l| f64::from(l / temperature)).collect();
    let max = scaled.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let p: Vec<f64> = scaled.iter().map(|s| (s - max).exp()).collect();
    let sum: f64 = p.iter().sum();
    p.into_iter().map(|p| p / sum).collect()
}

/// Ids most likely first, ties to the lower id: another sort than the sampler's.
fn order(logits: &[f32]) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    ids.sort_by(|&a, &b| {
        logits[b as usize]
            .partial_cmp(&logits[a as usize])
            .unwrap()
            .then(a.cmp(&b))
    });
    ids
}

fn candidates(sampling: &Sampling, logits: &[f32]) -> Vec<(u32, f64)> {
    sampling.candidates(&mut logits.to_vec(), []).unwrap()
}

fn logits() -> impl Strategy<Value = Vec<f32>> {
    // Halves make ties common.
    prop::collection::vec((-20i32..20).prop_map(|v| v as f32 / 2.0), 1..200)
}

proptest! {
    #[test]
    fn unfiltered_probabilities_are_the_softmax(logits in logits(), temperature in 0.1f32..3.0) {
        let sampling = Sampling { temperature, ..Sampling::default() };
        let got = candidates(&sampling, &logits);
        let wanted = softmax(&logits, temperature);
        let sum: f64 = got.iter().map(|c| c.1).sum();
        prop_assert_eq!(got.iter().map(|c| c.0).collect::<Vec<_>>(), order(&logits));
        prop_assert!((wanted.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        for (id, p) in got {
            prop_assert!((p / sum - wanted[id as usize]).abs() < 1e-12);
        }
    }

    #[test]
    fn top_k_keeps_the_k_best(logits in logits(), k in 1usize..250) {
        let got = candidates(&Sampling { top_k: k, ..Sampling::default() }, &logits);
        prop_assert_eq!(got.len(), k.min(logits.len()));
        prop_assert_eq!(got.iter().map(|c| c.0).collect::<Vec<_>>(), &order(&logits)[..k.min(logits.len())]);
    }

    #[test]
    fn top_p_keeps_the_smallest_set_that_reaches_p(logits in logits(), p in 0.01f32..1.0) {
        let got = candidates(&Sampling { top_p: p, ..Sampling::default() }, &logits);
        let all = softmax(&logits, 1.0);
        let kept: Vec<f64> = got.iter().map(|c| all[c.0 as usize]).collect();
        let sum: f64 = kept.iter().sum();
        prop_assert!(sum >= f64::from(p) - 1e-9);
        prop_assert!(sum - kept[kept.len() - 1] < f64::from(p) + 1e-9);
        prop_assert_eq!(got.iter().map(|c| c.0).collect::<Vec<_>>(), &order(&logits)[..got.len()]);
    }

    #[test]
    fn min_p_keeps_those_likely_enough(logits in logits(), min_p in 0f32..1.0) {
        let got = candidates(&Sampling { min_p, ..Sampling::default() }, &logits);
        let all = softmax(&logits, 1.0);
        let best = all.iter().copied().fold(0.0, f64::max);
        let wanted = all.iter().filter(|&&p| p / best >= f64::from(min_p)).count();
        prop_assert_eq!(got.len(), wanted);
        prop_assert!(!got.is_empty());
    }

    #[test]
    fn filters_apply_in_order(logits in logits(), k in 1usize..50, p in 0.05f32..1.0, temperature in 0.2f32..2.0) {
        let both = Sampling { temperature, top_k: k, top_p: p, ..Sampling::default() };
        // Top-p after top-k sees only what top-k left.
        let left: Vec<f32> = order(&logits).iter().take(k).map(|&id| logits[id as usize]).collect();
        let wanted = candidates(&Sampling { temperature, top_p: p, ..Sampling::default() }, &left).len();
        prop_assert_eq!(candidates(&both, &logits).len(), wanted);
    }

    #[test]
    fn temperature_0_is_the_arg_max(logits in logits(), seed: u64, drawn: u64) {
        let greedy = Sampling { temperature: 0.0, seed, ..Sampling::default() };
        prop_assert_eq!(greedy.sample(&mut logits.clone(), [], drawn).unwrap(), order(&logits)[0]);
        // So is every way of leaving one candidate, and the limit of small temperatures.
        let one = Sampling { top_k: 1, seed, ..Sampling::default() };
        prop_assert_eq!(one.sample(&mut logits.clone(), [], drawn).unwrap(), order(&logits)[0]);
        let cold = Sampling { temperature: f32::MIN_POSITIVE, seed, ..Sampling::default() };
        let cold = cold.sample(&mut logits.clone(), [], drawn).unwrap();
        prop_assert_eq!(logits[cold as usize], logits[order(&logits)[0] as usize]);
    }

    #[test]
    fn seed_and_counter_decide_the_draw(logits in logits(), seed: u64, drawn in 0u64..1 << 40) {
        let sampling = Sampling { seed, ..Sampling::default() };
        let draw = |s: &Sampling, n| s.sample(&mut logits.clone(), [], n).unwrap();
        prop_assert_eq!(draw(&sampling, drawn), draw(&sampling, drawn));
        prop_assert_ne!(uniform(seed, drawn), uniform(seed, drawn + 1));
        prop_assert_ne!(uniform(seed, drawn), uniform(seed ^ 1, drawn));
    }

    #[test]
    fn a_penalty_touches_only_what_was_seen(logits in logits(), seen in prop::collection::vec(0u32..220, 0..20), penalty in 1.05f32..2.0) {
        let sampling = Sampling { repetition_penalty: penalty, ..Sampling::default() };
        let mut got = logits.clone();
        sampling.candidates(&mut got, seen.iter().copied().chain(seen.iter().copied())).unwrap();
        for (id, (&before, &after)) in logits.iter().zip(&got).enumerate() {
            let wanted = match seen.contains(&(id as u32)) {
                false => before,
                true if before < 0.0 => before * penalty,
                true => before / penalty,
            };
            prop_assert_eq!(after, wanted);
        }
    }

    #[test]
    fn log_probabilities_are_those_of_the_softmax(logits in logits(), n in 0usize..10) {
        let log = LogProbs::new(&logits);
        let wanted = softmax(&logits, 1.0);
        for (id, p) in wanted.iter().enumerate() {
            prop_assert!((f64::from(log.of(id as u32)) - p.ln()).abs() < 1e-5 * (1.0 + p.ln().abs()));
        }
        let top = log.top(n);
        prop_assert_eq!(top.iter().map(|t| t.0).collect::<Vec<_>>(), &order(&logits)[..n.min(logits.len())]);
        prop_assert!(top.iter().all(|&(id, p)| p == log.of(id)));
    }
}

#[test]
fn what_is_no_distribution_is_an_error() {
    let sampling = Sampling::default();
    for (logits, word) in [
        (vec![0.0, f32::NAN, 1.0], "token 1 is NaN"),
        (vec![0.0, f32::INFINITY], "token 1 is inf"),
        (vec![f32::NEG_INFINITY; 3], "every logit"),
        (vec![], "every logit"),
    ] {
        for temperature in [0.0, 1.0] {
            let error = Sampling {
                temperature,
                ..sampling
            }
            .sample(&mut logits.clone(), [], 0)
            .unwrap_err();
            assert!(
                matches!(&error, Error::Device(m) if m.contains(word)),
                "{error}"
            );
        }
    }
    // Masked tokens are never drawn.
    let mut masked = [f32::NEG_INFINITY; 50];
    masked[31] = -1000.0;
    for drawn in 0..100 {
        assert_eq!(sampling.sample(&mut masked.clone(), [], drawn).unwrap(), 31);
    }
}

#[test]
fn what_is_exactly_at_the_limit_stays() {
    let kept = |sampling: Sampling| candidates(&sampling, &[3.0, 1.0, 3.0, 3.0]).len();
    assert_eq!(
        kept(Sampling {
            min_p: 1.0,
            ..Sampling::default()
        }),
        3
    );
    assert_eq!(
        kept(Sampling {
            top_p: f32::MIN_POSITIVE,
            ..Sampling::default()
        }),
        1
    );
}

#[test]
fn draws_follow_the_distribution() {
    let logits: Vec<f32> = (0..20).map(|i| ((i * 7) % 20) as f32 / 5.0).collect();
    let (n, wanted) = (100_000u64, softmax(&logits, 0.8));
    let sampling = Sampling {
        temperature: 0.8,
        seed: 12345,
        ..Sampling::default()
    };
    let mut seen = [0f64; 20];
    for drawn in 0..n {
        seen[sampling.sample(&mut logits.clone(), [], drawn).unwrap() as usize] += 1.0;
    }
    let chi2: f64 = seen
        .iter()
        .zip(&wanted)
        .map(|(&s, &p)| (s - p * n as f64).powi(2) / (p * n as f64))
        .sum();
    // 19 degrees of freedom: above 49.3 once in ten thousand seeds.
    assert!(chi2 < 49.3, "chi-square {chi2}");
}

/// Known answers of the authors' Random123 library (kat_vectors, philox4x32 10).
#[test]
fn philox_gives_the_published_answers() {
    assert_eq!(
        philox([0; 4], [0; 2]),
        [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]
    );
    assert_eq!(
        philox([u32::MAX; 4], [u32::MAX; 2]),
        [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]
    );
    let (counter, key) = (
        [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344],
        [0xa4093822, 0x299f31d0],
    );
    assert_eq!(
        philox(counter, key),
        [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]
    );
}
