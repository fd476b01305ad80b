//! Codes into bit planes and back, a chunk (16 rows x 64 inputs) at a time: the fast equal of [`KLayout::set_code`] and
//! [`KLayout::code`].

use crate::{CHUNK, KLayout, ROWS};

/// Codes of a chunk, row by row.
pub(crate) type Codes = [[u8; CHUNK]; ROWS];

/// Bytes of a code vector.
const VECTOR: usize = 64;

/// Writes the bit planes of a chunk: `bits * 128` bytes.
pub(crate) fn pack_chunk(bits: usize, codes: &Codes, out: &mut [u8]) {
    let mut vectors = [[0u8; VECTOR]; CHUNK / 4];
    for (row, codes) in codes.iter().enumerate() {
        for (vector, four) in vectors.iter_mut().zip(codes.as_chunks::<4>().0) {
            vector[row * 4..row * 4 + 4].copy_from_slice(four);
        }
    }
    for &(width, plane, shift) in KLayout::planes(bits) {
        let mask = ((1u16 << width) - 1) as u8;
        let plane = out[plane..].as_chunks_mut::<VECTOR>().0;
        for (packed, group) in plane.iter_mut().zip(vectors.chunks_exact(8 / width)) {
            *packed = [0; VECTOR];
            for (k, vector) in group.iter().enumerate() {
                for (to, &code) in packed.iter_mut().zip(vector) {
                    *to |= (code >> shift & mask) << (width * k);
                }
            }
        }
    }
}

/// The inverse of [`pack_chunk`].
pub(crate) fn unpack_chunk(bits: usize, packed: &[u8], codes: &mut Codes) {
    let mut vectors = [[0u8; VECTOR]; CHUNK / 4];
    for &(width, plane, shift) in KLayout::planes(bits) {
        let mask = ((1u16 << width) - 1) as u8;
        let plane = packed[plane..].as_chunks::<VECTOR>().0;
        for (packed, group) in plane.iter().zip(vectors.chunks_exact_mut(8 / width)) {
            for (k, vector) in group.iter_mut().enumerate() {
                for (code, &from) in vector.iter_mut().zip(packed) {
                    *code |= (from >> (width * k) & mask) << shift;
                }
            }
        }
    }
    for (row, codes) in codes.iter_mut().enumerate() {
        for (vector, four) in vectors.iter().zip(codes.as_chunks_mut::<4>().0) {
            four.copy_from_slice(&vector[row * 4..row * 4 + 4]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Scales;

    #[test]
    fn a_chunk_is_what_single_codes_say() {
        let mut state = 1u64;
        for bits in 2..=8 {
            let layout = KLayout::new(bits, ROWS, CHUNK, &Scales::Row).unwrap();
            let mut codes = [[0; CHUNK]; ROWS];
            let mut single = vec![0; layout.nbytes()];
            for (row, codes) in codes.iter_mut().enumerate() {
                for (input, code) in codes.iter_mut().enumerate() {
                    state = state
                        .wrapping_mul(6364136223846793005)
                        .wrapping_add(1442695040888963407);
                    *code = (state >> 40) as u8 & ((1u16 << bits) - 1) as u8;
                    layout.set_code(&mut single, row, input, *code);
                }
            }
            let mut whole = vec![0xaa; layout.nbytes()];
            pack_chunk(bits, &codes, &mut whole[layout.codes_at..]);
            assert_eq!(
                whole[layout.codes_at..],
                single[layout.codes_at..],
                "{bits} bits"
            );
            let mut back = [[0; CHUNK]; ROWS];
            unpack_chunk(bits, &whole[layout.codes_at..], &mut back);
            assert_eq!(back, codes, "{bits} bits");
        }
    }
}
