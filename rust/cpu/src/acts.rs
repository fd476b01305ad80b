//! Input rows as matrices want them: int8 with one scale per 256 inputs (`docs/numerics.md` section 2), or f32.
//!
//! A few tokens (up to [`Simd::DIRECT`], where the matrix has kernels for them) are one tile, more are grouped in tiles of [`Simd::TILE`]; the last
//! tile may be smaller. Sizes are rounded up to one that kernels exist for (missing tokens are zero). Within a tile of n tokens everything that one
//! step of a kernel reads lies together:
//!
//! ```text
//! int8     [inputs / run][rows][run]   i8, run = 4 or what Simd::RUN says, rows = n; or i16, run = 4 in the order 0, 2, 1, 3, where
//!                                      the instruction set multiplies those, of differences where they fit (Simd::rows)
//! f32      [input mod 4][inputs / 4][n]
//! scales   [supers][n] f32
//! sums     [supers][31][n] i32         of 16 blocks of 16 inputs, 8 of 32, 4 of 64, 2 of 128, 1 of 256; or [supers][1][n]
//! starts   as sums: -128 times the sum, where the dot product takes weights plus 128
//! ```

use std::ops::Range;
use std::sync::Arc;

use kbit_simd::{Isa, LANES, Simd, SimdOp, dispatch};
use kbit_tensor::{Bytes, CHUNK, Error, Result, SUPER};

/// Tokens that are whole tiles whatever the instruction set and form.
pub const WHOLE_TILES: usize = 96;

/// Sums kept per super-block: blocks of 16, 32, 64, 128 and 256 inputs.
pub(crate) const SUMS: usize = 31;

/// Where the sums of blocks of `block` inputs start among the 31.
pub(crate) const fn sum_at(block: usize) -> usize {
    match block {
        16 => 0,
        32 => 16,
        64 => 24,
        128 => 28,
        _ => 30,
    }
}

/// How numbers are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// int8 per token and 256 inputs.
    Int8 {
        /// With the sums of every block of 16 to 256 inputs, not of 256 only.
        sums: bool,
        /// Up to so many tokens are best multiplied as weights are decoded, where the instruction set says the same.
        direct: usize,
        /// For products that matrix tiles are worth it for: those of so many tokens and more.
        tiles: Option<usize>,
    },
    /// As they are.
    F32,
}

/// What a matrix wants of its input rows.
#[derive(Clone, Debug, PartialEq)]
pub struct Input {
    /// How numbers are stored.
    pub form: Form,
    /// Numbers a row.
    pub inputs: usize,
    /// Number j of the stored row is number `permutation[j]` of the given one.
    pub permutation: Option<Arc<[u32]>>,
}

impl Input {
    /// Super-blocks of 256 inputs a row.
    pub(crate) fn supers(&self) -> usize {
        self.inputs.div_ceil(SUPER)
    }
}

/// The instruction set whose kernels multiply `tokens` rows: AMX has those for some tokens and more, as it gains nothing by
/// others. What it leaves is laid out for AVX-512 and computed by its kernels.
fn kernels(isa: Isa, form: Form, tokens: usize) -> Isa {
    match (isa, form) {
        (
            Isa::Amx,
            Form::Int8 {
                tiles: Some(least), ..
            },
        ) if tokens >= least => isa,
        (Isa::Amx, _) => Isa::Avx512Vbmi,
        _ => isa,
    }
}

/// How so many tokens lie for an instruction set.
#[derive(Clone, Copy, Debug)]
struct Shape {
    /// All are one tile, of a power of two, for kernels that decode weights as they multiply.
    few: bool,
    least: usize,
    tile: usize,
    pairs: bool,
    bias: bool,
}

impl Shape {
    /// The smallest tile kernels exist for that holds `n` tokens.
    fn padded(&self, n: usize) -> usize {
        if n == 0 {
            return 0;
        }
        // Pairs of eight tokens lie in six rows, as six would. Where six are the tile, they still are.
        let sizes = [1, 2, 4, 6, 8, 12, 16];
        let kernels = |&size: &usize| size >= n.max(self.least) && !(self.pairs && size == 6);
        let fits = sizes.into_iter().find(kernels);
        fits.map_or(self.tile, |size| size.min(self.tile))
    }
}

/// Rows of a step in the form one kind of matrix wants. Reused from step to step; memory only grows.
#[derive(Debug)]
pub struct Acts {
    isa: Isa,
    shape: Shape,
    input: Input,
    tokens: usize,
    data: Room,
    scales: Room,
    sums: Room,
    starts: Room,
    /// Of these rooms.
    tiles: Vec<Tile>,
}

/// Memory that threads fill in parts: `at` is taken once from the exclusive owner.
#[derive(Debug)]
struct Room {
    bytes: Bytes,
    at: *mut u8,
}

impl Room {
    fn new(len: usize) -> Result<Self> {
        let mut bytes = Bytes::zeroed(len)?;
        let at = bytes.as_mut_ptr();
        Ok(Self { bytes, at })
    }
}

// SAFETY: `at` points into `bytes`, which owns its memory.
unsafe impl Send for Room {}
// SAFETY: writing through `at` is only done by `Acts::fill`, whose caller keeps threads apart.
unsafe impl Sync for Room {}

/// One tile, as kernels read it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tile {
    pub data: *mut u8,
    pub scales: *mut f32,
    pub sums: *mut i32,
    pub starts: *mut i32,
    /// Tokens, without the padding.
    pub tokens: usize,
    /// With it.
    pub padded: usize,
    /// Sums a super-block and token: 1 or 31.
    pub per_super: usize,
}

// SAFETY: as `Room`.
unsafe impl Send for Tile {}
// SAFETY: as `Room`.
unsafe impl Sync for Tile {}

impl Acts {
    /// Room for nothing yet.
    ///
    /// # Errors
    /// [`Error::Memory`] without any memory at all.
    pub fn new() -> Result<Self> {
        let none = || Room::new(0);
        Ok(Self {
            isa: Isa::Scalar,
            shape: Shape {
                few: false,
                least: 1,
                tile: 4,
                pairs: false,
                bias: false,
            },
            input: Input {
                form: Form::F32,
                inputs: 0,
                permutation: None,
            },
            tokens: 0,
            data: none()?,
            scales: none()?,
            sums: none()?,
            starts: none()?,
            tiles: Vec::new(),
        })
    }

    /// Makes room for `tokens` rows as `input` says, for kernels of `isa`. What was there is forgotten.
    ///
    /// # Errors
    /// [`Error::Memory`] without room, [`Error::Argument`] for sizes past the address space.
    pub fn reserve(&mut self, isa: Isa, input: &Input, tokens: usize) -> Result<()> {
        self.isa = kernels(isa, input.form, tokens);
        self.shape = dispatch(self.isa, ShapeOf(input.form, tokens));
        self.tokens = tokens;
        if self.input != *input {
            self.input = input.clone();
        }
        let last = tokens % self.shape.tile;
        let padded = tokens - last + self.shape.padded(last);
        let too_large = || {
            Error::Argument(format!(
                "{tokens} rows of {} activations are too many",
                input.inputs
            ))
        };
        let grow = |room: &mut Room, per_token: usize| {
            let wanted = padded.checked_mul(per_token).ok_or_else(too_large)?;
            if room.bytes.len() < wanted {
                *room = Room::new(wanted)?;
            }
            Ok::<(), Error>(())
        };
        let (data, scales) = (self.data_bytes(), self.supers() * 4);
        let sums = scales * self.per_super();
        grow(&mut self.data, data)?;
        if let Form::Int8 { .. } = input.form {
            grow(&mut self.scales, scales)?;
            grow(&mut self.sums, sums)?;
            grow(&mut self.starts, sums)?;
        }
        self.tiles.clear();
        for first in (0..tokens).step_by(self.shape.tile) {
            let tokens = self.shape.tile.min(tokens - first);
            let at = |room: &Room, per_token: usize| room.at.wrapping_add(first * per_token);
            self.tiles.push(Tile {
                data: at(&self.data, data),
                scales: at(&self.scales, scales).cast(),
                sums: at(&self.sums, sums).cast(),
                starts: at(&self.starts, sums).cast(),
                tokens,
                padded: self.shape.padded(tokens),
                per_super: self.per_super(),
            });
        }
        Ok(())
    }

    /// Rows.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Whether they are so few that weights are best multiplied as they are decoded; then they are one tile.
    pub(crate) fn are_few(&self) -> bool {
        self.shape.few
    }

    /// The instruction set whose kernels may read this.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// What the rows were made for.
    pub fn input(&self) -> &Input {
        &self.input
    }

    /// Tiles to [`fill`](Self::fill), each a unit of work.
    pub fn tiles(&self) -> usize {
        self.tiles.len()
    }

    /// The tiles of some tokens.
    ///
    /// # Panics
    /// When these are not whole tiles.
    pub(crate) fn tiles_of(&self, tokens: Range<usize>) -> Range<usize> {
        let (tile, all) = (self.shape.tile, self.tokens);
        let ends = tokens.end == all || tokens.end < all && tokens.end.is_multiple_of(tile);
        assert!(
            tokens.start.is_multiple_of(tile) && ends,
            "tokens {tokens:?} of {all} in tiles of {tile}"
        );
        tokens.start / tile..tokens.end.div_ceil(tile)
    }

    /// Converts the rows of `tiles`: row t starts at `x + t * stride`.
    ///
    /// # Safety
    /// Rows `0..tokens` of `inputs` f32 at `stride` are readable; no two threads fill one tile at a time, and none reads
    /// (see `Matrix::run`) before all are filled and the threads have synchronised.
    pub unsafe fn fill(&self, x: *const f32, stride: usize, tiles: Range<usize>) {
        // SAFETY: forwarded.
        unsafe { self.convert(x, stride, tiles, 0..self.supers()) }
    }

    /// Super-blocks of tiles to [`fill_piece`](Self::fill_piece), each a unit of work; those of a tile follow each other.
    pub fn pieces(&self) -> usize {
        self.tiles() * self.supers()
    }

    /// Converts 256 inputs of all rows of a tile.
    ///
    /// # Safety
    /// As [`fill`](Self::fill), where no two threads fill one piece at a time.
    pub unsafe fn fill_piece(&self, x: *const f32, stride: usize, piece: usize) {
        let (tile, sup) = (piece / self.supers(), piece % self.supers());
        // SAFETY: forwarded.
        unsafe { self.convert(x, stride, tile..tile + 1, sup..sup + 1) }
    }

    /// Converts the 256 inputs of super-block `sup` of some tokens, whole tiles, in the order given: input i of row t is at `x + t * stride + i`.
    ///
    /// # Panics
    /// When these are not whole tiles, or the input is permuted.
    ///
    /// # Safety
    /// As [`fill_piece`](Self::fill_piece), where only these inputs of these rows need to be readable.
    pub(crate) unsafe fn fill_super(
        &self,
        x: *const f32,
        stride: usize,
        sup: usize,
        tokens: Range<usize>,
    ) {
        assert!(self.input.permutation.is_none(), "inputs in their order");
        // SAFETY: forwarded.
        unsafe { self.convert(x, stride, self.tiles_of(tokens), sup..sup + 1) }
    }

    /// Converts these super-blocks of all rows of `tiles`.
    ///
    /// # Safety
    /// As the callers say.
    unsafe fn convert(
        &self,
        x: *const f32,
        stride: usize,
        tiles: Range<usize>,
        supers: Range<usize>,
    ) {
        let acts = self;
        let tiles = tiles.start..tiles.end.min(self.tiles());
        dispatch(
            self.isa,
            Fill {
                acts,
                x,
                stride,
                tiles,
                supers,
            },
        );
    }

    /// Converts all rows of `x`, `stride` numbers apart.
    ///
    /// # Panics
    /// When `x` is too short.
    pub fn fill_all(&mut self, x: &[f32], stride: usize) {
        let wanted = self
            .tokens
            .checked_sub(1)
            .map_or(0, |rows| rows * stride + self.input.inputs);
        assert!(
            x.len() >= wanted,
            "rows: {wanted} numbers wanted, {} given",
            x.len()
        );
        // SAFETY: the length was just checked, and `&mut self` makes this the only use.
        unsafe { self.fill(x.as_ptr(), stride, 0..self.tiles()) }
    }

    pub(crate) fn supers(&self) -> usize {
        self.input.supers()
    }

    fn per_super(&self) -> usize {
        if matches!(self.input.form, Form::Int8 { sums: true, .. }) {
            SUMS
        } else {
            1
        }
    }

    fn data_bytes(&self) -> usize {
        let padded = self.input.inputs.next_multiple_of(CHUNK);
        match self.input.form {
            Form::Int8 { .. } => padded * if self.shape.pairs { 2 } else { 1 },
            Form::F32 => padded * 4,
        }
    }

    pub(crate) fn tile(&self, tile: usize) -> &Tile {
        &self.tiles[tile]
    }
}

/// Of so many tokens.
struct ShapeOf(Form, usize);

impl SimdOp for ShapeOf {
    type Output = Shape;
    const TILES: bool = true;
    #[inline(always)]
    fn eval<S: Simd>(self, _: S) -> Shape {
        let Self(form, tokens) = self;
        let few = matches!(form, Form::Int8 { direct, .. } if tokens <= direct.min(S::DIRECT));
        let (least, tile) = if few {
            let all = tokens.next_power_of_two();
            (all, all)
        } else if form == Form::F32 {
            (1, S::FLOATS)
        } else if tokens < S::TILE {
            (S::ALONE, S::TILE)
        } else {
            (S::LEAST, S::TILE)
        };
        Shape {
            few,
            least,
            tile,
            pairs: S::PAIRS,
            bias: S::BIAS != 0,
        }
    }
}

struct Fill<'a> {
    acts: &'a Acts,
    x: *const f32,
    stride: usize,
    tiles: Range<usize>,
    /// Of each tile.
    supers: Range<usize>,
}

impl SimdOp for Fill<'_> {
    type Output = ();
    const TILES: bool = true;
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) {
        let a = self.acts;
        let n = a.input.inputs;
        let mut gathered = [0.0; SUPER];
        let pieces = self
            .tiles
            .flat_map(|tile| self.supers.clone().map(move |sup| (tile, sup)));
        for (index, sup) in pieces {
            let tile = a.tile(index);
            let inputs = sup * SUPER..n.min((sup + 1) * SUPER);
            for token in 0..tile.padded {
                let mut block = &[][..];
                if token < tile.tokens {
                    let token = index * a.shape.tile + token;
                    let row = self.x.wrapping_add(token * self.stride);
                    if let Some(p) = &a.input.permutation {
                        // SAFETY: rows below `tokens` are readable and `n` long, as the caller of `fill` says.
                        let row = unsafe { std::slice::from_raw_parts(row, n) };
                        for (to, &from) in gathered.iter_mut().zip(&p[inputs.clone()]) {
                            *to = row[from as usize];
                        }
                        block = &gathered[..inputs.len()];
                    } else {
                        let row = row.wrapping_add(inputs.start);
                        // SAFETY: as above; these inputs at least.
                        block = unsafe { std::slice::from_raw_parts(row, inputs.len()) };
                    }
                }
                // SAFETY: the tile has room for `padded` tokens; the caller of `fill` gives the piece to this thread alone.
                unsafe {
                    match a.input.form {
                        Form::F32 => store_f32(tile, token, sup, block, n),
                        Form::Int8 { .. } => quantise(s, a, tile, token, sup, block),
                    }
                }
            }
        }
    }
}

/// Super-block `sup` of one row; an empty one is zero.
///
/// # Safety
/// `tile` is writable here and `token` one of it.
unsafe fn store_f32(tile: &Tile, token: usize, sup: usize, block: &[f32], inputs: usize) {
    let (to, quarter) = (tile.data.cast::<f32>(), inputs.next_multiple_of(CHUNK) / 4);
    for i in sup * SUPER..inputs.min((sup + 1) * SUPER) {
        let at = ((i % 4) * quarter + i / 4) * tile.padded + token;
        // SAFETY: i is below the padded inputs.
        unsafe {
            to.add(at)
                .write(block.get(i % SUPER).copied().unwrap_or(0.0));
        }
    }
}

/// Super-block `sup` of one row into int8, its scale and sums; an empty one is zero.
///
/// # Safety
/// `tile` is writable here and `token` one of it.
#[inline(always)]
unsafe fn quantise<S: Simd>(s: S, a: &Acts, tile: &Tile, token: usize, sup: usize, block: &[f32]) {
    let inputs = a.input.inputs.next_multiple_of(CHUNK);
    let (data, fours, rows) = (tile.data, S::RUN / 4, S::rows(tile.padded));
    let (whole, rest) = block.as_chunks::<LANES>();
    // A difference of equal finite numbers is 0, else NaN: `odd` turns NaN with the first value that is not finite.
    let (mut peak, mut odd) = (s.splat(0.0), s.splat(0.0));
    for x in whole {
        let v = s.load(x);
        peak = s.max(s.abs(v), peak);
        odd = s.add(odd, s.sub(v, v));
    }
    let v = s.load_part(rest);
    peak = s.max(s.abs(v), peak);
    odd = s.add(odd, s.sub(v, v));
    let amax = s.reduce_max(peak);
    let finite = !s.reduce_add(odd).is_nan();
    let live = finite && amax > 1e-30;
    let scale = if live {
        amax / 127.0
    } else if finite {
        0.0
    } else {
        f32::NAN
    };
    let inverse = s.splat(if live { 127.0 / amax } else { 0.0 });
    // SAFETY: `sup` and `token` are in the tile.
    unsafe { tile.scales.add(sup * tile.padded + token).write(scale) }

    let mut sums = [0; SUMS];
    let mut total = s.splat_i32(0);
    for j in 0..SUPER.min(inputs - sup * SUPER) / LANES {
        let v = match whole.get(j) {
            Some(x) => s.load(x),
            None if j == whole.len() => s.load_part(rest),
            None => s.splat(0.0),
        };
        let q = if live {
            s.to_i32(s.mul(v, inverse))
        } else {
            s.splat_i32(0)
        };
        if tile.per_super == 1 {
            total = s.add_i32(total, q);
        } else {
            sums[j] = s.reduce_add_i32(q);
        }
        let mut bytes = [0i8; LANES];
        s.store_i8(q, &mut bytes);
        let group = (sup * SUPER + j * LANES) / 4;
        let together = fours.min(LANES / 4);
        for g in (0..LANES / 4).step_by(together) {
            let (run, part) = ((group + g) / fours, (group + g) % fours);
            let at = |row: usize| (run * rows + row) * fours + part;
            let four = &bytes[4 * g..4 * (g + together)];
            // SAFETY: the group is below the padded inputs, and so are those that lie together with it.
            unsafe {
                if S::PAIRS {
                    let pairs = [four[0], four[2], four[1], four[3]].map(i16::from);
                    let to = |row| data.cast::<[i16; 4]>().add(at(row));
                    if rows == tile.padded {
                        to(token).write(pairs);
                        continue;
                    }
                    // 256 times itself in a row of its own, which the next token of the four is taken from; the last has none.
                    let (row, place) = (token / 4 * 3 + token % 4, token % 4);
                    if place != 3 {
                        to(row).write(pairs.map(|x| 256 * x));
                    }
                    if place != 0 {
                        let before = &mut *to(row - 1);
                        *before = std::array::from_fn(|i| before[i] - pairs[i]);
                    }
                } else {
                    let to = data.cast::<i8>().add(4 * at(token));
                    to.copy_from_nonoverlapping(four.as_ptr(), four.len());
                }
            }
        }
    }
    let keep = |index: usize, sum: i32| {
        let at = (sup * tile.per_super + index) * tile.padded + token;
        // SAFETY: index is below the sums of a super-block.
        unsafe {
            tile.sums.add(at).write(sum);
            tile.starts
                .add(at)
                .write(if a.shape.bias { -128 * sum } else { 0 });
        }
    };
    if tile.per_super == 1 {
        keep(0, s.reduce_add_i32(total));
    } else {
        for i in 16..SUMS {
            sums[i] = sums[2 * (i - 16)] + sums[2 * (i - 16) + 1];
        }
        for (i, &sum) in sums.iter().enumerate() {
            keep(i, sum);
        }
    }
}
