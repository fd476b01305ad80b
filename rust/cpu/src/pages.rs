//! Small matrices side by side. A matrix of a few MiB that lies in an allocation of its own is in small pages: the
//! processor looks up an address for every 4 KiB of it and its prefetchers stop there, which made the attention matrices
//! of a 1B model a third slower to read (`docs/performance.md`). Those of a saved model lie in one allocation anyway.

use std::sync::Arc;

use kbit_tensor::{Bytes, Result, Weight};

/// Bytes of matrices that share an allocation: many huge pages, of which the last is partly unused. Twice as much is there at once
/// for a moment, as what was there before is freed allocation by allocation.
const TOGETHER: usize = 64 << 20;

/// Moves k-bit matrices out of small pages into huge ones, in the order of `weights`, where they are enough to fill some.
///
/// # Errors
/// [`Error::Memory`](kbit_tensor::Error::Memory) without room for 64 MiB of them at a time.
pub(crate) fn gather(weights: &mut [Weight]) -> Result<()> {
    let mut rest = weights;
    while !rest.is_empty() {
        let (mut size, mut n) = (0, 0);
        while size < TOGETHER && n < rest.len() {
            size += small(&rest[n]);
            n += 1;
        }
        let (here, others) = rest.split_at_mut(n);
        move_together(here, size)?;
        rest = others;
    }
    Ok(())
}

/// Bytes that a weight takes among others; 0 if it stays where it is.
fn small(weight: &Weight) -> usize {
    match weight {
        Weight::Quantised(k) if !k.storage().is_paged() => k.bytes().len().next_multiple_of(64),
        _ => 0,
    }
}

fn move_together(weights: &mut [Weight], size: usize) -> Result<()> {
    let mut together = Bytes::zeroed(size)?;
    if !together.is_paged() {
        return Ok(());
    }
    let mut at = 0;
    for weight in &*weights {
        let size = small(weight);
        if let (Weight::Quantised(k), 1..) = (weight, size) {
            together[at..at + k.bytes().len()].copy_from_slice(k.bytes());
            at += size;
        }
    }
    let together = Arc::new(together);
    let mut at = 0;
    for weight in weights {
        let size = small(weight);
        if let (Weight::Quantised(k), 1..) = (&*weight, size) {
            *weight = Weight::Quantised(k.moved(together.clone(), at)?);
            at += size;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use kbit_tensor::{Codebook, KLayout, KTensor, Scales};

    use super::*;

    fn matrix(rows: usize, seed: u8) -> Weight {
        let layout = KLayout::new(4, rows, 1024, &Scales::Row).expect("fits");
        let mut bytes = Bytes::zeroed(layout.nbytes()).expect("room");
        for (i, b) in bytes.iter_mut().enumerate() {
            *b = (i as u8).wrapping_mul(seed);
        }
        let codebook = Codebook::I8((-8..8).collect());
        let bytes = Arc::new(bytes);
        let k = KTensor::new(4, rows, 1024, codebook, Scales::Row, None, bytes, 0);
        Weight::Quantised(k.expect("fits"))
    }

    fn quantised(weight: &Weight) -> &KTensor {
        match weight {
            Weight::Quantised(k) => k,
            Weight::Dense(_) => panic!("not moved to be dense"),
        }
    }

    /// Small ones end up in huge pages with the same bytes, side by side; large ones stay.
    #[test]
    fn small_matrices_move_and_keep_their_bytes() {
        let rows = [2000, 2016, 16384, 1999, 3000, 16, 3000];
        let make = || -> Vec<Weight> { (0u8..).zip(rows).map(|(i, n)| matrix(n, i + 1)).collect() };
        let (before, mut after) = (make(), make());
        let large = quantised(&after[2]).bytes().as_ptr();
        gather(&mut after).expect("room");
        let mut end = None;
        for (was, is) in before.iter().zip(&after) {
            let (was, is) = (quantised(was), quantised(is));
            assert_eq!(was.bytes(), is.bytes());
            assert!(is.storage().is_paged());
            let at = is.bytes().as_ptr_range();
            if at.start != large {
                assert!(end.is_none_or(
                    |end: *const u8| at.start == end.wrapping_add(end.align_offset(64))
                ));
                end = Some(at.end);
            }
        }
        assert_eq!(quantised(&after[2]).bytes().as_ptr(), large);
    }

    /// Too few for a huge page: nothing is gained, nothing moves.
    #[test]
    fn a_few_stay() {
        let mut weights = vec![matrix(16, 1), matrix(16, 2)];
        let at = quantised(&weights[1]).bytes().as_ptr();
        gather(&mut weights).expect("room");
        assert_eq!(quantised(&weights[1]).bytes().as_ptr(), at);
    }
}
