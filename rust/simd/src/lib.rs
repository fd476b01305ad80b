//! Instruction sets behind one vector trait, chosen at run time.
//!
//! An algorithm is a [`SimdOp`] whose body is generic over [`Simd`]; [`dispatch`] runs it on an [`Isa`]. The scalar token is
//! the definition: every other one gives the same bits. Element functions of `docs/numerics.md` are in [`math`].
//!
//! ```
//! use kbit_simd::{Isa, Simd, SimdOp, dispatch};
//!
//! /// Sum of 16 numbers by halves.
//! struct Sum<'a>(&'a [f32; 16]);
//! impl SimdOp for Sum<'_> {
//!     type Output = f32;
//!     #[inline(always)]
//!     fn eval<S: Simd>(self, s: S) -> f32 {
//!         s.reduce_add(s.load(self.0))
//!     }
//! }
//! for isa in Isa::available() {
//!     assert_eq!(dispatch(isa, Sum(&[0.5; 16])), 8.0);
//! }
//! ```
#![allow(
    unsafe_code,
    reason = "the room of core::arch: a token proves that the instructions exist"
)]

mod dispatch;
pub mod half;
mod isa;
pub mod math;
mod vector;

#[cfg(target_arch = "x86_64")]
#[doc(hidden)]
pub use isa::amx::assume as assume_amx;

pub use dispatch::{Isa, IsaError, SimdOp, Vendor, dispatch};
pub use vector::{Book, LANES, Simd};
