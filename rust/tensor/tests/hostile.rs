//! Files made to break readers: each is refused with a sentence or read for what it says, in little memory.
#![allow(clippy::print_stdout, reason = "tests count what they tried")]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use common::{Gguf, Random, open, safetensors};
use kbit_tensor::gguf::{GgmlType, Value};
use kbit_tensor::{DType, Error, TensorFile};

/// Counts the bytes a thread holds, and the most it held.
struct Counting;

thread_local! {
    static HELD: Cell<usize> = const { Cell::new(0) };
    static PEAK: Cell<usize> = const { Cell::new(0) };
}

fn count(change: impl Fn(usize) -> usize) {
    // Not there any more while a thread ends.
    let held = HELD.try_with(|held| {
        held.set(change(held.get()));
        held.get()
    });
    if let Ok(held) = held {
        PEAK.with(|peak| peak.set(peak.get().max(held)));
    }
}

#[allow(unsafe_code, reason = "an allocator that counts")]
// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(|held| held.wrapping_add(layout.size()));
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(|held| held.wrapping_add(layout.size()));
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(|held| held.saturating_sub(layout.size()));
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Opens a file and reads all of it; the most memory held on the way must be in proportion to the file.
fn read_all(bytes: &[u8]) -> Result<usize, Error> {
    let before = HELD.with(Cell::get);
    PEAK.with(|peak| peak.set(before));
    let result = open(bytes).and_then(|file| {
        let mut read = 0;
        for info in file.tensors() {
            match file.read(&info.name) {
                Ok(tensor) => read += tensor.bytes().len(),
                Err(Error::Unsupported(_)) => {}
                Err(other) => return Err(other),
            }
        }
        Ok(read)
    });
    let peak = PEAK.with(Cell::get) - before;
    // The copy of the file, its header, and blocks in f32 (at most 14 times as large as 2.6 bits).
    let allowed = (1 << 20) + 16 * bytes.len();
    assert!(
        peak <= allowed,
        "{peak} bytes held for a file of {}",
        bytes.len()
    );
    result
}

/// The file must be refused as ill-formed (or, where `unsupported`, as something that is not read) in these words.
fn refused(what: &str, bytes: &[u8], words: &str, unsupported: bool) {
    let Err(error) = read_all(bytes) else {
        panic!("{what}: accepted")
    };
    let right = match error {
        Error::Format(_) => !unsupported,
        Error::Unsupported(_) => unsupported,
        _ => false,
    };
    let text = error.to_string();
    assert!(
        right && text.contains(words),
        "{what}: {error:?} lacks {words:?}"
    );
    assert!(
        text.starts_with("test: "),
        "{what}: {text:?} does not name the file"
    );
}

#[test]
fn safetensors_that_are_refused() {
    let tensor = |name: &str, dtype: &str, shape: &str, from: u64, to: u64| {
        format!(
            "\"{name}\":{{\"dtype\":\"{dtype}\",\"shape\":{shape},\"data_offsets\":[{from},{to}]}}"
        )
    };
    let one = |dtype: &str, shape: &str, from: u64, to: u64| {
        format!("{{{}}}", tensor("a", dtype, shape, from, to))
    };
    let two = |b_from: u64, b_to: u64| {
        format!(
            "{{{},{}}}",
            tensor("a", "U8", "[4]", 0, 4),
            tensor("b", "U8", "[4]", b_from, b_to)
        )
    };
    let mut cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("empty", vec![], "8 bytes"),
        ("half a length", vec![1, 2, 3], "8 bytes"),
        ("no header", vec![0; 8], "not valid"),
        (
            "a text",
            b"A page of text, no tensors.\n".to_vec(),
            "neither GGUF nor safetensors",
        ),
        (
            "longest header",
            u64::MAX.to_le_bytes().to_vec(),
            "at most 100000000",
        ),
        (
            "header past the limit",
            100_000_001u64.to_le_bytes().to_vec(),
            "at most 100000000",
        ),
        (
            "header past the end",
            100u64.to_le_bytes().to_vec(),
            "but 0 follow",
        ),
        ("header is a list", safetensors("[]", &[]), "not valid"),
        (
            "header is two objects",
            safetensors("{}{}", &[]),
            "not valid",
        ),
        (
            "not UTF-8",
            [&3u64.to_le_bytes()[..], b"{\xff}"].concat(),
            "not valid",
        ),
        (
            "bytes after the tensors",
            safetensors("{}", &[0]),
            "the file holds 1",
        ),
        (
            "tensor past the end",
            safetensors(&one("U8", "[4]", 0, 4), &[0; 3]),
            "the file holds 3",
        ),
        (
            "hole at the start",
            safetensors(&one("U8", "[4]", 1, 5), &[0; 5]),
            "ends at 0",
        ),
        (
            "backwards",
            safetensors(&one("U8", "[4]", 4, 0), &[0; 4]),
            "ends at 0",
        ),
        ("overlap", safetensors(&two(3, 7), &[0; 7]), "ends at 4"),
        ("hole", safetensors(&two(5, 9), &[0; 9]), "ends at 4"),
        (
            "same bytes twice",
            safetensors(&two(0, 4), &[0; 4]),
            "ends at 4",
        ),
        (
            "too few bytes",
            safetensors(&one("F32", "[2]", 0, 4), &[0; 4]),
            "wants 8 bytes",
        ),
        (
            "too many bytes",
            safetensors(&one("F32", "[2]", 0, 12), &[0; 12]),
            "wants 8 bytes",
        ),
        (
            "half a byte",
            safetensors(&one("F4", "[3]", 0, 1), &[0; 1]),
            "wants 1.5 bytes",
        ),
        (
            "elements wrap",
            safetensors(&one("U8", "[4294967296,4294967296]", 0, 0), &[]),
            "2^64",
        ),
        (
            "bytes wrap",
            safetensors(&one("F64", "[2305843009213693952]", 0, 0), &[]),
            "2^64",
        ),
        (
            "size of 2^64",
            safetensors(&one("U8", "[18446744073709551616]", 0, 0), &[]),
            "not valid",
        ),
        (
            "negative size",
            safetensors(&one("U8", "[-1]", 0, 0), &[]),
            "not valid",
        ),
        (
            "fractional size",
            safetensors(&one("U8", "[1.0]", 0, 1), &[0]),
            "not valid",
        ),
        (
            "unknown type",
            safetensors(&one("Q9", "[1]", 0, 1), &[0]),
            "not valid",
        ),
        (
            "nine dimensions",
            safetensors(&one("U8", "[1,1,1,1,1,1,1,1,1]", 0, 1), &[0]),
            "at most 8",
        ),
        (
            "a lone surrogate",
            safetensors("{\"__metadata__\":{\"a\":\"\\ud800\"}}", &[]),
            "not valid",
        ),
        (
            "metadata of numbers",
            safetensors("{\"__metadata__\":{\"a\":1}}", &[]),
            "not valid",
        ),
        (
            "metadata twice",
            safetensors("{\"__metadata__\":{},\"__metadata__\":{}}", &[]),
            "twice",
        ),
        (
            "metadata key twice",
            safetensors("{\"__metadata__\":{\"a\":\"\",\"a\":\"\"}}", &[]),
            "twice",
        ),
        (
            "trailing comma",
            safetensors("{\"__metadata__\":{},}", &[]),
            "not valid",
        ),
    ];
    let twice = format!(
        "{{{},{}}}",
        tensor("a", "U8", "[4]", 0, 4),
        tensor("a", "U8", "[4]", 4, 8)
    );
    cases.push((
        "name twice",
        safetensors(&twice, &[0; 8]),
        "\"a\" is given twice",
    ));
    let spare = "[".repeat(65) + &"]".repeat(65);
    let deep = one("U8", "[1]", 0, 1).replace("{\"dtype\"", &format!("{{\"x\":{spare},\"dtype\""));
    cases.push(("deep", safetensors(&deep, &[0]), "nests deeper than 64"));
    let no_shape = "{\"a\":{\"dtype\":\"U8\",\"data_offsets\":[0,0]}}";
    cases.push(("no shape", safetensors(no_shape, &[]), "not valid"));
    for (what, bytes, words) in &cases {
        refused(what, bytes, words, false);
    }
    assert_eq!(cases.len(), 35);
}

#[test]
fn a_million_tensors_is_the_limit() {
    let header = |n: usize| {
        let entry =
            |i| format!("\"{i}\":{{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}");
        let all: Vec<String> = (0..n).map(entry).collect();
        safetensors(&format!("{{{}}}", all.join(",")), &[])
    };
    assert_eq!(open(&header(1_000_000)).unwrap().tensors().len(), 1_000_000);
    refused(
        "one more",
        &header(1_000_001),
        "more than 1000000 tensors",
        false,
    );
}

#[test]
fn odd_safetensors_that_are_read() {
    let ok = |header: &str, data: &[u8]| {
        open(&safetensors(header, data)).unwrap_or_else(|e| panic!("{header}: {e}"))
    };
    assert!(ok("{}", &[]).tensors().is_empty());
    assert!(ok(" \t\r\n{} \n", &[]).tensors().is_empty());
    assert!(ok("{\"__metadata__\":null}", &[]).metadata().is_empty());
    let scalar = ok(
        "{\"\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4]}}",
        &1.5f32.to_le_bytes(),
    );
    assert_eq!(scalar.read("").unwrap().to_f32(), [1.5]);
    // Empty tensors between others, an odd offset, a name that is not ASCII, entries in any order.
    let header = "{\"\\u00e9\":{\"dtype\":\"F16\",\"shape\":[2],\"data_offsets\":[1,5]},\
        \"none\":{\"shape\":[3,0,9],\"data_offsets\":[1,1],\"dtype\":\"I64\"},\
        \"byte\":{\"dtype\":\"U8\",\"shape\":[1,1,1,1,1,1,1,1],\"data_offsets\":[0,1]}}";
    let file = ok(header, &[7, 0, 0x3c, 0, 0xc0]);
    let names: Vec<&str> = file.tensors().iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names, ["byte", "none", "\u{e9}"]);
    assert_eq!(file.read("\u{e9}").unwrap().to_f32(), [1.0, -2.0]);
    assert_eq!(file.read("none").unwrap().shape(), [3, 0, 9]);
    assert_eq!(file.read("byte").unwrap().to_f32(), [7.0]);
    assert!(matches!(file.read("other"), Err(Error::Argument(_))));
    let types = [
        "F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I8", "U8", "I16", "U16", "I32", "U32",
        "I64", "U64", "BOOL",
    ];
    for name in types {
        let dtype = DType::from_name(name).unwrap();
        let header = format!(
            "{{\"t\":{{\"dtype\":\"{name}\",\"shape\":[2],\"data_offsets\":[0,{}]}}}}",
            2 * dtype.size()
        );
        let file = ok(&header, &vec![1; 2 * dtype.size()]);
        assert_eq!(file.read("t").unwrap().dtype(), dtype);
    }
    for name in [
        "F4",
        "F6_E2M3",
        "F6_E3M2",
        "F8_E8M0",
        "F8_E4M3FNUZ",
        "F8_E5M2FNUZ",
        "C64",
    ] {
        let bytes = match name {
            "F4" => 4,
            "C64" => 64,
            n if n.starts_with("F6") => 6,
            _ => 8,
        };
        let header = format!(
            "{{\"t\":{{\"dtype\":\"{name}\",\"shape\":[8],\"data_offsets\":[0,{bytes}]}}}}"
        );
        let error = ok(&header, &vec![0; bytes]).read("t").unwrap_err();
        assert!(
            matches!(&error, Error::Unsupported(m) if m.contains(name)),
            "{error}"
        );
    }
}

const U32: u32 = 4;
const STRING: u32 = 8;
const ARRAY: u32 = 9;

#[test]
fn gguf_that_is_refused() {
    let huge = 1u64 << 62;
    let q4 = GgmlType::Q4_K.id();
    let block = vec![0; 144];
    let new = Gguf::new;
    let with = |version, tensors, keys| Gguf {
        version,
        tensors,
        keys,
        body: vec![],
    };
    let mut nested = new().key("a", ARRAY);
    for _ in 0..4 {
        nested = nested.u32(ARRAY).u64(1);
    }
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        (
            "magic alone",
            b"GGUF".to_vec(),
            "4 bytes wanted, 0 are left",
        ),
        (
            "tensor count",
            with(3, huge, 0).file(1, &[0; 64]),
            "at most 1000000",
        ),
        (
            "tensor count past the end",
            with(3, 1000, 0).file(1, &[0; 64]),
            "72 bytes are left",
        ),
        (
            "key count",
            with(3, 0, huge).file(1, &[0; 64]),
            "at most 65536",
        ),
        (
            "key count past the end",
            with(3, 0, 100).file(1, &[0; 64]),
            "64 bytes are left",
        ),
        (
            "counts of 2^64",
            with(3, u64::MAX, u64::MAX).file(1, &[0; 64]),
            "at most",
        ),
        (
            "key length wraps",
            Gguf {
                keys: 1,
                ..new().u64(u64::MAX)
            }
            .file(1, &[0; 32]),
            "at most 67108864",
        ),
        (
            "key past the end",
            Gguf {
                keys: 1,
                ..new().u64(500)
            }
            .file(1, &[0; 32]),
            "are left",
        ),
        (
            "string length wraps",
            new().key("a", STRING).u64(u64::MAX).file(1, &[]),
            "at most 67108864",
        ),
        (
            "string past the end",
            new().key("a", STRING).u64(9).file(1, &[0; 8]),
            "8 are left",
        ),
        (
            "string not UTF-8",
            new().key("a", STRING).u64(1).raw(&[0xff]).file(1, &[]),
            "not UTF-8",
        ),
        (
            "key not UTF-8",
            Gguf {
                keys: 1,
                ..new().u64(1).raw(&[0xff]).u32(U32).u32(0)
            }
            .file(1, &[0; 9]),
            "not UTF-8",
        ),
        (
            "value type 13",
            new().key("a", 13).file(1, &[0; 64]),
            "value type 13",
        ),
        (
            "element type 13",
            new().key("a", ARRAY).u32(13).u64(1).file(1, &[0; 64]),
            "element type 13",
        ),
        (
            "boolean 2",
            new().key("a", 7).raw(&[2]).file(1, &[]),
            "boolean 2",
        ),
        (
            "booleans 2",
            new()
                .key("a", ARRAY)
                .u32(7)
                .u64(2)
                .raw(&[1, 2])
                .file(1, &[]),
            "boolean 2",
        ),
        (
            "array count wraps",
            new().key("a", ARRAY).u32(10).u64(huge).file(1, &[0; 64]),
            "at most 16777216",
        ),
        (
            "array past the end",
            new().key("a", ARRAY).u32(10).u64(9).file(1, &[0; 64]),
            "64 bytes are left",
        ),
        (
            "strings past the end",
            new()
                .key("a", ARRAY)
                .u32(STRING)
                .u64(1 << 24)
                .file(1, &[0; 64]),
            "64 bytes are left",
        ),
        (
            "arrays past the end",
            new().key("a", ARRAY).u32(ARRAY).u64(6000).file(1, &[0; 64]),
            "64 bytes are left",
        ),
        (
            "arrays nest",
            nested.u32(U32).u64(0).file(1, &[0; 64]),
            "deeper than 4",
        ),
        (
            "key twice",
            new().key("a", U32).u32(1).key("a", U32).u32(2).file(1, &[]),
            "given twice",
        ),
        (
            "alignment 0",
            new().key("general.alignment", U32).u32(0).file(1, &[]),
            "power of two",
        ),
        (
            "alignment 24",
            new().key("general.alignment", U32).u32(24).file(1, &[]),
            "power of two",
        ),
        (
            "alignment as u64",
            new().key("general.alignment", 10).u64(32).file(1, &[]),
            "power of two",
        ),
        (
            "five dimensions",
            new().tensor("a", &[1; 5], 0, 0).file(32, &[0; 4]),
            "5 dimensions",
        ),
        (
            "2^32-1 dimensions",
            Gguf {
                tensors: 1,
                ..new().string("a").u32(u32::MAX)
            }
            .file(1, &[0; 64]),
            "dimensions",
        ),
        (
            "elements wrap",
            new()
                .tensor("a", &[1 << 32, 1 << 32], 0, 0)
                .file(32, &[0; 4]),
            "2^64",
        ),
        (
            "bytes wrap",
            new().tensor("a", &[huge], 0, 0).file(32, &[0; 4]),
            "2^64",
        ),
        (
            "quantised bytes wrap",
            new()
                .tensor("a", &[1 << 40, 1 << 23], 15, 0)
                .file(32, &[0; 4]),
            "the file has",
        ),
        (
            "negative dimension",
            new()
                .tensor("a", &[u64::MAX, 2, 1, 1], 0, 0)
                .file(32, &[0; 4]),
            "2^64",
        ),
        (
            "sum wraps",
            new()
                .tensor("a", &[1 << 61], 24, 0)
                .tensor("b", &[u64::MAX - 30], 24, 1 << 61)
                .file(32, &[0; 4]),
            "2^64",
        ),
        (
            "rounding up wraps",
            new()
                .tensor("a", &[u64::MAX - 3], 24, 0)
                .tensor("b", &[4], 24, 0)
                .file(32, &[0; 4]),
            "ends at",
        ),
        (
            "exabytes",
            new().tensor("a", &[1 << 60], 24, 0).file(32, &[0; 64]),
            "the file has",
        ),
        (
            "part of a block",
            new().tensor("a", &[255, 1], q4, 0).file(32, &block),
            "not a multiple of 256",
        ),
        (
            "past the end",
            new().tensor("a", &[256, 2], q4, 0).file(32, &block),
            "the file has",
        ),
        (
            "offset past the end",
            new().tensor("a", &[256], q4, 1 << 40).file(32, &block),
            "end at 0",
        ),
        (
            "overlap",
            new()
                .tensor("a", &[256], q4, 0)
                .tensor("b", &[256], q4, 0)
                .file(32, &[0; 400]),
            "end at 160",
        ),
        (
            "hole",
            new()
                .tensor("a", &[8], 24, 0)
                .tensor("b", &[8], 24, 64)
                .file(32, &[0; 99]),
            "end at 32",
        ),
        (
            "tensor twice",
            new()
                .tensor("a", &[8], 24, 0)
                .tensor("a", &[8], 24, 32)
                .file(32, &[0; 40]),
            "given twice",
        ),
        (
            "alignment past the end",
            new()
                .key("general.alignment", U32)
                .u32(1 << 31)
                .tensor("a", &[8], 24, 0)
                .file(32, &[0; 40]),
            "the file has",
        ),
        (
            "a tensor name past the end",
            Gguf {
                tensors: 1,
                ..new().u64(1 << 25)
            }
            .file(1, &[0; 64]),
            "are left",
        ),
    ];
    for (what, bytes, words) in &cases {
        refused(what, bytes, words, false);
    }
    assert_eq!(cases.len(), 42);
    let not_read: Vec<(&str, Vec<u8>, &str)> = vec![
        ("version 0", with(0, 0, 0).file(1, &[]), "versions 2 and 3"),
        ("version 1", with(1, 0, 0).file(1, &[]), "version 1"),
        ("version 4", with(4, 0, 0).file(1, &[]), "version 4"),
        (
            "big-endian",
            with(3u32.swap_bytes(), 0, 0).file(1, &[]),
            "version 3 in big-endian",
        ),
        (
            "retired type",
            new().tensor("a", &[32], 4, 0).file(32, &[0; 32]),
            "Q4_2",
        ),
        (
            "unknown type",
            new().tensor("a", &[32], 99, 0).file(32, &[0; 32]),
            "type number 99",
        ),
    ];
    for (what, bytes, words) in &not_read {
        refused(what, bytes, words, true);
    }
}

#[test]
fn odd_gguf_that_is_read() {
    for (version, alignment) in [(2, 8u32), (3, 16), (3, 64), (2, 1), (3, 4096)] {
        let mut header = Gguf::new()
            .key("general.alignment", U32)
            .u32(alignment)
            .tensor("\u{e9}", &[3, 2], 24, 0)
            .tensor(
                "scalar",
                &[],
                0,
                u64::from(6u32.next_multiple_of(alignment)),
            );
        header.version = version;
        let first = 6usize.next_multiple_of(alignment as usize);
        let mut data = vec![1, 2, 3, 4, 5, 250];
        data.resize(first, 0);
        data.extend_from_slice(&2.5f32.to_le_bytes());
        let file = open(&header.file(alignment as usize, &data)).unwrap();
        assert_eq!(file.read("\u{e9}").unwrap().shape(), [2, 3]);
        assert_eq!(
            file.read("\u{e9}").unwrap().to_f32(),
            [1.0, 2.0, 3.0, 4.0, 5.0, -6.0]
        );
        assert_eq!(file.read("scalar").unwrap().to_f32(), [2.5]);
    }
    // No tensors, no padding after the header; empty arrays, empty strings, empty tensors.
    let file = Gguf::new()
        .key("s", STRING)
        .string("")
        .key("a", ARRAY)
        .u32(STRING)
        .u64(0);
    let file = open(&file.file(1, &[])).unwrap();
    assert_eq!(file.metadata().len(), 2);
    assert_eq!(file.metadata()[0].1, Value::String(String::new()));
    let file = open(&Gguf::new().tensor("none", &[256, 0], 12, 0).file(1, &[])).unwrap();
    assert!(file.read("none").unwrap().is_empty());
    // Every type that has a size can be listed; those that are not read are refused by name.
    let mut listed = 0;
    for &kind in GgmlType::ALL {
        let header = Gguf::new().tensor("a", &[256, 1], kind.id(), 0);
        let file =
            open(&header.file(32, &vec![0; 256 / kind.block() * kind.block_bytes()])).unwrap();
        assert_eq!(file.tensors()[0].stored.name(), kind.name());
        listed += 1;
        let readable = kind.plain().is_some() || kind.is_imported();
        match file.read("a") {
            Ok(_) => assert!(readable, "{}", kind.name()),
            Err(Error::Unsupported(m)) => assert!(!readable && m.contains(kind.name()), "{m}"),
            Err(other) => panic!("{other}"),
        }
    }
    assert_eq!(listed, 34);
}

/// A valid safetensors file of about 4 KiB.
fn small_safetensors() -> Vec<u8> {
    let mut data = Random(1).bytes(3000);
    data.truncate(3000);
    let header = "{\"__metadata__\":{\"format\":\"pt\",\"a\":\"\\u00e9\\n\"},\
        \"model.layers.0.weight\":{\"dtype\":\"BF16\",\"shape\":[10,50],\"data_offsets\":[0,1000]},\
        \"bias\":{\"dtype\":\"F32\",\"shape\":[500],\"data_offsets\":[1000,3000]}}";
    let padded = format!("{header:<1000}");
    safetensors(&padded, &data)
}

/// A valid GGUF file of about 4 KiB.
fn small_gguf() -> Vec<u8> {
    let mut header = Gguf::new()
        .key("general.architecture", STRING)
        .string("llama");
    header = header
        .key("general.alignment", U32)
        .u32(32)
        .key("eps", 6)
        .u32(0x3727_c5ac);
    header = header.key("tokens", ARRAY).u32(STRING).u64(40);
    for i in 0..40 {
        header = header.string(&format!("token{i}"));
    }
    header = header.key("scores", ARRAY).u32(6).u64(40);
    for i in 0..40u32 {
        header = header.u32(i);
    }
    header = header
        .tensor("a", &[256, 10], GgmlType::Q4_K.id(), 0)
        .tensor("b", &[32, 16], 1, 1440);
    header = header.tensor("c", &[7], 0, 2464);
    header.file(32, &Random(2).bytes(2492))
}

/// Every truncation and every flip of a bit: an error of the reader, or a file that reads to the end.
fn damage(name: &str, good: &[u8]) {
    assert!(
        (3500..4500).contains(&good.len()),
        "{name}: {} bytes",
        good.len()
    );
    read_all(good).unwrap();
    let (mut read, mut refused) = (0, 0);
    let mut check = |what: String, bytes: &[u8]| match read_all(bytes) {
        Ok(_) => read += 1,
        Err(Error::Format(_) | Error::Unsupported(_)) => refused += 1,
        Err(other) => panic!("{name}, {what}: {other:?}"),
    };
    for len in 0..good.len() {
        check(format!("cut to {len}"), &good[..len]);
    }
    let mut bad = good.to_vec();
    for at in 0..good.len() {
        for bit in 0..8 {
            bad[at] ^= 1 << bit;
            check(format!("byte {at} bit {bit}"), &bad);
            bad[at] = good[at];
        }
    }
    println!(
        "{name}: {} cases, {refused} refused, {read} read",
        9 * good.len()
    );
    assert_eq!(read + refused, 9 * good.len());
    assert!(refused > good.len() && read > good.len());
}

#[test]
fn damaged_safetensors() {
    damage("safetensors", &small_safetensors());
}

#[test]
fn damaged_gguf() {
    damage("GGUF", &small_gguf());
}

#[test]
fn files_that_are_none() {
    let directory = std::env::temp_dir();
    for path in [directory.clone(), directory.join("kbit-no-such-file")] {
        let open = TensorFile::open(&path).unwrap_err();
        let mapped = TensorFile::open_mapped(&path).unwrap_err();
        assert!(matches!(open, Error::Io { .. }), "{open}");
        assert!(matches!(mapped, Error::Io { .. }), "{mapped}");
    }
    let empty = directory.join(format!("kbit-empty-{}", std::process::id()));
    std::fs::write(&empty, []).unwrap();
    for result in [TensorFile::open(&empty), TensorFile::open_mapped(&empty)] {
        assert!(matches!(result, Err(Error::Format(_) | Error::Io { .. })));
    }
    std::fs::remove_file(&empty).unwrap();
}

#[test]
fn a_file_that_shrinks_while_open_is_an_error() {
    let path = std::env::temp_dir().join(format!("kbit-shrinks-{}", std::process::id()));
    std::fs::write(&path, small_safetensors()).unwrap();
    let file = TensorFile::open(&path).unwrap();
    std::fs::write(&path, [0; 2000]).unwrap();
    let error = file.read("bias").unwrap_err();
    std::fs::remove_file(&path).unwrap();
    assert!(matches!(error, Error::Io { .. }), "{error}");
}
