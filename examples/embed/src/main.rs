//! Continues token ids with a saved model: `kbit-embed DIRECTORY NEW_TOKENS ID...` prints the new ids.
//!
//! `kbit quantize SRC DIRECTORY --bits 4` makes such a model; a tokenizer of your choice turns text into ids and back.

use std::error::Error;
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use kbit_model::{Engine, EngineOptions, Generate, Sampling};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("kbit-embed: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, new_tokens, ids @ ..] = arguments.as_slice() else {
        return Err("usage: kbit-embed DIRECTORY NEW_TOKENS ID...".into());
    };
    let engine = Engine::open(model, &kbit_cpu::Cpu::new()?, EngineOptions::default())?;
    let request = engine.submit(Generate {
        ids: ids.iter().map(|id| id.parse()).collect::<Result<_, _>>()?,
        max_new_tokens: new_tokens.parse()?,
        sampling: Sampling {
            temperature: 0.0,
            ..Sampling::default()
        },
        eos: Vec::new(),
        logprobs: None,
    })?;
    let mut out = std::io::stdout();
    while let Some(tokens) = request.wait(Duration::from_secs(1))? {
        for token in tokens {
            write!(out, "{} ", token.id)?;
            out.flush()?;
        }
    }
    Ok(writeln!(out)?)
}
