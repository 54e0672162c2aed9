//! A VMM's mappings other than guest RAM, from `/proc/PID/smaps`.

use std::fs;

use anyhow::{Result, ensure};

/// One entry of `/proc/PID/smaps`.
#[derive(Debug)]
pub struct Mapping {
    /// File, or a name such as `[heap]`.
    pub name: String,
    /// Address space, bytes.
    pub size: u64,
    /// Resident part, bytes.
    pub resident: u64,
    /// Resident part not backed by a file, bytes.
    pub anonymous: u64,
}

/// The mappings of process `pid` except guest RAM, which consists of `guest_bytes` in mappings that are each larger
/// than all others.
///
/// # Errors
/// The process has ended or belongs to another user, or has no guest RAM mapped.
pub fn beside_guest_ram(pid: u32, guest_bytes: u64) -> Result<Vec<Mapping>> {
    let (guest, own): (Vec<Mapping>, Vec<Mapping>) = mappings(pid)?
        .into_iter()
        .partition(|map| map.size >= guest_bytes / 2);
    ensure!(!guest.is_empty(), "guest RAM is not among the mappings");
    Ok(own)
}

fn mappings(pid: u32) -> Result<Vec<Mapping>> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let mut maps: Vec<Mapping> = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        let kib = |words: &mut std::str::SplitWhitespace<'_>| {
            words
                .next()
                .and_then(|word| word.parse::<u64>().ok())
                .unwrap_or(0)
                << 10
        };
        match (first, maps.last_mut()) {
            ("Size:", Some(map)) => map.size = kib(&mut words),
            ("Rss:", Some(map)) => map.resident = kib(&mut words),
            ("Anonymous:", Some(map)) => map.anonymous = kib(&mut words),
            _ if !first.ends_with(':') => maps.push(Mapping {
                name: words.nth(4).unwrap_or("anonymous").to_owned(),
                size: 0,
                resident: 0,
                anonymous: 0,
            }),
            _ => {}
        }
    }
    Ok(maps)
}
