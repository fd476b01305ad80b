//! The engine over the reference device: same tokens alone and in a batch, cancellation, failure, memory.

mod common;

use std::time::{Duration, Instant};

use common::engine;
use kbit_model::{Engine, Finish, Generate, PassKind, Request, Sampling, Token};
use kbit_tensor::Error;

fn prompt(seed: u32, n: usize) -> Vec<u32> {
    (0..n as u32)
        .map(|i| (seed.wrapping_mul(17).wrapping_add(i * i * 3 + i)) % 50)
        .collect()
}

fn generate(ids: Vec<u32>, n: usize) -> Generate {
    Generate {
        ids,
        max_new_tokens: n,
        sampling: Sampling {
            temperature: 0.0,
            ..Sampling::default()
        },
        eos: vec![],
        logprobs: None,
    }
}

fn all(request: &Request) -> Result<Vec<Token>, Error> {
    let (mut tokens, since) = (Vec::new(), Instant::now());
    while let Some(new) = request.wait(Duration::from_millis(50))? {
        tokens.extend(new);
        assert!(
            since.elapsed() < Duration::from_secs(60),
            "hangs after {} tokens",
            tokens.len()
        );
    }
    Ok(tokens)
}

fn ids(engine: &Engine, g: Generate) -> Vec<u32> {
    all(&engine.submit(g).unwrap())
        .unwrap()
        .into_iter()
        .map(|t| t.id)
        .collect()
}

/// Requests of every kind: greedy, sampled, penalised, with log-probabilities.
fn mixed(i: u32) -> Generate {
    let sampling = Sampling {
        temperature: [0.0, 1.0, 0.7][i as usize % 3],
        top_k: [0, 5][i as usize % 2],
        repetition_penalty: [1.0, 1.3][i as usize / 3 % 2],
        seed: u64::from(i),
        ..Sampling::default()
    };
    Generate {
        sampling,
        logprobs: (i % 4 == 0).then_some(3),
        ..generate(prompt(i, 1 + i as usize * 5 % 30), 12)
    }
}

#[test]
fn a_batch_gives_the_tokens_of_each_alone() {
    let engine = engine(5, 0);
    let alone: Vec<Vec<Token>> = (0..24)
        .map(|i| all(&engine.submit(mixed(i)).unwrap()).unwrap())
        .collect();
    let together: Vec<Vec<Token>> = std::thread::scope(|s| {
        let threads: Vec<_> = (0..24)
            .map(|i| {
                s.spawn({
                    let engine = &engine;
                    move || all(&engine.submit(mixed(i)).unwrap()).unwrap()
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert_eq!(alone, together);
    assert!(alone.iter().all(|t| t.len() == 12));
    let stats = engine.stats();
    assert_eq!(
        (
            stats.generated_tokens,
            stats.running,
            stats.waiting,
            stats.cache_bytes
        ),
        (2 * 24 * 12, 0, 0, 0)
    );
    let prompts: usize = (0..24).map(|i| mixed(i).ids.len()).sum();
    assert_eq!(stats.prompt_tokens, 2 * prompts as u64);
}
