//! The quantiser through its public face: what it must give whatever the input, and what it must refuse.

use kbit_tensor::{
    Codebook, CodebookFormat, KLayout, KTensor, QuantizeOptions, SUPER, Scales, quantize,
};

/// Reproducible, roughly normal values.
fn values(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let mut uniform = || {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..n)
        .map(|_| (uniform() + uniform() + uniform()) * 0.1)
        .collect()
}

fn error(k: &KTensor, values: &[f32]) -> f64 {
    let d = k.dequantize();
    values
        .iter()
        .zip(&d)
        .map(|(v, d)| f64::from(v - d).powi(2))
        .sum()
}

#[test]
fn packing_is_undone_by_unpacking() {
    for bits in 2..=8 {
        let layout = KLayout::new(bits, 16, 64, &Scales::Row).unwrap();
        let codes: Vec<u8> = (0..1024u32)
            .map(|i| (i.wrapping_mul(2654435761) >> 20) as u8 & ((1u16 << bits) - 1) as u8)
            .collect();
        let mut bytes = vec![0xaa; layout.nbytes()];
        layout.pack_chunk(&codes, &mut bytes[layout.codes_at..]);
        let mut back = vec![0x55; 1024];
        layout.unpack_chunk(&bytes[layout.codes_at..], &mut back);
        assert_eq!(back, codes, "{bits} bits");
        for row in 0..16 {
            for input in 0..64 {
                let at = input / 4 * 64 + row * 4 + input % 4;
                assert_eq!(layout.code(&bytes, row, input), codes[at]);
            }
        }
    }
}

#[test]
fn no_other_code_is_nearer() {
    for bits in 2..=8 {
        for (format, block) in [
            (CodebookFormat::Learned, None),
            (CodebookFormat::Int, Some(16)),
            (CodebookFormat::Nf, Some(64)),
            (CodebookFormat::Float, Some(256)),
        ] {
            let (rows, inputs) = (19, 300);
            let v = values(rows * inputs, bits as u64);
            let options = QuantizeOptions {
                format,
                block,
                ..QuantizeOptions::new(bits)
            };
            let k = quantize(&v, rows, inputs, &options).unwrap();
            let Codebook::I8(book) = k.codebook() else {
                panic!("a float codebook")
            };
            let (layout, bytes) = (k.layout(), k.bytes());
            let d = k.dequantize();
            for row in 0..rows {
                for j in 0..inputs {
                    let ladder = match k.scales() {
                        Scales::Ladder { block, ladder } => {
                            let (at, high) = layout.rung_offset(row, j / block);
                            i32::from(
                                ladder[usize::from(if high {
                                    bytes[at] >> 4
                                } else {
                                    bytes[at] & 15
                                })],
                            )
                        }
                        _ => 128,
                    };
                    let at = layout.wide_offset(row, j / SUPER, 0);
                    let sw = half::bf16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32();
                    let (w, got) = (v[row * inputs + j], d[row * inputs + j]);
                    let least = book
                        .iter()
                        .map(|&c| ((i32::from(c) * ladder + 64) >> 7) as f32 * sw)
                        .map(|l| (l - w).abs())
                        .fold(f32::MAX, f32::min);
                    assert!((got - w).abs() <= least * (1.0 + 1e-5), "{w} became {got}");
                }
            }
        }
    }
}

#[test]
fn wider_codes_err_less_and_threads_change_nothing() {
    let (rows, inputs) = (40, 700);
    let v = values(rows * inputs, 3);
    let mut last = f64::MAX;
    for bits in 2..=8 {
        let one = quantize(
            &v,
            rows,
            inputs,
            &QuantizeOptions {
                threads: 1,
                ..QuantizeOptions::new(bits)
            },
        )
        .unwrap();
        let three = quantize(
            &v,
            rows,
            inputs,
            &QuantizeOptions {
                threads: 3,
                ..QuantizeOptions::new(bits)
            },
        )
        .unwrap();
        assert_eq!(one.bytes(), three.bytes());
        assert_eq!(one.codebook(), three.codebook());
        let e = error(&one, &v);
        assert!(e < last, "{bits} bits: {e} after {last}");
        last = e;
    }
}

#[test]
fn zero_blocks_stay_zero_and_powers_of_two_move_the_scale_only() {
    let (rows, inputs) = (17, 512);
    let mut v = values(rows * inputs, 4);
    v[..inputs].fill(0.0);
    v[inputs + 64..inputs + 96].fill(0.0);
    for bits in 2..=7 {
        let k = quantize(&v, rows, inputs, &QuantizeOptions::new(bits)).unwrap();
        let d = k.dequantize();
        assert!(d[..inputs].iter().all(|&x| x == 0.0));
        assert!(
            d[inputs + 64..inputs + 96].iter().all(|&x| x == 0.0),
            "{bits} bits"
        );
        let big: Vec<f32> = v.iter().map(|x| x * 1024.0).collect();
        let b = quantize(&big, rows, inputs, &QuantizeOptions::new(bits)).unwrap();
        assert_eq!(b.codebook(), k.codebook());
        assert_eq!(
            b.dequantize(),
            d.iter().map(|x| x * 1024.0).collect::<Vec<_>>()
        );
    }
}

#[test]
fn refusals_are_sentences() {
    let v = values(32 * 64, 5);
    let refuse = |v: &[f32], rows, inputs, options: &QuantizeOptions| {
        quantize(v, rows, inputs, options).unwrap_err().to_string()
    };
    let three = QuantizeOptions::new(3);
    assert!(refuse(&v, 31, 64, &three).contains("1984 values, got 2048"));
    assert!(refuse(&v, usize::MAX, 64, &three).contains("got 2048"));
    assert!(refuse(&[], 0, 64, &three).contains("rows and inputs must be"));
    assert!(refuse(&v, 32, 64, &QuantizeOptions::new(9)).contains("bits must be 2..=8"));
    let odd = QuantizeOptions {
        block: Some(48),
        ..three
    };
    assert!(refuse(&v, 32, 64, &odd).contains("is 48"));
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut w = v.clone();
        w[20 * 64 + 7] = bad;
        let message = refuse(&w, 32, 64, &three);
        assert!(message.contains("row 20, column 7"), "{message}");
    }
    let short = QuantizeOptions {
        importance: Some(&[1.0; 63]),
        ..three
    };
    assert!(refuse(&v, 32, 64, &short).contains("wants 64 values, has 63"));
    let mut negative = [1.0; 64];
    negative[5] = -1.0;
    let negative = QuantizeOptions {
        importance: Some(&negative),
        ..three
    };
    assert!(refuse(&v, 32, 64, &negative).contains("is -1 at input 5"));
    let none = QuantizeOptions {
        importance: Some(&[0.0; 64]),
        ..three
    };
    assert!(refuse(&v, 32, 64, &none).contains("zero everywhere"));
}
