//! From logits to a token: `docs/numerics.md`, section 7.
//!
//! Order: repetition penalty, temperature, top-k, top-p, min-p, draw. Candidates are taken by (logit descending, id
//! ascending); probabilities are f64.

use std::collections::BTreeSet;

use kbit_tensor::{Error, Result};

/// How a request's tokens are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0: the most likely token.
    pub temperature: f32,
    /// Only the k most likely; 0: all.
    pub top_k: usize,
    /// Only the fewest most likely whose probabilities reach this sum; 1: all.
    pub top_p: f32,
    /// Only those at least this many times as likely as the most likely; 0: all.
    pub min_p: f32,
    /// Logits of tokens already in the sequence are divided by this when positive, multiplied when negative; 1: off.
    pub repetition_penalty: f32,
    /// Key of the random draws.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
        }
    }
}

impl Sampling {
    /// Whether every field is in its range.
    ///
    /// # Errors
    /// [`Error::Argument`] naming the field, its range and its value.
    pub fn validate(&self) -> Result<()> {
        let fields = [
            (
                "temperature",
                self.temperature,
                0.0..=f32::MAX,
                "finite and at least 0",
            ),
            (
                "top_p",
                self.top_p,
                f32::MIN_POSITIVE..=1.0,
                "above 0 and at most 1",
            ),
            ("min_p", self.min_p, 0.0..=1.0, "0..=1"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                f32::MIN_POSITIVE..=f32::MAX,
                "finite and above 0",
            ),
        ];
        for (name, value, range, words) in fields {
            if !range.contains(&value) {
                return Err(Error::Argument(format!(
                    "{name} must be {words}, is {value}"
                )));
            }
        }
        Ok(())
    }

    /// Whether the token is simply the arg-max of the logits.
    pub fn greedy(&self) -> bool {
        self.temperature == 0.0 && self.repetition_penalty == 1.0
    }

    /// The next token.
    ///
    /// `logits` (vocab,) are used up; `seen` are the ids of the sequence so far (looked at only for a repetition
    /// penalty); `drawn` is the number of tokens drawn so far, which with the seed decides the draw.
    ///
    /// # Errors
    /// As [`candidates`](Self::candidates).
    pub fn sample(
        &self,
        logits: &mut [f32],
        seen: impl IntoIterator<Item = u32>,
        drawn: u64,
    ) -> Result<u32> {
        let mut order = self.order(logits, seen)?;
        let kept = if self.top_p < 1.0 || self.min_p > 0.0 {
            self.kept(&mut order)
        } else {
            order.len()
        };
        let total: f64 = if kept == order.len() {
            order.total
        } else {
            (0..kept).map(|i| order.get(i).1).sum()
        };
        let target = uniform(self.seed, drawn) * total;
        let mut sum = 0.0;
        for i in 0..kept {
            let (id, p) = order.get(i);
            sum += p;
            if target < sum {
                return Ok(id);
            }
        }
        // Only rounding of the sums gets here.
        Ok(order.get(kept - 1).0)
    }

    /// The ids that may be drawn, most likely first, with their weights (the first has 1). Never empty.
    ///
    /// # Errors
    /// [`Error::Device`] when a logit is NaN or infinite, or all are minus infinity.
    pub fn candidates(
        &self,
        logits: &mut [f32],
        seen: impl IntoIterator<Item = u32>,
    ) -> Result<Vec<(u32, f64)>> {
        let mut order = self.order(logits, seen)?;
        Ok((0..self.kept(&mut order)).map(|i| order.get(i)).collect())
    }

    /// Everything up to top-k.
    fn order<'a>(
        &self,
        logits: &'a mut [f32],
        seen: impl IntoIterator<Item = u32>,
    ) -> Result<Order<'a>> {
        if let Some((id, v)) = logits
            .iter()
            .enumerate()
            .find(|(_, v)| v.is_nan() || **v == f32::INFINITY)
        {
            return Err(Error::Device(format!(
                "the logit of token {id} is {v}: the model's arithmetic broke down"
            )));
        }
        if self.repetition_penalty != 1.0 {
            for id in seen.into_iter().collect::<BTreeSet<u32>>() {
                if let Some(v) = logits.get_mut(id as usize) {
                    *v = if *v < 0.0 {
                        *v * self.repetition_penalty
                    } else {
                        *v / self.repetition_penalty
                    };
                }
            }
        }
        let top_k = if self.temperature == 0.0 {
            1
        } else {
            self.top_k
        };
        let order = Order::new(
            logits,
            top_k,
            if self.temperature == 0.0 {
                1.0
            } else {
                self.temperature
            },
        );
        order.ok_or_else(|| {
            Error::Device("no token is possible: every logit is minus infinity".into())
        })
    }

    /// How many of the ordered ids top-p and min-p leave.
    fn kept(&self, order: &mut Order) -> usize {
        let (goal, least) = (f64::from(self.top_p) * order.total, f64::from(self.min_p));
        let mut sum = 0.0;
        for i in 0..order.len() {
            let p = order.get(i).1;
            // The first one always stays: nothing before it reaches a goal above 0, and its weight is 1.
            if (self.top_p < 1.0 && sum >= goal) || p < least {
                return i.max(1);
            }
            sum += p;
        }
        order.len()
    }
}

/// Possible ids by (logit descending, id ascending), sorted only as far as somebody looks: most draws need few of many.
struct Order<'a> {
    logits: &'a [f32],
    /// The first `sorted` in order, all others behind them.
    keys: Vec<u64>,
    sorted: usize,
    temperature: f32,
    /// The largest logit over the temperature.
    max: f64,
    /// Sum of all weights.
    total: f64,
}

impl<'a> Order<'a> {
    /// The first `top` ids (0: all) whose logit is not minus infinity; None if there are none.
    fn new(logits: &'a [f32], top: usize, temperature: f32) -> Option<Self> {
        let keys = keys(logits, top);
        let mut order = Self {
            logits,
            keys,
            sorted: 0,
            temperature,
            max: 0.0,
            total: 0.0,
        };
        let &best = order.keys.iter().min()?;
        order.max = order.scaled(best as u32);
        // A temperature close to 0 makes infinities of finite logits: there the best one takes everything.
        if !order.max.is_finite() {
            order.keys = vec![best];
            order.max = 0.0;
            order.temperature = f32::INFINITY;
        }
        order.total = order.keys.iter().map(|&key| order.weight(key as u32)).sum();
        Some(order)
    }

    fn len(&self) -> usize {
        self.keys.len()
    }

    fn scaled(&self, id: u32) -> f64 {
        f64::from(self.logits[id as usize] / self.temperature)
    }

    fn weight(&self, id: u32) -> f64 {
        libm::exp(self.scaled(id) - self.max)
    }

    /// The i-th id and its weight.
    fn get(&mut self, i: usize) -> (u32, f64) {
        while i >= self.sorted {
            let (from, more) = (self.sorted, (3 * self.sorted).max(64));
            let rest = &mut self.keys[from..];
            if more < rest.len() {
                rest.select_nth_unstable(more);
            }
            let more = more.min(rest.len());
            rest[..more].sort_unstable();
            self.sorted += more;
        }
        let id = self.keys[i] as u32;
        (id, self.weight(id))
    }
}

/// One integer for each id that sorts as wanted: the logit's bits made monotone and turned round, then the id. Only the
/// first `top` (in no order) when that is not 0, and none whose logit is minus infinity.
fn keys(logits: &[f32], top: usize) -> Vec<u64> {
    let key = |(id, &v): (usize, &f32)| {
        let bits = (v + 0.0).to_bits();
        let ascending = if bits >> 31 == 0 {
            bits | 1 << 31
        } else {
            !bits
        };
        u64::from(!ascending) << 32 | id as u64
    };
    let possible = logits
        .iter()
        .enumerate()
        .filter(|(_, v)| **v > f32::NEG_INFINITY);
    let mut keys: Vec<u64> = possible.map(key).collect();
    if top > 0 && top < keys.len() {
        keys.select_nth_unstable(top - 1);
        keys.truncate(top);
    }
    keys
}

/// Log-probabilities of `logits`, before anything changed them.
pub struct LogProbs<'a> {
    logits: &'a [f32],
    /// Logarithm of the sum of exponentials.
    norm: f64,
}

impl<'a> LogProbs<'a> {
    /// Over one row of logits (vocab,).
    pub fn new(logits: &'a [f32]) -> Self {
        let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let sum: f64 = logits.iter().map(|&v| libm::exp(f64::from(v) - max)).sum();
        Self {
            logits,
            norm: max + libm::log(sum),
        }
    }

    /// Natural logarithm of the probability of `id`.
    pub fn of(&self, id: u32) -> f32 {
        (f64::from(self.logits[id as usize]) - self.norm) as f32
    }

    /// The `n` most likely ids and their log-probabilities, most likely first.
    pub fn top(&self, n: usize) -> Vec<(u32, f32)> {
        if n == 0 {
            return Vec::new();
        }
        let mut keys = keys(self.logits, n);
        keys.sort_unstable();
        keys.into_iter()
            .map(|key| (key as u32, self.of(key as u32)))
            .collect()
    }
}

/// A number in 0..1 for the `counter`-th draw of `seed`: 53 bits of one Philox block.
pub fn uniform(seed: u64, counter: u64) -> f64 {
    let block = philox(
        [counter as u32, (counter >> 32) as u32, 0, 0],
        [seed as u32, (seed >> 32) as u32],
    );
    let bits = u64::from(block[1]) << 32 | u64::from(block[0]);
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// Philox 4x32 with ten rounds (Salmon et al., 2011).
pub fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = u64::from(counter[0]) * 0xD251_1F53;
        let b = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [
            key[0].wrapping_add(0x9E37_79B9),
            key[1].wrapping_add(0xBB67_AE85),
        ];
    }
    counter
}
