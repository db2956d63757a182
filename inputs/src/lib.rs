//! What a parser of hostile input has to guarantee, whatever generates the input: a fuzzer guided by the code's
//! branches (`scripts/fuzz`), or the campaign here, which only needs the stable toolchain and runs with the tests.
//!
//! A target is a function over bytes that panics if something is wrong. [`check`] adds the bounds: it ends soon, and
//! allocates no more than a constant plus a multiple of its input. Allocations are counted per thread.

#![allow(clippy::print_stdout, reason = "a campaign says its seed")]

use std::{
    env, fs,
    path::{Path, PathBuf},
    str::FromStr,
    time::{Duration, Instant},
};

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

/// The most that a target may hold at a time, beyond a multiple of its input.
const ALLOCATED_BYTES_MAX: u64 = 64 * 1_024;
/// That multiple.
const ALLOCATED_PER_BYTE: u64 = 24;
/// The longest that one input may take. Generous enough for a debug build on a busy machine.
const TIME_MAX: Duration = Duration::from_secs(2);
/// Longer inputs only repeat what shorter ones do.
const INPUT_BYTES_MAX: usize = 16 * 1_024;

/// The variable that names a seed to run again.
pub const SEED: &str = "ONCEGATE_SEED";
/// The variable that says how many inputs each campaign makes.
pub const COUNT: &str = "FUZZ_COUNT";

/// Runs one input within the bounds.
///
/// # Panics
/// When the target does, or a bound is exceeded.
pub fn check(target: fn(&[u8]), input: &[u8]) {
    let began = Instant::now();
    let allocated = allocation_counter::measure(|| target(input));
    let took = began.elapsed();
    let length = u64::try_from(input.len()).unwrap_or(u64::MAX);
    let bytes_max = ALLOCATED_BYTES_MAX + ALLOCATED_PER_BYTE.saturating_mul(length);
    assert!(
        allocated.bytes_max <= bytes_max,
        "{} bytes were allocated for an input of {length}, {bytes_max} are permitted",
        allocated.bytes_max
    );
    assert!(took <= TIME_MAX, "it took {took:?}, {TIME_MAX:?} are permitted");
}

/// Runs a target on its seeds, and on inputs made of them: as many as the environment says, 2,000 by default.
///
/// # Panics
/// When an input breaks something; says which.
pub fn campaign(name: &str, target: fn(&[u8])) {
    let seeds = seeds(name);
    assert!(!seeds.is_empty(), "no seeds in {}", directory(name).display());
    for seed in &seeds {
        check(target, seed);
    }
    let number: u64 = given(SEED).unwrap_or_else(rand::random);
    let count: usize = given(COUNT).unwrap_or(2_000);
    // Shown when the test fails.
    println!("{SEED}={number} {name}");
    let mut random = StdRng::seed_from_u64(number);
    for place in 0..count {
        let input = mutated(&seeds, &mut random);
        let held = Held { place, input: &input };
        check(target, held.input);
    }
}

/// The number in an environment variable, if set.
fn given<T: FromStr>(name: &str) -> Option<T> {
    let value = env::var_os(name)?;
    let number = value.to_str().and_then(|value| value.parse().ok());
    Some(number.unwrap_or_else(|| panic!("{name} has to be a number, and is {value:?}")))
}

/// Prints the input if the thread panics on it.
struct Held<'a> {
    place: usize,
    input: &'a [u8],
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("input {}: {:?}", self.place, self.input.escape_ascii().to_string());
        }
    }
}

/// Where a target's seeds are.
fn directory(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(name)
}

fn seeds(name: &str) -> Vec<Vec<u8>> {
    let mut files: Vec<_> =
        fs::read_dir(directory(name)).into_iter().flatten().filter_map(|file| Some(file.ok()?.path())).collect();
    files.sort();
    files.into_iter().filter_map(|file| fs::read(file).ok()).collect()
}

/// What parsers trip over.
const PIECES: [&[u8]; 20] = [
    b"",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b",",
    b"=",
    b":",
    b";",
    b"\"",
    b"{",
    b"}",
    b"[",
    b"\\u0000",
    b"\\ud800",
    b"-1",
    b"18446744073709551616",
    b"1e999",
    b"NaN",
    b"://",
    b"\xe2\x80\xae",
];

/// A seed with a few changes, or pure noise.
fn mutated(seeds: &[Vec<u8>], random: &mut StdRng) -> Vec<u8> {
    let mut input = seeds[random.random_range(0..seeds.len())].clone();
    if random.random_range(0..20) == 0 {
        input = (0..random.random_range(0..512)).map(|_| random.random()).collect();
    }
    for _ in 0..random.random_range(1..6) {
        let from = random.random_range(0..=input.len());
        let to = random.random_range(from..=input.len().min(from + 64));
        match random.random_range(0..7) {
            0 if from < input.len() => input[from] ^= 1 << random.random_range(0..8),
            1 if from < input.len() => input[from] = random.random(),
            2 => drop(input.drain(from..to)),
            3 => input.truncate(from),
            4 => {
                let piece = PIECES[random.random_range(0..PIECES.len())];
                let _ = input.splice(from..from, piece.iter().copied());
            }
            5 => {
                let copied = input[from..to].to_vec();
                let times = 1 << random.random_range(0..10);
                for _ in 0..times {
                    let _ = input.splice(from..from, copied.iter().copied());
                    if input.len() > INPUT_BYTES_MAX {
                        break;
                    }
                }
            }
            _ => {
                let other = &seeds[random.random_range(0..seeds.len())];
                let start = random.random_range(0..=other.len());
                let end = random.random_range(start..=other.len());
                let _ = input.splice(from..to, other[start..end].iter().copied());
            }
        }
    }
    input.truncate(INPUT_BYTES_MAX);
    input
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_has_seeds() {
        for name in ["signature_headers", "event_key", "certificate_url", "page_token", "cache_value", "requests"] {
            assert!(seeds(name).len() > 1, "{name}");
        }
    }

    #[test]
    #[should_panic(expected = "were allocated")]
    fn too_large_an_allocation_is_found() {
        check(|_| drop(std::hint::black_box(vec![1_u8; 1 << 20])), b"x");
    }

    #[test]
    #[should_panic(expected = "it took")]
    fn too_long_a_time_is_found() {
        check(|_| std::thread::sleep(TIME_MAX + Duration::from_millis(1)), b"x");
    }
}
