//! The engine over the reference device: same tokens alone and in a batch, cancellation, failure, memory.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::engine;
use kbit_model::{Engine, Finish, Generate, PassKind, Request, Sampling, Token};
use kbit_tensor::Error;
use kbit_tensor::program::{Output, Part, Runner, SequenceId, Want};

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
            since.elapsed() < Duration::from_mins(1),
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
        logprobs: i.is_multiple_of(4).then_some(3),
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

#[test]
fn passes_and_requests_mix() {
    let engine = engine(4, 0);
    let text = prompt(3, 40);
    let forward = |ids: &[u32]| {
        let pass = engine
            .pass(
                ids.to_vec(),
                PassKind::Forward {
                    hidden: true,
                    attentions: true,
                },
            )
            .unwrap();
        pass.wait(Duration::from_mins(1)).unwrap().unwrap()
    };
    let whole = forward(&text);
    assert_eq!(
        (
            whole.logits.len(),
            whole.hidden.len(),
            whole.attentions.len()
        ),
        (40 * 50, 3, 2)
    );
    assert!(whole.hidden.iter().all(|h| h.len() == 40 * 32));
    // Causality: a prefix gives the same rows, bit for bit.
    assert_eq!(forward(&text[..17]).logits, whole.logits[..17 * 50]);
    // Rows of attention weights sum to 1 and look at nothing later.
    for weights in &whole.attentions {
        assert_eq!(weights.len(), 4 * 40 * 40);
        for (i, row) in weights.chunks_exact(40).enumerate() {
            assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-5);
            assert!(row[i % 40 + 1..].iter().all(|&w| w == 0.0));
        }
    }
    // The greedy token is the arg-max of the last row, and its log-probability the score of the same pass.
    let request = engine
        .submit(Generate {
            logprobs: Some(2),
            ..generate(text.clone(), 1)
        })
        .unwrap();
    let token = all(&request).unwrap().remove(0);
    let last = &whole.logits[39 * 50..];
    assert!(last.iter().all(|&v| v <= last[token.id as usize]));
    let longer: Vec<u32> = text.iter().copied().chain([token.id]).collect();
    let score = |start| {
        engine
            .pass(longer.clone(), PassKind::Score { start })
            .unwrap()
            .wait(Duration::from_mins(1))
    };
    let scores = score(1).unwrap().unwrap().logprobs;
    assert_eq!((scores.len(), scores[39]), (40, token.logprob.unwrap()));
    assert_eq!(token.top[0], (token.id, token.logprob.unwrap()));
    assert_eq!(score(31).unwrap().unwrap().logprobs, scores[30..]);
}

#[test]
fn requests_end_where_they_should() {
    let engine = engine(2, 0);
    let greedy = ids(&engine, generate(prompt(1, 9), 30));
    let eos = greedy[6];
    let until = greedy.iter().position(|&id| id == eos).unwrap();
    let request = engine
        .submit(Generate {
            eos: vec![eos],
            ..generate(prompt(1, 9), 30)
        })
        .unwrap();
    assert_eq!(all(&request).unwrap().last().unwrap().id, eos);
    assert_eq!(request.finish(), Some(Finish::Stop));
    assert!(request.prompt_seconds() > 0.0 && (until == 0 || request.decode_seconds() > 0.0));
    let request = engine.submit(generate(prompt(1, 60), usize::MAX)).unwrap();
    assert_eq!(
        (all(&request).unwrap().len(), request.finish()),
        (4, Some(Finish::Context))
    );
    let request = engine.submit(generate(prompt(1, 60), 0)).unwrap();
    assert_eq!(
        (all(&request).unwrap().len(), request.finish()),
        (0, Some(Finish::Length))
    );
}

#[test]
fn bad_arguments_name_both_sides() {
    let engine = engine(2, 0);
    let refused = |g: Generate| {
        engine
            .submit(g)
            .err()
            .map(|e| e.to_string())
            .unwrap_or_default()
    };
    assert_eq!(
        refused(generate(vec![], 1)),
        "a prompt needs at least one token, has 0"
    );
    assert_eq!(
        refused(generate(vec![1, 50], 1)),
        "token id 50 at 1 is outside the vocabulary of 50"
    );
    assert_eq!(
        refused(generate(prompt(0, 64), 1)),
        "a prompt of 64 tokens leaves no room in a context of 64"
    );
    for (field, sampling) in [
        (
            "temperature",
            Sampling {
                temperature: -1.0,
                ..Sampling::default()
            },
        ),
        (
            "temperature",
            Sampling {
                temperature: f32::NAN,
                ..Sampling::default()
            },
        ),
        (
            "top_p",
            Sampling {
                top_p: 0.0,
                ..Sampling::default()
            },
        ),
        (
            "min_p",
            Sampling {
                min_p: 1.5,
                ..Sampling::default()
            },
        ),
        (
            "repetition_penalty",
            Sampling {
                repetition_penalty: 0.0,
                ..Sampling::default()
            },
        ),
    ] {
        let message = refused(Generate {
            sampling,
            ..generate(vec![1], 1)
        });
        assert!(message.starts_with(field), "{message}");
    }
    let pass = |ids, start| {
        engine
            .pass(ids, PassKind::Score { start })
            .err()
            .map(|e| e.to_string())
            .unwrap_or_default()
    };
    assert_eq!(pass(vec![1, 2], 2), "start must be 1..2 for 2 ids, is 2");
    assert_eq!(pass(vec![1, 2], 0), "start must be 1..2 for 2 ids, is 0");
    assert!(matches!(
        engine.pass(prompt(0, 65), PassKind::Score { start: 1 }),
        Err(Error::ContextOverflow(_))
    ));
}

#[test]
fn a_full_cache_makes_the_youngest_wait_and_changes_no_token() {
    let expected: Vec<Vec<u32>> = (0..6)
        .map(|i| ids(&engine(1, 0), generate(prompt(i, 20), 25)))
        .collect();
    // 256 bytes a token (2 layers, 2 heads of 8, keys and values in f32): room for 100 tokens, six requests want 270.
    let engine = engine(6, 100 * 256);
    let requests: Vec<Request> = (0..6)
        .map(|i| engine.submit(generate(prompt(i, 20), 25)).unwrap())
        .collect();
    let got: Vec<Vec<u32>> = requests
        .iter()
        .map(|r| all(r).unwrap().iter().map(|t| t.id).collect())
        .collect();
    assert_eq!(got, expected);
    assert!(engine.stats().preemptions > 0);
    // Alone and still too long: its own error, and the engine goes on.
    let engine = common::engine(6, 30 * 256);
    let (long, short) = (generate(prompt(0, 20), 25), generate(prompt(1, 20), 5));
    let (long, short) = (engine.submit(long).unwrap(), engine.submit(short).unwrap());
    assert!(matches!(all(&long), Err(Error::Memory(_))));
    assert_eq!(all(&short).unwrap().len(), 5);
}

#[test]
fn cancelling_ends_one_and_spares_the_others() {
    let engine = engine(8, 0);
    let expected = ids(&engine, generate(prompt(2, 10), 40));
    let requests: Vec<Request> = (0..8)
        .map(|_| engine.submit(generate(prompt(2, 10), 40)).unwrap())
        .collect();
    for request in &requests[1..] {
        request.cancel();
    }
    assert_eq!(
        all(&requests[0])
            .unwrap()
            .iter()
            .map(|t| t.id)
            .collect::<Vec<_>>(),
        expected
    );
    for request in &requests[1..] {
        let tokens = all(request).unwrap();
        assert!(expected.starts_with(&tokens.iter().map(|t| t.id).collect::<Vec<_>>()));
        assert!(tokens.len() == 40 || request.finish() == Some(Finish::Cancelled));
    }
    // A handle that is dropped cancels, whether it runs or waits.
    drop(
        (0..50)
            .map(|_| engine.submit(generate(prompt(2, 10), 50)).unwrap())
            .collect::<Vec<_>>(),
    );
    let since = Instant::now();
    while engine.stats().running + engine.stats().waiting > 0 || engine.stats().cache_bytes > 0 {
        assert!(
            since.elapsed() < Duration::from_secs(20),
            "cancelled work stays"
        );
        std::thread::yield_now();
    }
}

/// What goes wrong when token 49 is in a step.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    Error,
    Panic,
    Hang,
    Nan,
}

/// A runner whose `run` is something else: `run(inner, batch, want, cancel)`.
struct Wrapped<F>(Box<dyn Runner>, F);

impl<F> Runner for Wrapped<F>
where
    F: FnMut(&mut dyn Runner, &[Part<'_>], Want, &AtomicBool) -> kbit_tensor::Result<Output> + Send,
{
    fn open(&mut self, planned: usize) -> kbit_tensor::Result<SequenceId> {
        self.0.open(planned)
    }
    fn close(&mut self, sequence: SequenceId) {
        self.0.close(sequence);
    }
    fn len(&self, sequence: SequenceId) -> usize {
        self.0.len(sequence)
    }
    fn truncate(&mut self, sequence: SequenceId, len: usize) {
        self.0.truncate(sequence, len);
    }
    fn fork(&mut self, sequence: SequenceId, planned: usize) -> kbit_tensor::Result<SequenceId> {
        self.0.fork(sequence, planned)
    }
    fn run(
        &mut self,
        batch: &[Part<'_>],
        want: Want,
        cancel: &AtomicBool,
    ) -> kbit_tensor::Result<Output> {
        (self.1)(&mut *self.0, batch, want, cancel)
    }
    fn cache_bytes(&self) -> usize {
        self.0.cache_bytes()
    }
    fn threads(&self) -> usize {
        1
    }
}

fn faulty(fault: Fault) -> Engine {
    faulty_engine(fault, 8, 64)
}

fn faulty_engine(fault: Fault, max_batch: usize, max_waiting: usize) -> Engine {
    let spec = common::spec();
    let (program, runner) = common::runner(&spec, &common::shapes(&spec), 0);
    let run = move |inner: &mut dyn Runner, batch: &[Part<'_>], want: Want, cancel: &AtomicBool| {
        let bad = |p: &Part<'_>| p.ids.contains(&49);
        match fault {
            _ if !batch.iter().any(bad) => {}
            Fault::Error => return Err(Error::Device("token 49".into())),
            Fault::Panic => panic!("token 49"),
            Fault::Hang => {
                while !cancel.load(Ordering::Relaxed) {
                    std::thread::yield_now();
                }
                return Err(Error::Cancelled);
            }
            Fault::Nan => {}
        }
        let mut output = inner.run(batch, want, cancel)?;
        // Every part of these tests is a whole prompt, so its row is its place.
        let bad = batch.iter().enumerate().filter(|(_, p)| bad(p));
        for (row, _) in bad {
            output.argmax[row] = u32::MAX;
            if want.logits {
                output.logits[row * 50 + 7] = f32::NAN;
            }
        }
        Ok(output)
    };
    let runner = Box::new(Wrapped(runner, run));
    Engine::new(&program, runner, max_batch, max_waiting).unwrap()
}

/// Ids that stay away from 49.
fn good(n: u32) -> Vec<u32> {
    (0..n).map(|i| i * 7 % 49).collect()
}

#[test]
fn an_error_belongs_to_its_request() {
    for fault in [Fault::Error, Fault::Nan] {
        let engine = faulty(fault);
        // One token each, so that no generated 49 disturbs.
        let one = |ids, temperature| {
            let sampling = Sampling {
                temperature,
                ..Sampling::default()
            };
            engine
                .submit(Generate {
                    sampling,
                    ..generate(ids, 1)
                })
                .unwrap()
        };
        let requests: Vec<Request> = (0..8)
            .map(|i| {
                one(
                    if i % 3 == 1 { vec![1, 49] } else { good(4) },
                    (i % 2) as f32,
                )
            })
            .collect();
        for (i, request) in requests.iter().enumerate() {
            match all(request) {
                Ok(tokens) => assert!(i % 3 != 1 && tokens.len() == 1),
                Err(e) => assert!(i % 3 == 1 && matches!(e, Error::Device(_)), "{i}: {e}"),
            }
            // Asking again gives the same answer.
            assert_eq!(request.wait(Duration::ZERO).is_err(), i % 3 == 1);
        }
        assert_eq!(engine.stats().cache_bytes, 0);
    }
}

#[test]
fn a_panic_ends_everything_with_an_error() {
    let engine = faulty(Fault::Panic);
    let requests: Vec<Request> = (0..3)
        .map(|_| engine.submit(generate(vec![1, 49], 5)).unwrap())
        .collect();
    for request in &requests {
        let error = all(request).unwrap_err();
        assert!(
            matches!(&error, Error::Device(m) if m.contains("token 49")),
            "{error}"
        );
    }
    assert!(
        matches!(engine.submit(generate(good(3), 1)), Err(Error::Device(m)) if m.contains("token 49"))
    );
    engine.close();
}

#[test]
fn a_long_operation_is_left_at_once() {
    let engine = faulty(Fault::Hang);
    let hanging = engine.submit(generate(vec![1, 49], 5)).unwrap();
    assert_eq!(
        hanging.wait(Duration::from_millis(30)).unwrap(),
        Some(vec![])
    );
    let since = Instant::now();
    hanging.cancel();
    assert_eq!(
        (all(&hanging).unwrap(), hanging.finish()),
        (vec![], Some(Finish::Cancelled))
    );
    // So does closing, and dropping the engine while handles live.
    let hanging = engine.submit(generate(vec![1, 49], 5)).unwrap();
    let pass = engine
        .pass(vec![1, 49], PassKind::Score { start: 1 })
        .unwrap();
    let waiting: Vec<Request> = (0..20)
        .map(|_| engine.submit(generate(good(5), 5)).unwrap())
        .collect();
    drop(engine);
    assert!(matches!(all(&hanging), Err(Error::Device(_))));
    assert!(matches!(
        pass.wait(Duration::from_mins(1)),
        Err(Error::Device(_))
    ));
    assert!(
        waiting
            .iter()
            .all(|r| matches!(all(r), Err(Error::Device(_)) | Ok(_)))
    );
    assert!(since.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_long_prompt_stalls_nobody() {
    let mut spec = common::spec();
    spec.max_position_embeddings = 4096;
    let (program, runner) = common::runner(&spec, &common::shapes(&spec), 0);
    let steps = Arc::new(Mutex::new(Vec::new()));
    let seen = steps.clone();
    let run = move |inner: &mut dyn Runner, batch: &[Part<'_>], want: Want, cancel: &AtomicBool| {
        let counts: Vec<usize> = batch.iter().map(|p| p.ids.len()).collect();
        seen.lock().unwrap().push(counts);
        inner.run(batch, want, cancel)
    };
    let engine = Engine::new(&program, Box::new(Wrapped(runner, run)), 4, 64).unwrap();
    let running = engine.submit(generate(prompt(0, 5), 400)).unwrap();
    while running
        .wait(Duration::from_millis(10))
        .unwrap()
        .is_some_and(|t| t.is_empty())
    {}
    let long = engine.submit(generate(prompt(1, 1500), 1)).unwrap();
    let pass = engine
        .pass(prompt(3, 1200), PassKind::Score { start: 1 })
        .unwrap();
    while steps.lock().unwrap().iter().all(|s| s.len() < 2) {
        std::thread::yield_now();
    }
    // Beside a long prompt a short one takes its share at once, and the one that runs gets a token a step.
    let short = engine.submit(generate(prompt(2, 60), 3)).unwrap();
    assert_eq!(all(&short).unwrap().len(), 3);
    assert_eq!(
        long.wait(Duration::ZERO).unwrap(),
        Some(vec![]),
        "the long prompt was done first"
    );
    assert_eq!(all(&long).unwrap().len(), 1);
    assert!(pass.wait(Duration::from_mins(1)).unwrap().is_some());
    drop(running);
    let steps = steps.lock().unwrap();
    let mixed: Vec<&Vec<usize>> = steps.iter().filter(|s| s.len() > 1).collect();
    assert!(mixed.len() >= 1500 / 128);
    let prompts = |s: &[usize]| s.iter().filter(|&&n| n > 1).sum::<usize>();
    assert!(
        mixed.iter().all(|s| s[0] == 1 && prompts(s) <= 128),
        "{mixed:?}"
    );
    // Passes and requests take turns.
    assert!(
        steps
            .windows(2)
            .any(|w| w[0].len() > 1 && w[1].len() == 1 && w[1][0] > 128)
    );
}

#[test]
fn more_waiting_than_may_is_refused_until_one_has_left() {
    let engine = faulty_engine(Fault::Hang, 1, 3);
    let hanging = engine.submit(generate(vec![49], 1)).unwrap();
    while engine.stats().running == 0 {
        std::thread::yield_now();
    }
    let first = engine.submit(generate(good(5), 2)).unwrap();
    let second = engine.submit(generate(good(6), 2)).unwrap();
    let third = engine.submit(generate(good(7), 2)).unwrap();
    assert_eq!(engine.stats().waiting, 3);
    let refused = [
        engine.submit(generate(good(8), 2)).err(),
        engine.pass(good(8), PassKind::Score { start: 1 }).err(),
    ];
    for error in refused {
        match error {
            Some(Error::Memory(message)) => assert!(
                message.starts_with("3 requests wait for a place and at most 3 may"),
                "{message}"
            ),
            other => panic!("{other:?}"),
        }
    }
    // Nothing that was accepted suffers, and there is room again.
    drop(hanging);
    for request in [first, second, third] {
        assert_eq!(all(&request).unwrap().len(), 2);
    }
    let fourth = engine.submit(generate(good(8), 2)).unwrap();
    assert_eq!(all(&fourth).unwrap().len(), 2);
}
