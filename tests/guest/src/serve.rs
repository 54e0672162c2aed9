//! The line protocol by which a test on the host controls memory inside the guest.
//!
//! One command per line, one response per line, `ok …` or `err …`:
//!
//! | Command | Response |
//! | --- | --- |
//! | `ping` | `ok ping` |
//! | `alloc BYTES [seed=N] [huge=default\|always\|never]` | `ok alloc ID BYTES bytes`, or the first byte that was not zero |
//! | `verify [ID]` | `ok verify BYTES bytes` |
//! | `free [ID]` | `ok free BYTES bytes` |
//! | `pick ID BYTES\|all` | `ok pick BLOCKS BYTES bytes`: every other block of that size, see [`crate::blocks`] |
//! | `drop ID` | `ok drop BYTES bytes US us`: returns the picked memory |
//! | `refill ID` | `ok refill BYTES bytes US us`: touches it again, with its previous contents |
//! | `mem` | `ok mem total=… free=… available=…` (bytes) |
//! | `disk-fill PATH BYTES SEED`, `disk-verify PATH BYTES SEED` | `ok disk-fill BYTES bytes` … |
//! | `churn-start BYTES [seed=N] [threads=N]` | `ok churn-start SEED`: see [`crate::churn`] |
//! | `churn-status` | `ok churn-status steps=… verified=… zero=…`, or the error |
//! | `churn-stop` | the same figures, after all remaining memory has been checked |
//! | `page ID` | `ok page ADDRESS WORD`: the physical address and the first word of a region's first page |
//! | `dma-open DEVICE`, `dma-close` | `ok dma-open`: takes a device, and gives it back; see [`crate::dma`] |
//! | `dma-map ID`, `dma-unmap ID` | `ok dma-map ADDRESS`: lets the device access that page at its physical address |
//! | `dma-read ADDRESS`, `dma-write ADDRESS` | `ok dma-read`: has the device copy a page to or from its own |
//! | `sh COMMAND…` | the command's output, then `ok sh STATUS` |
//! | `exit` | `ok exit`, and the server ends |
//!
//! Without an ID, `verify` and `free` apply to all regions.

use std::collections::BTreeMap;
use std::io::{self, BufRead, Write};
use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::Instant;

use crate::churn::{Churn, Plan, Tally};
use crate::disk;
use crate::dma::Dma;
use crate::mem::{Allocation, Region};
use crate::size;
use crate::sys::HugePages;

/// Maximum length of a command; a longer line is an error of the test.
const LINE_BYTES_MAX: u64 = 64 * 1024;

/// The regions that a test holds, by their numbers.
#[derive(Debug, Default)]
pub(crate) struct Server {
    regions: BTreeMap<u64, Region>,
    next_id: u64,
    churn: Option<Churn>,
    dma: Option<Dma>,
}

impl Server {
    /// Serves until `exit` or the end of input.
    pub(crate) fn run(
        &mut self,
        input: &mut dyn BufRead,
        output: &mut dyn Write,
    ) -> io::Result<()> {
        loop {
            let mut line = Vec::new();
            let got = io::Read::take(&mut *input, LINE_BYTES_MAX).read_until(b'\n', &mut line)?;
            if got == 0 {
                return Ok(());
            }
            let line = String::from_utf8_lossy(&line);
            let line = line.trim();
            if line.is_empty() {
                continue;
            }
            let answer = match self.command(line, output) {
                Ok(answer) => format!("ok {answer}\n"),
                Err(error) => format!("err {error}\n"),
            };
            output.write_all(answer.as_bytes())?;
            output.flush()?;
            if line == "exit" {
                return Ok(());
            }
        }
    }

    fn command(&mut self, line: &str, output: &mut dyn Write) -> Result<String, String> {
        let (verb, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let words: Vec<&str> = rest.split_ascii_whitespace().collect();
        match (verb, words.as_slice()) {
            ("ping" | "exit", []) => Ok(verb.into()),
            ("alloc", [bytes, options @ ..]) => self.alloc(allocation(bytes, options)?),
            ("verify", id) => {
                let mut bytes = 0;
                for key in self.chosen(id)? {
                    let region = &self.regions[&key];
                    region.verify().map_err(|e| format!("verify {key}: {e}"))?;
                    bytes += region.bytes();
                }
                Ok(format!("verify {bytes} bytes"))
            }
            ("free", id) => {
                let keys = self.chosen(id)?;
                let freed = keys.iter().filter_map(|key| self.regions.remove(key));
                let bytes: u64 = freed.map(|region| region.bytes()).sum();
                Ok(format!("free {bytes} bytes"))
            }
            ("pick", [id, block]) => {
                let block_bytes = match *block {
                    "all" => None,
                    bytes => Some(size::parse(bytes)?),
                };
                let picked = self.region(id)?.pick(block_bytes)?;
                Ok(format!("pick {} {} bytes", picked.blocks, picked.bytes()))
            }
            ("drop", [id]) => {
                let region = self.region(id)?;
                let begin = Instant::now();
                let bytes = region.give_back()?;
                let us = begin.elapsed().as_micros();
                Ok(format!("drop {bytes} bytes {us} us"))
            }
            ("refill", [id]) => {
                let region = self.region(id)?;
                let begin = Instant::now();
                let bytes = region.refill()?;
                let us = begin.elapsed().as_micros();
                Ok(format!("refill {bytes} bytes {us} us"))
            }
            ("mem", []) => meminfo(),
            ("disk-fill", [path, bytes, seed]) => {
                let (bytes, seed) = (size::parse(bytes)?, size::parse(seed)?);
                disk::fill(path, bytes, seed).map(|()| format!("disk-fill {bytes} bytes"))
            }
            ("disk-verify", [path, bytes, seed]) => {
                let (bytes, seed) = (size::parse(bytes)?, size::parse(seed)?);
                disk::verify(path, bytes, seed).map(|()| format!("disk-verify {bytes} bytes"))
            }
            ("churn-start", [bytes, options @ ..]) => self.churn_start(plan(bytes, options)?),
            ("churn-status", []) => {
                let churn = self.churn.as_ref().ok_or("nothing churns")?;
                churn.tally().check()?;
                Ok(figures(verb, churn.tally()))
            }
            ("churn-stop", []) => {
                let churn = self.churn.take().ok_or("nothing churns")?;
                Ok(figures(verb, &*churn.stop()?))
            }
            ("page", [id]) => {
                let region = self.region(id)?;
                let (_, address) = region.first_page()?;
                Ok(format!("page {address:#x} {:#x}", region.first_word()))
            }
            ("dma-open", [address]) => {
                self.dma = None;
                self.dma = Some(Dma::open(address)?);
                Ok(verb.into())
            }
            ("dma-close", []) => {
                self.dma = None;
                Ok(verb.into())
            }
            ("dma-map" | "dma-unmap", [id]) => {
                let (page, address) = self.region(id)?.first_page()?;
                let dma = self.dma()?;
                match verb {
                    "dma-map" => dma.map(page, address)?,
                    _ => dma.unmap(address)?,
                }
                // The kernel may move a page before it pins it.
                match self.region(id)?.first_page()?.1 {
                    now if now == address => Ok(format!("{verb} {address:#x}")),
                    _ => Err("the page has moved".into()),
                }
            }
            ("dma-read" | "dma-write", [address]) => {
                let address = u32::from_str_radix(address.trim_start_matches("0x"), 16);
                let address = address.map_err(|_| "the device has addresses of 32 bits here")?;
                match verb {
                    "dma-read" => self.dma()?.read(address)?,
                    _ => self.dma()?.write(address)?,
                }
                Ok(verb.into())
            }
            ("sh", [_, ..]) => shell(rest, output),
            _ => Err(format!("unknown command {line:?}")),
        }
    }

    fn alloc(&mut self, allocation: Allocation) -> Result<String, String> {
        let region = Region::new(allocation)?;
        let id = self.next_id;
        self.next_id += 1;
        self.regions.insert(id, region);
        Ok(format!("alloc {id} {} bytes", allocation.bytes))
    }

    fn churn_start(&mut self, plan: Plan) -> Result<String, String> {
        if self.churn.is_some() {
            return Err("one at a time".into());
        }
        self.churn = Some(Churn::start(plan)?);
        Ok(format!("churn-start {}", plan.seed))
    }

    fn region(&mut self, id: &str) -> Result<&mut Region, String> {
        let key = id
            .parse::<u64>()
            .map_err(|_| format!("{id:?} is no region"))?;
        let region = self.regions.get_mut(&key);
        region.ok_or_else(|| format!("no region {id}"))
    }

    fn dma(&self) -> Result<&Dma, String> {
        self.dma.as_ref().ok_or_else(|| "no device is open".into())
    }

    fn chosen(&self, id: &[&str]) -> Result<Vec<u64>, String> {
        match id {
            [] => Ok(self.regions.keys().copied().collect()),
            [id] => {
                let id = id.parse().map_err(|_| format!("{id:?} is no region"))?;
                if self.regions.contains_key(&id) {
                    Ok(vec![id])
                } else {
                    Err(format!("no region {id}"))
                }
            }
            _ => Err("one region at most".into()),
        }
    }
}

/// Parses the arguments of `alloc`.
pub(crate) fn allocation(bytes: &str, options: &[&str]) -> Result<Allocation, String> {
    let mut allocation = Allocation {
        bytes: size::parse(bytes)?,
        seed: None,
        huge: HugePages::Default,
    };
    for option in options {
        match option.split_once('=') {
            Some(("seed", seed)) => allocation.seed = Some(size::parse(seed)?),
            Some(("huge", "default")) => allocation.huge = HugePages::Default,
            Some(("huge", "always")) => allocation.huge = HugePages::Always,
            Some(("huge", "never")) => allocation.huge = HugePages::Never,
            _ => return Err(format!("unknown option {option:?}")),
        }
    }
    Ok(allocation)
}

/// Parses the arguments of `churn-start`.
fn plan(bytes: &str, options: &[&str]) -> Result<Plan, String> {
    let mut plan = Plan {
        bytes: size::parse(bytes)?,
        seed: 1,
        threads: 1,
    };
    for option in options {
        match option.split_once('=') {
            Some(("seed", seed)) => plan.seed = size::parse(seed)?,
            Some(("threads", threads)) => plan.threads = size::parse(threads)?,
            _ => return Err(format!("unknown option {option:?}")),
        }
    }
    Ok(plan)
}

fn figures(verb: &str, tally: &Tally) -> String {
    let [steps, verified, zero] = [&tally.steps, &tally.verified_bytes, &tally.zero_bytes]
        .map(|figure| figure.load(Ordering::Relaxed));
    format!("{verb} steps={steps} verified={verified} zero={zero}")
}

fn shell(script: &str, output: &mut dyn Write) -> Result<String, String> {
    let done = Command::new("/bin/sh")
        .args(["-c", script])
        .output()
        .map_err(|error| format!("starting /bin/sh: {error}"))?;
    for text in [&done.stdout, &done.stderr] {
        output.write_all(text).map_err(|error| error.to_string())?;
    }
    match done.status.code() {
        Some(code) => Ok(format!("sh {code}")),
        None => Ok("sh signal".into()),
    }
}

fn meminfo() -> Result<String, String> {
    let text = std::fs::read_to_string("/proc/meminfo").map_err(|error| error.to_string())?;
    let field = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .and_then(|rest| rest.split_ascii_whitespace().next()?.parse::<u64>().ok())
            .map(|kib| kib * 1024)
            .ok_or_else(|| format!("no {name} in /proc/meminfo"))
    };
    Ok(format!(
        "mem total={} free={} available={}",
        field("MemTotal")?,
        field("MemFree")?,
        field("MemAvailable")?
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn talk(input: &str) -> Vec<String> {
        let mut output = Vec::new();
        Server::default()
            .run(&mut input.as_bytes(), &mut output)
            .unwrap();
        let text = String::from_utf8(output).unwrap();
        text.lines().map(str::to_string).collect()
    }

    #[test]
    fn server_allocates_verifies_and_frees() {
        let answers =
            talk("ping\nalloc 1M seed=5\nalloc 64K\r\nverify\nfree 0\nfree\nexit\nping\n");
        assert_eq!(
            answers,
            [
                "ok ping",
                "ok alloc 0 1048576 bytes",
                "ok alloc 1 65536 bytes",
                "ok verify 1114112 bytes",
                "ok free 1048576 bytes",
                "ok free 65536 bytes",
                "ok exit"
            ]
        );
    }

    #[test]
    fn server_answers_nonsense_with_an_error() {
        for line in [
            "jump",
            "alloc",
            "alloc x",
            "free 7",
            "alloc 1M huge=maybe",
            "alloc 0",
            "pick 0 2M",
            "drop 0",
            "refill x",
            "page 0",
            "dma-open ffff:ff:1f.7",
            "dma-map 0",
            "dma-write 0x1000",
        ] {
            let answers = talk(line);
            assert_eq!(answers.len(), 1);
            assert!(answers[0].starts_with("err "), "{line}: {}", answers[0]);
        }
    }

    #[test]
    fn server_gives_a_region_back_and_refills_it() {
        let answers = talk("alloc 1M seed=5\npick 0 all\ndrop 0\nverify 0\nrefill 0\nverify 0\n");
        assert_eq!(answers[1], "ok pick 1 1048576 bytes");
        assert!(
            answers[2].starts_with("ok drop 1048576 bytes "),
            "{answers:?}"
        );
        assert_eq!(answers[3], "err verify 0: wrong contents at byte 0");
        assert!(
            answers[4].starts_with("ok refill 1048576 bytes "),
            "{answers:?}"
        );
        assert_eq!(answers[5], "ok verify 1048576 bytes");
    }

    #[test]
    fn server_churns_until_stopped() {
        let answers =
            talk("churn-start 2M seed=3 threads=2\nchurn-status\nchurn-stop\nchurn-stop\n");
        assert_eq!(answers[0], "ok churn-start 3");
        assert!(
            answers[1].starts_with("ok churn-status steps="),
            "{answers:?}"
        );
        assert!(
            answers[2].starts_with("ok churn-stop steps="),
            "{answers:?}"
        );
        assert_eq!(answers[3], "err nothing churns");
    }

    #[test]
    fn server_runs_shell_and_tells_its_status() {
        assert_eq!(talk("sh echo hi; exit 3"), ["hi", "ok sh 3"]);
    }

    #[test]
    fn server_tells_memory_in_bytes() {
        let answers = talk("mem");
        assert!(answers[0].starts_with("ok mem total="), "{}", answers[0]);
    }
}
