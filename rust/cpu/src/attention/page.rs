//! Keys and values of one head in a page of 256 positions: how they are read, widened and written in each type of the cache.

use kbit_simd::{LANES, Simd, SimdOp};
use kbit_tensor::program::CacheType;

use crate::cache::{BLOCK, HeadPage, PAGE};
use crate::norm::load;

/// How 16 cached numbers become f32.
pub(super) trait Element {
    /// As it is cached.
    type Number;
    /// Dimension `dim` of the 16 positions of `block`.
    ///
    /// # Safety
    /// `page` is a page of this type, `block` and `dim` inside it, and nobody writes it.
    unsafe fn keys<S: Simd>(s: S, page: &HeadPage, block: usize, dim: usize) -> S::F32;
    /// Dimensions `at..at + 16` of `position`.
    ///
    /// # Safety
    /// As [`Element::keys`]; `at` is a multiple of 16 below the stride.
    unsafe fn values<S: Simd>(s: S, page: &HeadPage, position: usize, at: usize) -> S::F32;
}

/// Reads 16 numbers of type T as an array.
///
/// # Safety
/// `at` is good for them and aligned for T.
#[inline(always)]
unsafe fn sixteen<'a, T>(at: *const T) -> &'a [T; LANES] {
    // SAFETY: forwarded.
    unsafe { &*at.cast() }
}

macro_rules! element {
    ($name:ident, $number:ty, $load:ident) => {
        pub(super) struct $name;
        impl Element for $name {
            type Number = $number;
            #[inline(always)]
            unsafe fn keys<S: Simd>(s: S, page: &HeadPage, block: usize, dim: usize) -> S::F32 {
                // SAFETY: inside the page by contract.
                unsafe {
                    s.$load(sixteen(
                        page.keys
                            .cast::<$number>()
                            .add((block * page.layout.head_dim + dim) * BLOCK),
                    ))
                }
            }
            #[inline(always)]
            unsafe fn values<S: Simd>(s: S, page: &HeadPage, position: usize, at: usize) -> S::F32 {
                // SAFETY: inside the page by contract.
                unsafe {
                    s.$load(sixteen(
                        page.values
                            .cast::<$number>()
                            .add(position * page.layout.value_stride + at),
                    ))
                }
            }
        }
    };
}
element!(F16, u16, load_f16);
element!(Bf16, u16, load_bf16);
element!(F32, f32, load);

pub(super) struct I8;
impl Element for I8 {
    type Number = i8;
    #[inline(always)]
    unsafe fn keys<S: Simd>(s: S, page: &HeadPage, block: usize, dim: usize) -> S::F32 {
        // SAFETY: inside the page by contract.
        unsafe {
            let q = s.load_i8(sixteen(
                page.keys
                    .cast::<i8>()
                    .add((block * page.layout.head_dim + dim) * BLOCK),
            ));
            s.mul(
                s.to_f32(q),
                s.load(sixteen(page.key_scales.add(block * BLOCK))),
            )
        }
    }
    #[inline(always)]
    unsafe fn values<S: Simd>(s: S, page: &HeadPage, position: usize, at: usize) -> S::F32 {
        // SAFETY: inside the page by contract.
        unsafe {
            let q = s.load_i8(sixteen(
                page.values
                    .cast::<i8>()
                    .add(position * page.layout.value_stride + at),
            ));
            s.mul(s.to_f32(q), s.splat(*page.value_scales.add(position)))
        }
    }
}

/// Work that is compiled for every type of the cache.
pub(super) trait Typed: Sized {
    fn typed<S: Simd, E: Element>(self, s: S);

    #[inline(always)]
    fn of_kind<S: Simd>(self, s: S, kind: CacheType) {
        match kind {
            CacheType::F16 => self.typed::<S, F16>(s),
            CacheType::BF16 => self.typed::<S, Bf16>(s),
            CacheType::F32 => self.typed::<S, F32>(s),
            CacheType::I8 => self.typed::<S, I8>(s),
        }
    }
}

/// Turns the positions `0..end` of a page into f32, so that many queries read them without converting again.
pub(crate) struct Widen {
    pub(crate) kind: CacheType,
    pub(crate) from: HeadPage,
    /// An f32 page.
    pub(crate) to: HeadPage,
    pub(crate) end: usize,
}

impl SimdOp for Widen {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let kind = self.kind;
        self.of_kind(s, kind);
    }
}

impl Typed for Widen {
    #[inline(always)]
    fn typed<S: Simd, E: Element>(self, s: S) {
        let (head_dim, stride) = (self.from.layout.head_dim, self.from.layout.value_stride);
        for block in 0..self.end.div_ceil(BLOCK) {
            for dim in 0..head_dim {
                // SAFETY: both pages hold the block and dimension; `to` is this thread's own.
                unsafe {
                    let keys = E::keys(s, &self.from, block, dim);
                    s.store(
                        keys,
                        &mut *self
                            .to
                            .keys
                            .cast::<[f32; LANES]>()
                            .add(block * head_dim + dim),
                    );
                }
            }
        }
        for position in 0..self.end {
            for at in (0..stride).step_by(LANES) {
                // SAFETY: as above.
                unsafe {
                    let values = E::values(s, &self.from, position, at);
                    s.store(
                        values,
                        &mut *self
                            .to
                            .values
                            .cast::<[f32; LANES]>()
                            .add((position * stride + at) / LANES),
                    );
                }
            }
        }
    }
}

/// Writes the keys and values of one position: rounds them to the cache's type.
pub(crate) struct Append<'a> {
    pub(crate) kind: CacheType,
    pub(crate) page: HeadPage,
    /// Inside the page.
    pub(crate) position: usize,
    /// (`head_dim`).
    pub(crate) key: &'a [f32],
    pub(crate) value: &'a [f32],
}

impl SimdOp for Append<'_> {
    type Output = ();
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let (page, position) = (&self.page, self.position);
        assert!(
            self.key.len() == page.layout.head_dim
                && self.value.len() == page.layout.head_dim
                && position < PAGE
        );
        for (x, of_key) in [(self.key, true), (self.value, false)] {
            let scale = if self.kind == CacheType::I8 {
                Scale::of(s, x)
            } else {
                Scale {
                    scale: 0.0,
                    inverse: 0.0,
                }
            };
            if self.kind == CacheType::I8 {
                let scales = if of_key {
                    page.key_scales
                } else {
                    page.value_scales
                };
                // SAFETY: one scale per position of the page.
                unsafe { *scales.add(position) = scale.scale };
            }
            for at in (0..x.len()).step_by(LANES) {
                let n = LANES.min(x.len() - at);
                let v = load(s, &x[at..at + n]);
                // Element i of 16 goes to `first + i * step`.
                let (first, step) = if of_key {
                    (
                        (position / BLOCK * page.layout.head_dim + at) * BLOCK + position % BLOCK,
                        BLOCK,
                    )
                } else {
                    (position * page.layout.value_stride + at, 1)
                };
                let to = if of_key { page.keys } else { page.values };
                // SAFETY: `first + (n - 1) * step` is inside the head's keys or values; only this thread writes the
                // position of this head.
                unsafe {
                    match self.kind {
                        CacheType::F16 | CacheType::BF16 => {
                            let mut bits = [0u16; LANES];
                            if self.kind == CacheType::F16 {
                                s.store_f16(v, &mut bits);
                            } else {
                                s.store_bf16(v, &mut bits);
                            }
                            scatter(&bits[..n], to, first, step);
                        }
                        CacheType::F32 => {
                            let mut values = [0f32; LANES];
                            s.store(v, &mut values);
                            scatter(&values[..n], to, first, step);
                        }
                        CacheType::I8 => {
                            let mut codes = [0i8; LANES];
                            s.store_i8(s.to_i32(s.mul(v, s.splat(scale.inverse))), &mut codes);
                            scatter(&codes[..n], to, first, step);
                        }
                    }
                }
            }
        }
    }
}

/// Values to every `step`th place from place `first` on.
///
/// # Safety
/// These places of `to` are writable and of this type.
#[inline(always)]
unsafe fn scatter<T: Copy>(values: &[T], to: *mut u8, first: usize, step: usize) {
    for (i, &value) in values.iter().enumerate() {
        // SAFETY: as the caller says.
        unsafe { to.cast::<T>().add(first + i * step).write(value) }
    }
}

/// Section 2's scale of one row of at most a head.
struct Scale {
    scale: f32,
    inverse: f32,
}

impl Scale {
    #[inline(always)]
    fn of<S: Simd>(s: S, x: &[f32]) -> Self {
        let mut max = s.splat(0.0);
        for part in x.chunks(LANES) {
            max = s.max(s.abs(load(s, part)), max);
        }
        let amax = s.reduce_max(max);
        // `max` passes NaN by, so it is looked for apart.
        if !amax.is_finite() || x.iter().any(|v| v.is_nan()) {
            Self {
                scale: f32::NAN,
                inverse: 0.0,
            }
        } else if amax <= 1e-30 {
            Self {
                scale: 0.0,
                inverse: 0.0,
            }
        } else {
            Self {
                scale: amax / 127.0,
                inverse: 127.0 / amax,
            }
        }
    }
}
