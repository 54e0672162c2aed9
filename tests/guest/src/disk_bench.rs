//! `guest-mem disk-bench`: measures a fixed number of reads or writes of a disk, without the page cache.

use std::fs::{File, OpenOptions};
use std::io::{Seek as _, SeekFrom};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::thread;
use std::time::Instant;

use crate::pattern;
use crate::size;
use crate::sys::{HugePages, Mapping};

const USAGE: &str = "usage: guest-mem disk-bench read|write PATH --block SIZE --requests N \
                     [--threads N] [--random SEED]";

/// Alignment for direct I/O on any disk.
const ALIGNMENT_BYTES: u64 = 4096;

#[derive(Debug, Clone, Copy)]
struct Plan {
    write: bool,
    block_bytes: u64,
    /// By all threads together.
    requests: u64,
    threads: u64,
    /// Without it blocks follow each other.
    seed: Option<u64>,
}

/// Runs the requests and prints their duration.
pub(crate) fn run(arguments: &[&str]) -> Result<(), String> {
    let (path, plan) = plan(arguments)?;
    let file = OpenOptions::new()
        .read(!plan.write)
        .write(plan.write)
        .custom_flags(libc::O_DIRECT)
        .open(path)
        .map_err(|error| format!("opening {path}: {error}"))?;
    let bytes = (&file)
        .seek(SeekFrom::End(0))
        .map_err(|error| format!("the size of {path}: {error}"))?;
    let blocks = bytes / plan.block_bytes;
    if blocks < plan.threads {
        return Err(format!("{path}: {bytes} bytes are too few"));
    }
    let begin = Instant::now();
    thread::scope(|scope| {
        let tasks: Vec<_> = (0..plan.threads)
            .map(|task| {
                let file = &file;
                scope.spawn(move || run_task(plan, file, blocks, task))
            })
            .collect();
        tasks
            .into_iter()
            .try_for_each(|task| task.join().map_err(|_| "a task panicked".to_string())?)
    })?;
    println!("ok disk-bench {} ns", begin.elapsed().as_nanos());
    Ok(())
}

fn plan<'a>(arguments: &[&'a str]) -> Result<(&'a str, Plan), String> {
    let [kind @ ("read" | "write"), path, options @ ..] = arguments else {
        return Err(USAGE.into());
    };
    let mut plan = Plan {
        write: *kind == "write",
        block_bytes: 0,
        requests: 0,
        threads: 1,
        seed: None,
    };
    for pair in options.chunks(2) {
        let [option, value] = pair else {
            return Err(USAGE.into());
        };
        let value = size::parse(value)?;
        match *option {
            "--block" => plan.block_bytes = value,
            "--requests" => plan.requests = value,
            "--threads" => plan.threads = value,
            "--random" => plan.seed = Some(value),
            _ => return Err(USAGE.into()),
        }
    }
    let aligned = plan.block_bytes > 0 && plan.block_bytes.is_multiple_of(ALIGNMENT_BYTES);
    if !aligned || plan.threads == 0 || !plan.requests.is_multiple_of(plan.threads) {
        return Err(USAGE.into());
    }
    Ok((path, plan))
}

/// The requests of one thread, each started when the previous one is done.
fn run_task(plan: Plan, file: &File, blocks: u64, task: u64) -> Result<(), String> {
    let bytes = usize::try_from(plan.block_bytes).map_err(|_| "too large")?;
    let mut buffer = Mapping::new(bytes, HugePages::Never).map_err(|error| error.to_string())?;
    // Pages that were never written are all one page of zeroes.
    buffer.words_mut().fill(task + 1);
    // Threads that read one after another start far from each other.
    let first = blocks / plan.threads * task;
    for request in 0..plan.requests / plan.threads {
        let block = match plan.seed {
            Some(seed) => pattern::word(pattern::word(seed, task), request),
            None => first + request,
        };
        let offset = block % blocks * plan.block_bytes;
        let done = if plan.write {
            file.write_all_at(buffer.bytes(), offset)
        } else {
            file.read_exact_at(buffer.bytes_mut(), offset)
        };
        done.map_err(|error| format!("byte {offset}: {error}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disk_bench_reads_and_writes_every_way() {
        // Not a file system in memory: some of those refuse direct I/O.
        let path = std::env::current_exe()
            .unwrap()
            .with_extension(format!("disk-{}", std::process::id()));
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let name = path.to_str().unwrap();
        let tail = ["--block", "4K", "--requests", "8", "--threads", "2"];
        for kind in ["write", "read"] {
            for more in [&[][..], &["--random", "3"]] {
                let arguments = [&[kind, name], &tail[..], more].concat();
                run(&arguments).unwrap();
            }
        }
        let written = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(written[..8], 1u64.to_ne_bytes());
    }

    #[test]
    fn disk_bench_with_wrong_arguments_tells_usage() {
        for line in [
            "",
            "erase /dev/null",
            "read /dev/null --block 100 --requests 1",
            "read /dev/null --block 4K --requests",
            "read /dev/null --block 4K --requests 3 --threads 2",
        ] {
            let words: Vec<&str> = line.split_ascii_whitespace().collect();
            assert!(plan(&words).is_err(), "{line}");
        }
    }
}
