//! Which instruction sets this processor has, and running an operation on one of them.

use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

use crate::Simd;
#[cfg(target_arch = "aarch64")]
use crate::isa::neon::{Neon, NeonI8mm};
use crate::isa::scalar::Scalar;
#[cfg(target_arch = "x86_64")]
use crate::isa::{
    avx2::{Avx2, AvxVnni},
    avx512::{Amx, Avx512, Avx512Vbmi},
};

/// An instruction set, weakest first within a family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Isa {
    /// Plain code: the definition.
    Scalar,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX2 with 256-bit VNNI.
    AvxVnni,
    /// AVX-512 F, BW, VL, DQ and VNNI.
    Avx512,
    /// The same with VBMI.
    Avx512Vbmi,
    /// The same with AMX int8 tiles.
    Amx,
    /// NEON with dot products.
    Neon,
    /// NEON with int8 matrix products.
    NeonI8mm,
}

impl Isa {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Scalar,
        Self::Avx2,
        Self::AvxVnni,
        Self::Avx512,
        Self::Avx512Vbmi,
        Self::Amx,
        Self::Neon,
        Self::NeonI8mm,
    ];

    /// As `KBIT_ISA` says it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avxvnni",
            Self::Avx512 => "avx512",
            Self::Avx512Vbmi => "avx512vbmi",
            Self::Amx => "amx",
            Self::Neon => "neon",
            Self::NeonI8mm => "neoni8mm",
        }
    }

    /// What this processor has, weakest first.
    pub fn available() -> Vec<Self> {
        Self::ALL
            .into_iter()
            .filter(|isa| isa.is_available())
            .collect()
    }

    /// Whether this processor has it.
    pub fn is_available(self) -> bool {
        match self {
            Self::Scalar => Scalar::new().is_some(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => Avx2::new().is_some(),
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => AvxVnni::new().is_some(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => Avx512::new().is_some(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vbmi => Avx512Vbmi::new().is_some(),
            #[cfg(target_arch = "x86_64")]
            Self::Amx => Amx::new().is_some(),
            #[cfg(target_arch = "aarch64")]
            Self::Neon => Neon::new().is_some(),
            #[cfg(target_arch = "aarch64")]
            Self::NeonI8mm => NeonI8mm::new().is_some(),
            _ => false,
        }
    }

    /// What to use: `KBIT_ISA` if set, else the best there is. Looked at once a process.
    ///
    /// # Errors
    /// [`IsaError`] when `KBIT_ISA` names something unknown or something this processor lacks.
    pub fn chosen() -> Result<Self, IsaError> {
        static CHOSEN: OnceLock<Result<Isa, IsaError>> = OnceLock::new();
        CHOSEN
            .get_or_init(|| {
                let asked = std::env::var_os("KBIT_ISA").unwrap_or_default();
                Self::parse(&asked.to_string_lossy())
            })
            .clone()
    }

    /// The instruction set of a name; empty means the best there is.
    ///
    /// # Errors
    /// [`IsaError`] when the name is unknown or this processor lacks it.
    pub fn parse(name: &str) -> Result<Self, IsaError> {
        let available = Self::available();
        if name.is_empty() {
            return Ok(available.last().copied().unwrap_or(Self::Scalar));
        }
        let found = available.iter().copied().find(|isa| isa.name() == name);
        found.ok_or_else(|| IsaError {
            asked: name.to_owned(),
            available,
        })
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Isa {
    type Err = IsaError;
    fn from_str(name: &str) -> Result<Self, IsaError> {
        Self::parse(name)
    }
}

/// An instruction set that this processor does not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IsaError {
    asked: String,
    available: Vec<Isa>,
}

impl fmt::Display for IsaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.available.iter().map(|isa| isa.name()).collect();
        write!(
            f,
            "instruction set {:?} asked, this processor has {}",
            self.asked,
            names.join(", ")
        )
    }
}

impl std::error::Error for IsaError {}

/// Who made the processor, as far as kernels care: how it fetches memory differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// AMD.
    Amd,
    /// Anybody else.
    Other,
}

impl Vendor {
    /// Of this processor.
    pub fn here() -> Self {
        static HERE: OnceLock<Vendor> = OnceLock::new();
        *HERE.get_or_init(|| if is_amd() { Self::Amd } else { Self::Other })
    }
}

#[cfg(target_arch = "x86_64")]
fn is_amd() -> bool {
    let leaf = std::arch::x86_64::__cpuid(0);
    [leaf.ebx, leaf.edx, leaf.ecx]
        .map(u32::to_le_bytes)
        .as_flattened()
        == b"AuthenticAMD"
}

#[cfg(not(target_arch = "x86_64"))]
fn is_amd() -> bool {
    false
}

/// Whether this processor has `isa`, asked of `detect` once a process: every operation wants to know.
#[inline]
pub(crate) fn detected(isa: Isa, detect: impl FnOnce() -> bool) -> bool {
    const NO: u8 = 1;
    const YES: u8 = 2;
    static ANSWERS: [AtomicU8; Isa::ALL.len()] = [const { AtomicU8::new(0) }; Isa::ALL.len()];
    let answer = &ANSWERS[isa as usize];
    match answer.load(Relaxed) {
        YES => true,
        NO => false,
        _ => {
            let has = detect();
            answer.store(if has { YES } else { NO }, Relaxed);
            has
        }
    }
}

/// An algorithm for any instruction set. `eval` should be `#[inline(always)]`, and so should every function below it that
/// handles vectors: they are compiled for the instruction set of the shell they are inlined into.
pub trait SimdOp {
    /// What it gives.
    type Output;
    /// Whether it has to do with [`Simd::product`]. AMX has nothing else of its own: other operations are compiled once for it and
    /// AVX-512 with VBMI.
    const TILES: bool = false;
    /// The body.
    fn eval<S: Simd>(self, s: S) -> Self::Output;
}

/// Runs `op` on `isa`.
///
/// # Panics
/// When this processor lacks `isa`; values from [`Isa::chosen`] and [`Isa::available`] never do.
pub fn dispatch<O: SimdOp>(isa: Isa, op: O) -> O::Output {
    fn on<S: Simd, O: SimdOp>(isa: Isa, op: O) -> O::Output {
        match S::new() {
            Some(s) => s.run(op),
            None => panic!("this processor lacks {isa}"),
        }
    }
    match isa {
        Isa::Scalar => on::<Scalar, O>(isa, op),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => on::<Avx2, O>(isa, op),
        #[cfg(target_arch = "x86_64")]
        Isa::AvxVnni => on::<AvxVnni, O>(isa, op),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => on::<Avx512, O>(isa, op),
        #[cfg(target_arch = "x86_64")]
        Isa::Amx if const { O::TILES } => on::<Amx, O>(isa, op),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512Vbmi | Isa::Amx => on::<Avx512Vbmi, O>(isa, op),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => on::<Neon, O>(isa, op),
        #[cfg(target_arch = "aarch64")]
        Isa::NeonI8mm => on::<NeonI8mm, O>(isa, op),
        #[allow(
            unreachable_patterns,
            reason = "which arms exist depends on the target"
        )]
        _ => panic!("this build has no {isa}"),
    }
}
