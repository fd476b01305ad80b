//! The moves of loading, against the same moves on plain vectors; packed and dense, whole and row by row.

mod common;

use common::{Gguf, open, tensors};
use kbit_tensor::gguf::GgmlType;
use kbit_tensor::{
    DType, Error, Keep, QuantizeOptions, TensorFile, Transform, View, Weight, load_weight, quantize,
};

fn floats(n: usize) -> Vec<f32> {
    (0..n).map(|i| i as f32 - 100.0).collect()
}

fn file(shape: &[usize]) -> TensorFile {
    let n = shape.iter().product();
    let bytes: Vec<u8> = floats(n).iter().flat_map(|v| v.to_le_bytes()).collect();
    tensors(&[("w", "F32", shape.to_vec(), bytes)])
}

fn load(file: &TensorFile, steps: &[Transform]) -> Result<(Vec<usize>, Vec<f32>), Error> {
    let weight = load_weight(&[(file, "w")], steps, Keep::AsStored, 3)?;
    let values = match &weight {
        Weight::Dense(t) => t.to_f32(),
        Weight::Quantised(k) => k.dequantize(),
    };
    Ok((weight.shape(), values))
}

/// Values of a matrix of `columns` at (row, column) pairs.
fn at(columns: usize, places: impl IntoIterator<Item = (usize, usize)>) -> Vec<f32> {
    places
        .into_iter()
        .map(|(r, c)| (r * columns + c) as f32 - 100.0)
        .collect()
}

fn grid(rows: usize, columns: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..rows).flat_map(move |r| (0..columns).map(move |c| (r, c)))
}

#[test]
fn every_step() {
    let f = file(&[6, 4]);
    let cases: Vec<(Vec<Transform>, Vec<usize>, Vec<f32>)> = vec![
        (vec![], vec![6, 4], floats(24)),
        (
            vec![Transform::Rows(2, 5)],
            vec![3, 4],
            at(4, grid(3, 4).map(|(r, c)| (r + 2, c))),
        ),
        (vec![Transform::Rows(6, 6)], vec![0, 4], vec![]),
        (
            vec![Transform::Transpose],
            vec![4, 6],
            at(4, grid(4, 6).map(|(r, c)| (c, r))),
        ),
        (
            vec![Transform::Transpose, Transform::Transpose],
            vec![6, 4],
            floats(24),
        ),
        (
            vec![Transform::Add(1.5)],
            vec![6, 4],
            floats(24).iter().map(|v| v + 1.5).collect(),
        ),
        (
            vec![Transform::Scale(0.5), Transform::Add(1.0)],
            vec![6, 4],
            floats(24).iter().map(|v| v * 0.5 + 1.0).collect(),
        ),
        (
            vec![Transform::PermuteRope {
                heads: 1,
                rotary_dim: 4,
            }],
            vec![6, 4],
            at(
                4,
                [0, 2, 1, 3, 4, 5]
                    .into_iter()
                    .flat_map(|r| (0..4).map(move |c| (r, c))),
            ),
        ),
        (
            vec![
                Transform::PermuteRope {
                    heads: 3,
                    rotary_dim: 2,
                },
                Transform::Rows(1, 3),
            ],
            vec![2, 4],
            at(4, grid(2, 4).map(|(r, c)| (r + 1, c))),
        ),
        (
            vec![Transform::Reshape(vec![2, 3, 4])],
            vec![2, 3, 4],
            floats(24),
        ),
        (vec![Transform::Reshape(vec![24])], vec![24], floats(24)),
        (
            vec![Transform::Reshape(vec![8, 3]), Transform::Rows(1, 2)],
            vec![1, 3],
            at(3, grid(1, 3).map(|(r, c)| (r + 1, c))),
        ),
        (
            // q of heads that hold q, k and v: the middle dimension of (2, 3, 4).
            vec![
                Transform::Reshape(vec![2, 3, 4]),
                Transform::Select { index: 1, axis: 1 },
            ],
            vec![2, 4],
            at(4, grid(2, 4).map(|(r, c)| (3 * r + 1, c))),
        ),
        (
            vec![
                Transform::Reshape(vec![2, 3, 4]),
                Transform::Select { index: 1, axis: 0 },
            ],
            vec![3, 4],
            at(4, grid(3, 4).map(|(r, c)| (r + 3, c))),
        ),
        (
            vec![
                Transform::Reshape(vec![2, 3, 4]),
                Transform::Transpose,
                Transform::Select { index: 0, axis: 0 },
            ],
            vec![4, 3],
            at(4, grid(4, 3).map(|(r, c)| (c, r))),
        ),
        (
            // Rows that were rearranged are cut anew.
            vec![
                Transform::PermuteRope {
                    heads: 1,
                    rotary_dim: 6,
                },
                Transform::Reshape(vec![12, 2]),
                Transform::Rows(2, 4),
            ],
            vec![2, 2],
            at(4, [(2, 0), (2, 1), (2, 2), (2, 3)]),
        ),
    ];
    for (steps, shape, values) in cases {
        let found = load(&f, &steps).unwrap_or_else(|e| panic!("{steps:?}: {e}"));
        assert_eq!(found, (shape, values), "{steps:?}");
    }
}

#[test]
fn steps_that_do_not_fit() {
    let f = file(&[6, 4]);
    let bad = [
        Transform::Rows(3, 2),
        Transform::Rows(0, 7),
        Transform::Select { index: 6, axis: 0 },
        Transform::Select { index: 0, axis: 1 },
        Transform::PermuteRope {
            heads: 4,
            rotary_dim: 2,
        },
        Transform::PermuteRope {
            heads: 0,
            rotary_dim: 0,
        },
        Transform::PermuteRope {
            heads: 2,
            rotary_dim: 4,
        },
        Transform::PermuteRope {
            heads: 1,
            rotary_dim: 3,
        },
        Transform::Reshape(vec![5, 5]),
        Transform::Reshape(vec![usize::MAX, 2]),
    ];
    for step in bad {
        let error = load(&f, std::slice::from_ref(&step)).unwrap_err();
        let sentence = error.to_string();
        assert!(matches!(error, Error::Argument(_)), "{step:?}: {error:?}");
        assert!(sentence.contains("\"w\" [6, 4]"), "{step:?}: {sentence}");
    }
    let error = load(&file(&[24]), &[Transform::Transpose]).unwrap_err();
    assert!(matches!(error, Error::Argument(_)), "{error}");
}

#[test]
fn sources_are_stacked_and_read_in_any_piece() {
    let (a, b) = (file(&[3, 5]), file(&[40, 5]));
    let view = View::new(&[(&a, "w"), (&b, "w")]).unwrap();
    assert_eq!(view.shape(), [43, 5]);
    let mut all = vec![0.0; 43 * 5];
    view.read_f32(0, &mut all).unwrap();
    assert_eq!(all[..15], floats(15));
    assert_eq!(all[15..], floats(200));
    let odd = view
        .apply(&Transform::PermuteRope {
            heads: 1,
            rotary_dim: 42,
        })
        .unwrap();
    let mut permuted = vec![0.0; 43 * 5];
    odd.read_f32(0, &mut permuted).unwrap();
    for first in 0..43 {
        let mut some = vec![0.0; 5 * (43 - first).min(7)];
        odd.read_f32(first, &mut some).unwrap();
        assert_eq!(some, permuted[first * 5..][..some.len()]);
        let stored = if first == 42 {
            42
        } else {
            first % 21 * 2 + first / 21
        };
        assert_eq!(permuted[first * 5..][..5], all[stored * 5..][..5]);
    }
    assert!(odd.read_f32(40, &mut [0.0; 20]).is_err());
    let c = file(&[3, 4]);
    let error = View::new(&[(&a, "w"), (&c, "w")]).unwrap_err().to_string();
    assert!(
        error.contains("[3, 5]") && error.contains("[3, 4]"),
        "{error}"
    );
    assert!(View::new(&[]).is_err());
}

#[test]
fn quantising_while_reading_is_quantising_what_was_read() {
    let f = file(&[33, 70]);
    let steps = [Transform::Scale(0.01), Transform::Rows(1, 33)];
    let options = QuantizeOptions::new(4);
    let Weight::Quantised(k) =
        load_weight(&[(&f, "w")], &steps, Keep::Quantised(&options), 2).unwrap()
    else {
        panic!("dense")
    };
    let values: Vec<f32> = floats(33 * 70)[70..].iter().map(|v| v * 0.01).collect();
    let whole = quantize(&values, 32, 70, &options).unwrap();
    assert_eq!(k.bytes(), whole.bytes());
    let vector = file(&[64]);
    assert!(matches!(
        load_weight(&[(&vector, "w")], &[], Keep::Quantised(&options), 1),
        Err(Error::Argument(_))
    ));
}

#[test]
fn dense_types() {
    let f = file(&[4, 3]);
    for (dtype, size) in [(DType::F32, 48), (DType::F16, 24), (DType::BF16, 24)] {
        let weight = load_weight(&[(&f, "w")], &[], Keep::Dense(dtype), 1).unwrap();
        assert_eq!(weight.nbytes(), size);
        let Weight::Dense(t) = weight else {
            panic!("k-bit")
        };
        assert_eq!((t.dtype(), t.to_f32()), (dtype, floats(12)));
    }
    assert!(load_weight(&[(&f, "w")], &[], Keep::Dense(DType::I8), 1).is_err());
    // fp8 fits bf16, integers and f64 become f32.
    let all = tensors(&[
        ("f8", "F8_E4M3", vec![2], vec![0x38, 0xc0]),
        ("i", "I64", vec![1], 7i64.to_le_bytes().to_vec()),
        ("d", "F64", vec![1], 0.5f64.to_le_bytes().to_vec()),
    ]);
    for (name, dtype, values) in [
        ("f8", DType::BF16, vec![1.0, -2.0]),
        ("i", DType::F32, vec![7.0]),
        ("d", DType::F32, vec![0.5]),
    ] {
        let Weight::Dense(t) = load_weight(&[(&all, name)], &[], Keep::AsStored, 1).unwrap() else {
            panic!("k-bit")
        };
        assert_eq!((t.dtype(), t.to_f32()), (dtype, values), "{name}");
    }
}

#[test]
fn blocks_keep_their_bits_unless_their_values_change() {
    let header = Gguf::new().tensor("w", &[64, 8, 2], GgmlType::Q8_0.id(), 0);
    let data: Vec<u8> = (0..16 * 2 * 34)
        .map(|i| if i % 34 == 1 { 0x3c } else { (i % 120) as u8 })
        .collect();
    let f = open(&header.file(32, &data)).unwrap();
    let all = f.read("w").unwrap();
    assert_eq!(all.shape(), [2, 8, 64]);
    let all = all.to_f32();
    let expert = Transform::Select { index: 1, axis: 0 };
    let rows = Transform::Rows(2, 6);
    let kept = load_weight(
        &[(&f, "w")],
        &[expert.clone(), rows.clone()],
        Keep::AsStored,
        1,
    )
    .unwrap();
    assert!(matches!(&kept, Weight::Quantised(k) if k.dequantize() == all[640..896]));
    for (step, k) in [(Transform::Scale(2.0), 2.0), (Transform::Add(0.0), 1.0)] {
        let steps = [expert.clone(), rows.clone(), step];
        let changed = load_weight(&[(&f, "w")], &steps, Keep::AsStored, 1).unwrap();
        let wanted: Vec<f32> = all[640..896].iter().map(|v| v * k).collect();
        assert!(matches!(&changed, Weight::Dense(t) if t.to_f32() == wanted));
    }
    // A stack of matrices is no matrix, and what cuts blocks makes a dense array.
    assert!(matches!(
        load_weight(&[(&f, "w")], &[], Keep::AsStored, 1).unwrap(),
        Weight::Dense(_)
    ));
    let cut = [expert, Transform::Reshape(vec![32, 16])];
    assert!(
        matches!(&load_weight(&[(&f, "w")], &cut, Keep::AsStored, 1).unwrap(), Weight::Dense(t) if t.to_f32() == all[512..])
    );
}
