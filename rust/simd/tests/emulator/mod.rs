//! AMX for tests on processors without it: a handler of SIGILL carries out the instruction at which the thread stopped, as the
//! manual defines it, and continues behind it. So the tests run the very machine code that a processor with AMX runs: its
//! encodings, registers, addresses and loops. What it cannot tell is speed.
#![allow(unsafe_code, reason = "it works on registers and memory of threads")]
#![allow(
    dead_code,
    unused_imports,
    reason = "not every test crate that includes this file counts instructions"
)]

use kbit_simd::Isa;

/// What this machine can run, AMX emulated where it is missing and AVX-512 with VBMI is not.
///
/// # Panics
/// When the emulated AMX fails the check that the library makes of AMX.
pub(crate) fn instruction_sets() -> Vec<Isa> {
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    if Isa::Avx512Vbmi.is_available() && !Isa::Amx.is_available() {
        linux::install();
    }
    Isa::available()
}

/// Whether AMX is emulated; if not, it is in the processor or not to be had at all.
pub(crate) fn emulated() -> bool {
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    return linux::installed();
    #[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
    false
}

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub(crate) use linux::{COUNTED, configured, counts};

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod linux {
    use std::cell::UnsafeCell;
    use std::sync::Once;
    use std::sync::atomic::{AtomicU64, Ordering};

    use libc::{c_int, c_void, siginfo_t, ucontext_t};

    /// What [`counts`] counts.
    pub(crate) const COUNTED: [&str; 6] = [
        "ldtilecfg",
        "tilerelease",
        "tileloadd",
        "tilestored",
        "tdpbssd",
        "tilezero",
    ];

    static DONE: [AtomicU64; COUNTED.len()] = [const { AtomicU64::new(0) }; COUNTED.len()];
    static INSTALL: Once = Once::new();

    /// How many instructions of each of the [`COUNTED`] were carried out.
    pub(crate) fn counts() -> [u64; COUNTED.len()] {
        std::array::from_fn(|i| DONE[i].load(Ordering::Relaxed))
    }

    /// Whether this thread's tiles are configured.
    pub(crate) fn configured() -> bool {
        // SAFETY: only this thread and its own signal handler use them, and no instruction is being carried out.
        TILES.with(|tiles| unsafe { (*tiles.get()).configured })
    }

    pub(super) fn installed() -> bool {
        INSTALL.is_completed()
    }

    pub(super) fn install() {
        INSTALL.call_once(|| {
            // SAFETY: `handle` has the signature that SA_SIGINFO asks for and uses only what a handler may.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction =
                    handle as extern "C" fn(c_int, *mut siginfo_t, *mut c_void) as usize;
                action.sa_flags = libc::SA_SIGINFO;
                assert_eq!(
                    libc::sigaction(libc::SIGILL, &raw const action, std::ptr::null_mut()),
                    0
                );
                assert!(
                    kbit_simd::assume_amx(),
                    "the library's check of AMX failed under emulation"
                );
            }
        });
    }

    /// The tile registers of a thread: palette 1.
    struct Tiles {
        configured: bool,
        rows: [usize; 8],
        row_bytes: [usize; 8],
        data: [[[u8; 64]; 16]; 8],
    }

    thread_local! {
        static TILES: UnsafeCell<Tiles> = const {
            UnsafeCell::new(Tiles {
                configured: false,
                rows: [0; 8],
                row_bytes: [0; 8],
                data: [[[0; 64]; 16]; 8],
            })
        };
    }

    /// Says what is wrong and ends the process: what the processor would do with an exception.
    fn refuse(what: &str) -> ! {
        // SAFETY: both may be called from a signal handler; the text is readable.
        unsafe {
            for text in ["AMX emulator: ", what, "\n"] {
                libc::write(2, text.as_ptr().cast(), text.len());
            }
            libc::abort()
        }
    }

    fn check(good: bool, otherwise: &str) {
        if !good {
            refuse(otherwise);
        }
    }

    extern "C" fn handle(_: c_int, _: *mut siginfo_t, context: *mut c_void) {
        // SAFETY: the system gives the context of the stopped thread, and its instruction pointer points at an instruction.
        unsafe {
            let registers = &mut (*context.cast::<ucontext_t>()).uc_mcontext.gregs;
            let at = registers[libc::REG_RIP as usize] as *const u8;
            let length = TILES.with(|tiles| step(&mut *tiles.get(), at, registers));
            registers[libc::REG_RIP as usize] += length as i64;
        }
    }

    /// Register `number` as instructions number them.
    fn register(registers: &[i64], number: u8) -> usize {
        use libc::{
            REG_R8, REG_R9, REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15, REG_RAX, REG_RBP,
            REG_RBX, REG_RCX, REG_RDI, REG_RDX, REG_RSI, REG_RSP,
        };
        let order = [
            REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI, REG_R8, REG_R9,
            REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15,
        ];
        registers[order[usize::from(number)] as usize] as usize
    }

    /// A memory operand.
    struct Memory {
        /// Base and displacement.
        start: usize,
        /// Index times scale: from one row of a tile to the next.
        stride: usize,
        /// Whether there is an index byte, which tiles need.
        indexed: bool,
        /// Bytes from the byte of mode and registers on.
        length: usize,
    }

    /// Reads the memory operand that starts with the mode byte at `at`.
    unsafe fn memory(at: *const u8, x: u8, b: u8, registers: &[i64]) -> Memory {
        // SAFETY: the processor found an instruction here.
        unsafe {
            let (mode, rm) = (*at >> 6, *at & 7);
            let indexed = rm == 4;
            let mut length = if indexed { 2 } else { 1 };
            let (mut stride, mut base) = (0, rm | b << 3);
            if indexed {
                let sib = *at.add(1);
                base = sib & 7 | b << 3;
                let index = sib >> 3 & 7 | x << 3;
                if index != 4 {
                    stride = register(registers, index) << (sib >> 6);
                }
            }
            check(
                mode != 0 || base & 7 != 5,
                "an address without a base register is not supported",
            );
            let displacement = at.add(length);
            let displacement = match mode {
                0 => 0,
                1 => {
                    length += 1;
                    isize::from(displacement.cast::<i8>().read())
                }
                _ => {
                    length += 4;
                    displacement.cast::<i32>().read_unaligned() as isize
                }
            };
            Memory {
                start: register(registers, base).wrapping_add_signed(displacement),
                stride,
                indexed,
                length,
            }
        }
    }

    /// Carries out the instruction at `at`; gives its length.
    unsafe fn step(tiles: &mut Tiles, at: *const u8, registers: &[i64]) -> usize {
        // SAFETY: the processor found an instruction here.
        unsafe {
            let byte = |i: usize| *at.add(i);
            // Three bytes of VEX prefix: inverted register bits and the opcode map, then W, a register, L and the prefix.
            check(
                byte(0) == 0xc4 && byte(1) & 31 == 2,
                "an illegal instruction",
            );
            let (r, x, b) = (!byte(1) >> 7 & 1, !byte(1) >> 6 & 1, !byte(1) >> 5 & 1);
            let (wide, third, prefix) = (byte(2) >> 7, !byte(2) >> 3 & 15, byte(2) & 3);
            check(wide == 0 && byte(2) & 4 == 0, "an illegal instruction");
            let (opcode, mode) = (byte(3), byte(4));
            let tile = usize::from(mode >> 3 & 7);
            check(r == 0, "a tile register above 7");
            let counted = match (opcode, prefix, mode >> 6) {
                (0x49, 0, 3) if mode == 0xc0 => {
                    *tiles = Tiles {
                        configured: false,
                        rows: [0; 8],
                        row_bytes: [0; 8],
                        data: [[[0; 64]; 16]; 8],
                    };
                    DONE[1].fetch_add(1, Ordering::Relaxed);
                    return 5;
                }
                (0x49, 0, 0..=2) if tile == 0 && third == 0 => {
                    let operand = memory(at.add(4), x, b, registers);
                    configure(tiles, &*(operand.start as *const [u8; 64]));
                    DONE[0].fetch_add(1, Ordering::Relaxed);
                    return 4 + operand.length;
                }
                (0x49, 3, 3) if mode.trailing_zeros() >= 3 && third == 0 => {
                    check(tiles.rows[tile] > 0, "a tile without a shape");
                    tiles.data[tile] = [[0; 64]; 16];
                    DONE[5].fetch_add(1, Ordering::Relaxed);
                    return 5;
                }
                (0x4b, 3, 0..=2) => 2,
                (0x4b, 2, 0..=2) => 3,
                (0x5e, _, 3) => {
                    let (first, second) = (usize::from(mode & 7), usize::from(third));
                    check(b == 0 && second < 8, "a tile register above 7");
                    // The letters of tdpbXYd: no prefix is uu, 66 us, f3 su, f2 ss.
                    let (signed_first, signed_second) = (prefix >= 2, prefix == 3 || prefix == 1);
                    multiply(tiles, tile, first, second, signed_first, signed_second);
                    if prefix == 3 {
                        DONE[4].fetch_add(1, Ordering::Relaxed);
                    }
                    return 5;
                }
                _ => refuse("an illegal instruction"),
            };
            let operand = memory(at.add(4), x, b, registers);
            check(
                operand.indexed && third == 0 && tiles.configured,
                "a tile in memory without a stride, or no tiles configured",
            );
            let (rows, bytes) = (tiles.rows[tile], tiles.row_bytes[tile]);
            check(rows > 0, "a tile without a shape");
            let registers = &mut tiles.data[tile];
            if counted == 2 {
                *registers = [[0; 64]; 16];
            }
            for (row, register) in registers.iter_mut().enumerate().take(rows) {
                let memory = operand.start.wrapping_add(row.wrapping_mul(operand.stride));
                if counted == 2 {
                    std::ptr::copy_nonoverlapping(
                        memory as *const u8,
                        register.as_mut_ptr(),
                        bytes,
                    );
                } else {
                    std::ptr::copy_nonoverlapping(register.as_ptr(), memory as *mut u8, bytes);
                }
            }
            DONE[counted].fetch_add(1, Ordering::Relaxed);
            4 + operand.length
        }
    }

    /// `ldtilecfg`: palette, row to start with, 14 zeros, bytes of a row (16 bits) of 16 tiles, rows of 16 tiles.
    fn configure(tiles: &mut Tiles, from: &[u8; 64]) {
        check(
            from[0] == 1 && from[1] == 0 && from[2..16].iter().all(|&zero| zero == 0),
            "ldtilecfg: a palette other than 1, or reserved bytes",
        );
        for i in 0..16 {
            let bytes = usize::from(u16::from_le_bytes([from[16 + 2 * i], from[17 + 2 * i]]));
            let rows = usize::from(from[48 + i]);
            check(
                bytes <= 64 && rows <= 16 && (bytes == 0) == (rows == 0) && (i < 8 || rows == 0),
                "ldtilecfg: a shape that palette 1 has not",
            );
            if i < 8 {
                (tiles.rows[i], tiles.row_bytes[i]) = (rows, bytes);
            }
        }
        tiles.configured = true;
        tiles.data = [[[0; 64]; 16]; 8];
    }

    /// `tdpb..d c, a, b`: to every 32-bit number of C, the products of four bytes of A with four bytes of B, over all fours.
    fn multiply(tiles: &mut Tiles, c: usize, a: usize, b: usize, signed_a: bool, signed_b: bool) {
        check(
            tiles.configured && c != a && c != b && a != b,
            "a product of tiles that are not configured or not different",
        );
        let (rows, columns, fours) = (
            tiles.rows[c],
            tiles.row_bytes[c] / 4,
            tiles.row_bytes[a] / 4,
        );
        check(
            rows > 0
                && tiles.rows[a] == rows
                && tiles.row_bytes[b] == tiles.row_bytes[c]
                && tiles.rows[b] == fours
                && [a, b, c]
                    .iter()
                    .all(|&t| tiles.row_bytes[t].is_multiple_of(4)),
            "a product of tiles whose shapes do not fit",
        );
        let number = |byte: u8, signed: bool| {
            if signed {
                i32::from(byte as i8)
            } else {
                i32::from(byte)
            }
        };
        let mut result = [[0; 64]; 16];
        for m in 0..rows {
            for n in 0..columns {
                let four = |tile: &[u8; 64], i: usize| {
                    [
                        tile[4 * i],
                        tile[4 * i + 1],
                        tile[4 * i + 2],
                        tile[4 * i + 3],
                    ]
                };
                let mut sum = i32::from_le_bytes(four(&tiles.data[c][m], n));
                for k in 0..fours {
                    let x = four(&tiles.data[a][m], k);
                    let y = four(&tiles.data[b][k], n);
                    for i in 0..4 {
                        let product = number(x[i], signed_a) * number(y[i], signed_b);
                        sum = sum.wrapping_add(product);
                    }
                }
                result[m][4 * n..4 * n + 4].copy_from_slice(&sum.to_le_bytes());
            }
        }
        tiles.data[c] = result;
    }
}
