//! GGUF written by kbit: the same bytes for GGUF's own types, the same values for all others.

mod common;

use std::path::PathBuf;
use std::sync::Arc;

use common::{Gguf, Random, open};
use kbit_tensor::gguf::{Array, GgmlType, Strings, Value};
use kbit_tensor::{
    Bytes, Codebook, DType, Error, GgufTensor, KLayout, KTensor, Keep, Offset, QuantizeOptions,
    ScaleType, Scales, Tensor, TensorFile, Transform, Weight, load_weight, quantize, save_gguf,
};

fn path(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("kbit-{name}-{}.gguf", std::process::id()))
}

fn one<'a>(name: &str, weight: &'a Weight) -> GgufTensor<'a> {
    GgufTensor {
        name: name.into(),
        parts: vec![weight],
        stacked: false,
        rope: None,
    }
}

fn stack<'a>(name: &str, parts: &'a [Weight; 2]) -> GgufTensor<'a> {
    GgufTensor {
        name: name.into(),
        parts: parts.iter().collect(),
        stacked: true,
        rope: None,
    }
}

fn values(weight: &Weight) -> Vec<f32> {
    match weight {
        Weight::Dense(t) => t.to_f32(),
        Weight::Quantised(k) => k.dequantize(),
    }
}

#[test]
fn ggufs_own_types_come_back_byte_for_byte() {
    let path = path("types");
    for &kind in GgmlType::ALL.iter().filter(|t| t.is_imported()) {
        let inputs = 2 * kind.block();
        let data = Random(11).bytes(24 * 2 * kind.block_bytes());
        let header = Gguf::new().tensor("w", &[inputs as u64, 24], kind.id(), 0);
        let file = open(&header.file(32, &data)).unwrap();
        // Three heads of 8 rows, of which 6 rotate: there and back.
        let rope = Transform::PermuteRope {
            heads: 3,
            rotary_dim: 6,
        };
        let weight = load_weight(&[(&file, "w")], &[rope], Keep::AsStored, 0).unwrap();
        let back = GgufTensor {
            rope: Some((3, 6)),
            ..one("w", &weight)
        };
        let written = save_gguf(&path, &[], &[back]).unwrap();
        assert_eq!(written[0].kind, kind);
        assert_eq!(written[0].nbytes, data.len() as u64);
        let bytes = std::fs::read(&path).unwrap();
        let at = bytes.len() - data.len().next_multiple_of(32);
        assert!(bytes[at..][..data.len()] == data, "{}", kind.name());
    }
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn native_weights_become_q8_0_with_the_same_values() {
    let path = path("native");
    let mut random = Random(5);
    for bits in 2..=8 {
        let normal: Vec<f32> = (0..17 * 288)
            .map(|_| random.next() as f32 / 1e9 - 1.0)
            .collect();
        let tiny: Vec<f32> = normal.iter().map(|v| v * 1e-12).collect();
        for (values_in, wanted) in [(&normal, GgmlType::Q8_0), (&tiny, GgmlType::F32)] {
            let k = quantize(values_in, 17, 288, &QuantizeOptions::new(bits)).unwrap();
            let weight = Weight::Quantised(k);
            let written = save_gguf(&path, &[], &[one("w", &weight)]).unwrap();
            assert_eq!(written[0].kind, wanted, "{bits} bits");
            let file = TensorFile::open(&path).unwrap();
            let found = file.read("w").unwrap().to_f32();
            let same = found
                .iter()
                .zip(values(&weight))
                .all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{bits} bits");
        }
    }
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn other_integers_become_q8_0_and_the_rest_f32() {
    let path = path("others");
    let block = |scale, offset| Scales::Block {
        block: 64,
        scale,
        offset,
    };
    let permuted: Arc<[u32]> = (0..128).rev().collect();
    let cases = [
        (block(ScaleType::F16, Offset::Zero), None, GgmlType::Q8_0),
        (block(ScaleType::F16, Offset::None), None, GgmlType::Q8_0),
        (block(ScaleType::F16, Offset::Min), None, GgmlType::F32),
        (block(ScaleType::F32, Offset::None), None, GgmlType::F32),
        (
            block(ScaleType::F16, Offset::None),
            Some(permuted),
            GgmlType::F32,
        ),
    ];
    for (scales, permutation, wanted) in cases {
        let layout = KLayout::new(4, 20, 128, &scales).unwrap();
        let mut bytes = Bytes::copy_of(&Random(8).bytes(layout.nbytes())).unwrap();
        for row in 0..20 {
            for b in 0..2 {
                let value = 0.01 + (row * 2 + b) as f32 * 1e-3;
                if let Scales::Block {
                    scale: ScaleType::F32,
                    ..
                } = scales
                {
                    let at = layout.fine_offset(row, b, 4);
                    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
                } else {
                    let half = half::f16::from_f32(value).to_le_bytes();
                    let at = layout.fine_offset(row, b, 2);
                    bytes[at..at + 2].copy_from_slice(&half);
                    if let Scales::Block {
                        offset: Offset::Min,
                        ..
                    } = scales
                    {
                        let at = layout.offset_offset(row, b, 2);
                        bytes[at..at + 2].copy_from_slice(&half);
                    }
                }
                if let Scales::Block {
                    offset: Offset::Zero,
                    ..
                } = scales
                {
                    bytes[layout.offset_offset(row, b, 1)] = (row % 17) as u8;
                }
            }
        }
        let book = Codebook::I8((0..16).collect());
        let what = format!("{scales:?}");
        let k = KTensor::new(4, 20, 128, book, scales, permutation, bytes.into(), 0).unwrap();
        let weight = Weight::Quantised(k);
        let written = save_gguf(&path, &[], &[one("w", &weight)]).unwrap();
        assert_eq!(written[0].kind, wanted, "{what}");
        let found = TensorFile::open(&path).unwrap().read("w").unwrap().to_f32();
        assert!(found == values(&weight), "{what}");
    }
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn metadata_dense_tensors_and_experts() {
    let path = path("metadata");
    let metadata: Vec<(String, Value)> = [
        ("u8", Value::U8(200)),
        ("i8", Value::I8(-3)),
        ("u16", Value::U16(60_000)),
        ("i16", Value::I16(-3)),
        ("u32", Value::U32(4_000_000_000)),
        ("i32", Value::I32(-3)),
        ("f32", Value::F32(0.1)),
        ("bool", Value::Bool(true)),
        ("string", Value::String("\u{e9}\0".into())),
        ("u64", Value::U64(u64::MAX)),
        ("i64", Value::I64(i64::MIN)),
        ("f64", Value::F64(0.1)),
        ("general.alignment", Value::U32(64)),
        (
            "strings",
            Value::Array(Array::Strings(Strings::from_iter(["a", "", "\u{e9}"]))),
        ),
        ("bools", Value::Array(Array::Bool(vec![true, false]))),
        ("i32s", Value::Array(Array::I32(vec![-1, 2]))),
        ("f64s", Value::Array(Array::F64(vec![0.1]))),
        (
            "arrays",
            Value::Array(Array::Arrays(vec![Array::U8(vec![1]), Array::U16(vec![])])),
        ),
    ]
    .map(|(k, v)| (k.to_owned(), v))
    .into();
    let dense = |dtype: DType, shape: &[usize], first: f32| {
        let values: Vec<f32> = (0..shape.iter().product())
            .map(|i| first + i as f32)
            .collect();
        let mut bytes = Bytes::zeroed(values.len() * dtype.size()).unwrap();
        dtype.encode(&values, &mut bytes).unwrap();
        Weight::Dense(Tensor::new(dtype, shape, bytes.into()).unwrap())
    };
    let (vector, bias) = (dense(DType::F32, &[3], 0.0), dense(DType::BF16, &[4], 0.0));
    let experts = [
        dense(DType::F16, &[2, 3], 0.0),
        dense(DType::F16, &[2, 3], 10.0),
    ];
    let mixed = [
        dense(DType::F16, &[2, 3], 0.0),
        dense(DType::F32, &[2, 3], 10.0),
    ];
    let tensors = [
        one("vector", &vector),
        GgufTensor {
            rope: Some((1, 4)),
            ..one("bias", &bias)
        },
        stack("experts", &experts),
        stack("mixed", &mixed),
        GgufTensor {
            stacked: false,
            ..stack("joined", &experts)
        },
    ];
    save_gguf(&path, &metadata, &tensors).unwrap();
    let file = TensorFile::open(&path).unwrap();
    assert_eq!(file.metadata(), metadata);
    assert_eq!(file.read("vector").unwrap().to_f32(), [0.0, 1.0, 2.0]);
    assert_eq!(file.read("bias").unwrap().to_f32(), [0.0, 2.0, 1.0, 3.0]);
    let rope = Transform::PermuteRope {
        heads: 1,
        rotary_dim: 4,
    };
    let back = load_weight(&[(&file, "bias")], &[rope], Keep::AsStored, 0).unwrap();
    assert_eq!(values(&back), [0.0, 1.0, 2.0, 3.0]);
    for (name, dtype) in [("experts", "F16"), ("mixed", "F32")] {
        let info = file.info(name).unwrap();
        assert_eq!(
            (info.stored.name(), info.shape.as_slice()),
            (dtype, &[2, 2, 3][..])
        );
        let select = Transform::Select { index: 1, axis: 0 };
        let second = load_weight(&[(&file, name)], &[select], Keep::AsStored, 0).unwrap();
        assert_eq!(values(&second), [10.0, 11.0, 12.0, 13.0, 14.0, 15.0]);
    }
    let joined = file.read("joined").unwrap();
    assert_eq!(joined.shape(), [4, 3]);
    let wanted = [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15].map(|x| x as f32);
    assert_eq!(joined.to_f32(), wanted);
    std::fs::remove_file(&path).unwrap();

    let errors = [
        GgufTensor {
            parts: vec![],
            ..one("none", &vector)
        },
        GgufTensor {
            parts: vec![&vector, &bias],
            stacked: true,
            ..one("differ", &vector)
        },
        GgufTensor {
            parts: vec![&vector, &bias],
            ..one("rows", &vector)
        },
        GgufTensor {
            rope: Some((2, 2)),
            ..one("heads", &vector)
        },
        GgufTensor {
            rope: Some((0, 2)),
            ..one("no heads", &vector)
        },
    ];
    for tensor in errors {
        let error = save_gguf(&path, &[], std::slice::from_ref(&tensor)).unwrap_err();
        assert!(
            matches!(&error, Error::Argument(m) if m.contains(&tensor.name)),
            "{error}"
        );
        assert!(!path.exists());
    }
}
