//! Saved models: what was saved comes back, and what was damaged does not.
#![allow(clippy::print_stdout, reason = "tests count what they tried")]

mod common;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use common::Random;
use kbit_tensor::{
    Bytes, Checkpoint, Codebook, DType, Error, KLayout, KTensor, Offset, QuantizeOptions,
    ScaleType, Scales, Tensor, TensorFile, Weight, open_checkpoint, quantize, read_checkpoint,
    save_checkpoint,
};

/// A directory of its own, gone afterwards.
struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("kbit-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self) -> PathBuf {
        self.0.join("model.safetensors")
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

fn weights() -> BTreeMap<String, Weight> {
    let mut random = Random(3);
    let mut out = BTreeMap::new();
    for bits in 2..=8 {
        let values: Vec<f32> = (0..20 * 70)
            .map(|_| random.next() as f32 / 2e9 - 0.5)
            .collect();
        let k = quantize(&values, 20, 70, &QuantizeOptions::new(bits)).unwrap();
        out.insert(format!("k{bits}"), Weight::Quantised(k));
    }
    // A float codebook with a NaN in it, zero points and an input permutation.
    let scales = Scales::Block {
        block: 64,
        scale: ScaleType::F32,
        offset: Offset::Zero,
    };
    let layout = KLayout::new(4, 3, 65, &scales).unwrap();
    let bytes = Bytes::copy_of(&random.bytes(layout.nbytes())).unwrap();
    let mut book: Vec<f32> = (0..16).map(|i| i as f32 / 3.0).collect();
    book[5] = f32::from_bits(0x7fc0_1234);
    let permutation = (0..65u32).rev().collect();
    let k = KTensor::new(
        4,
        3,
        65,
        Codebook::F32(book),
        scales,
        Some(permutation),
        Arc::new(bytes),
        0,
    );
    out.insert("act".into(), Weight::Quantised(k.unwrap()));
    for (name, dtype, n) in [
        ("a", DType::F32, 5),
        ("b", DType::BF16, 3),
        ("c", DType::F16, 64),
    ] {
        let bytes = Bytes::copy_of(&random.bytes(n * dtype.size())).unwrap();
        out.insert(
            name.into(),
            Weight::Dense(Tensor::new(dtype, &[n], Arc::new(bytes)).unwrap()),
        );
    }
    out
}

fn metadata() -> BTreeMap<String, String> {
    BTreeMap::from([("source".into(), "a \"test\" \u{e9}".into())])
}

fn save(dir: &Dir, weights: &BTreeMap<String, Weight>) {
    let all = weights.iter().map(|(name, w)| (name.as_str(), w));
    save_checkpoint(dir.file(), "{\"spec\":1}", all, &metadata()).unwrap();
}

fn same(a: &Weight, b: &Weight) -> bool {
    match (a, b) {
        (Weight::Dense(a), Weight::Dense(b)) => {
            (a.dtype(), a.shape(), a.bytes()) == (b.dtype(), b.shape(), b.bytes())
        }
        (Weight::Quantised(a), Weight::Quantised(b)) => {
            let books = match (a.codebook(), b.codebook()) {
                (Codebook::I8(a), Codebook::I8(b)) => a == b,
                (Codebook::F32(a), Codebook::F32(b)) => a
                    .iter()
                    .map(|v| v.to_bits())
                    .eq(b.iter().map(|v| v.to_bits())),
                _ => false,
            };
            books
                && (a.layout(), a.scales(), a.permutation(), a.bytes())
                    == (b.layout(), b.scales(), b.permutation(), b.bytes())
        }
        _ => false,
    }
}

fn assert_same(found: &Checkpoint, weights: &BTreeMap<String, Weight>) {
    assert_eq!(found.spec, "{\"spec\":1}");
    assert_eq!(found.metadata, metadata());
    assert!(
        found.weights.keys().eq(weights.keys()),
        "{:?}",
        found.weights.keys()
    );
    for (name, weight) in weights {
        assert!(same(&found.weights[name], weight), "{name}");
    }
}

#[test]
fn what_is_saved_comes_back() {
    let dir = Dir::new("save");
    let weights = weights();
    save(&dir, &weights);
    assert_same(&open_checkpoint(dir.file(), false).unwrap(), &weights);
    let mapped = open_checkpoint(dir.file(), true).unwrap();
    assert_same(&mapped, &weights);
    // Replacing the file leaves what is mapped alone; equal models are equal files.
    let before = std::fs::read(dir.file()).unwrap();
    save(&dir, &mapped.weights);
    assert_eq!(std::fs::read(dir.file()).unwrap(), before);
    assert_same(&mapped, &weights);
    assert_eq!(
        std::fs::read_dir(&dir.0).unwrap().count(),
        1,
        "a temporary file was left"
    );
    // Every tensor on a multiple of 64 bytes.
    let file = TensorFile::open(dir.file()).unwrap();
    let header = u64::from_le_bytes(before[..8].try_into().unwrap()) as usize + 8;
    assert_eq!(header % 64, 0);
    assert_eq!((before.len() - header) % 64, 0);
    assert!(
        file.tensors().len() > weights.len(),
        "padding and the permutation are tensors"
    );
}

#[test]
fn every_flip_and_truncation_is_noticed() {
    let dir = Dir::new("flips");
    let all = weights();
    let weights: BTreeMap<_, _> = all
        .into_iter()
        .filter(|(name, _)| ["act", "a", "k2"].contains(&name.as_str()))
        .collect();
    save(&dir, &weights);
    let good = std::fs::read(dir.file()).unwrap();
    let open = |bytes: &[u8]| {
        let file = TensorFile::from_bytes("test", Arc::new(Bytes::copy_of(bytes)?))?;
        read_checkpoint(&file)
    };
    let mut equal = 0;
    for at in 0..good.len() {
        let data = at >= 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
        for bit in 0..8 {
            // The whole header bit by bit, of the data one bit a byte.
            if data && bit != at % 8 {
                continue;
            }
            let mut bad = good.clone();
            bad[at] ^= 1 << bit;
            match open(&bad) {
                Err(Error::Format(_) | Error::Unsupported(_)) => {}
                Err(other) => panic!("byte {at} bit {bit}: {other}"),
                Ok(found) => {
                    assert!(!data, "byte {at} bit {bit} of the data went unnoticed");
                    assert_same(&found, &weights);
                    equal += 1;
                }
            }
        }
    }
    // Such as a space of the padding that became another JSON space.
    println!("{equal} flips of the header read the same");
    for len in 0..good.len() {
        assert!(
            matches!(open(&good[..len]), Err(Error::Format(_))),
            "cut to {len}"
        );
    }
}

#[test]
fn a_failed_save_leaves_the_old_file() {
    let dir = Dir::new("failed");
    let weights = weights();
    save(&dir, &weights);
    let before = std::fs::read(dir.file()).unwrap();
    let taken = BTreeMap::from([("kbit.spec".to_owned(), String::new())]);
    let all = || weights.iter().map(|(name, w)| (name.as_str(), w));
    assert!(matches!(
        save_checkpoint(dir.file(), "", all(), &taken),
        Err(Error::Argument(_))
    ));
    let nowhere = dir.0.join("missing").join("model.safetensors");
    assert!(matches!(
        save_checkpoint(nowhere, "", all(), &BTreeMap::new()),
        Err(Error::Io { .. })
    ));
    assert_eq!(std::fs::read(dir.file()).unwrap(), before);
    assert_eq!(std::fs::read_dir(&dir.0).unwrap().count(), 1);
}

#[test]
fn what_kbit_did_not_write_is_refused() {
    let bytes = common::safetensors("{\"__metadata__\":{\"kbit.format\":\"2\"}}", &[]);
    let error = read_checkpoint(&common::open(&bytes).unwrap()).unwrap_err();
    assert!(matches!(error, Error::Unsupported(_)), "{error}");
    for header in [
        "{}",
        "{\"__metadata__\":{\"kbit.format\":\"1\"}}",
        "{\"__metadata__\":{\"kbit.format\":\"x\"}}",
    ] {
        let file = common::open(&common::safetensors(header, &[])).unwrap();
        let error = read_checkpoint(&file).unwrap_err();
        assert!(matches!(error, Error::Format(_)), "{error}");
    }
}

#[test]
fn metadata_without_a_table_or_spec_is_named() {
    // A checksum is asked for first; the refusal of a wrong one names the right one.
    let refused = |keys: &str, checksum: &str| {
        let header = format!(
            "{{\"__metadata__\":{{\"kbit.format\":\"1\",{keys}\"kbit.checksum\":\"{checksum}\"}}}}"
        );
        let file = common::open(&common::safetensors(&header, &[])).unwrap();
        match read_checkpoint(&file).unwrap_err() {
            Error::Format(message) => message,
            other => panic!("{other}"),
        }
    };
    for (keys, missing) in [
        ("\"kbit.spec\":\"{}\",", "kbit.tensors"),
        ("\"kbit.tensors\":\"{}\",", "kbit.spec"),
    ] {
        let damaged = refused(keys, "");
        let found = damaged.split("checksum ").nth(1).unwrap();
        let message = refused(keys, found.split(',').next().unwrap());
        assert!(
            message.ends_with(&format!("its metadata has no {missing}")),
            "{message}"
        );
    }
}
