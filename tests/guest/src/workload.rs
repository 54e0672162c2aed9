//! `guest-mem workload`: runs workloads that time a page allocator.
//!
//! The workloads include will-it-scale's page_fault1 and page_fault2, and a churn of one large region. Each is a fixed
//! amount of work, so that its time can be compared between kernels. If the clock counts instructions, the time is a
//! number of instructions.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use crate::mem::{Allocation, Region};
use crate::size;
use crate::sys::{HugePages, Mapping};

/// Bytes that one round of the fault workloads maps, as in will-it-scale.
const FAULT_BYTES: usize = 128 << 20;
const FILE_BYTES: usize = 8 << 20;
const PAGE_BYTES: usize = 4096;
/// Processes of one round of a build, and the bytes that each of them writes.
const BUILD_PROCESSES: usize = 32;
const OBJECT_BYTES: usize = 256 << 10;
const WORD_BYTES: usize = size_of::<u64>();

const USAGE: &str = "usage: guest-mem workload page_fault1|page_fault2|churn|remove|build --tasks N --rounds N [--bytes SIZE] [--over-ms N]";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Map anonymous memory, write one word in each page, unmap.
    PageFault1,
    /// The same with a private mapping of a file.
    PageFault2,
    /// Map with the system's default for huge pages, touch, unmap: whole blocks are allocated and freed.
    Churn,
    /// Write files in memory and remove them, evenly over a time: a fast or slow burst of frees.
    Remove,
    /// Memory use of `make`: many short processes, each of which touches memory, writes an object and ends; then all
    /// objects are read and linked, and everything is removed.
    Build,
}

#[derive(Debug, Clone, Copy)]
struct Plan {
    kind: Kind,
    tasks: u64,
    rounds: u64,
    bytes: usize,
    over: Duration,
}

/// Runs a workload and prints the duration of each round of each task, and the total.
pub(crate) fn run(arguments: &[&str]) -> Result<(), String> {
    let plan = plan(arguments)?;
    let begin = Instant::now();
    let tasks: Vec<_> = (0..plan.tasks)
        .map(|task| thread::spawn(move || course(plan, task)))
        .collect();
    let mut rounds = Vec::new();
    for task in tasks {
        rounds.push(task.join().map_err(|_| "a task panicked".to_string())??);
    }
    let all = begin.elapsed();
    for (task, rounds) in rounds.iter().enumerate() {
        for (round, time) in rounds.iter().enumerate() {
            println!("task {task} round {round} {} ns", time.as_nanos());
        }
    }
    println!("ok workload {} ns", all.as_nanos());
    Ok(())
}

fn plan(arguments: &[&str]) -> Result<Plan, String> {
    let [kind, options @ ..] = arguments else {
        return Err(USAGE.into());
    };
    let mut plan = Plan {
        kind: match *kind {
            "page_fault1" => Kind::PageFault1,
            "page_fault2" => Kind::PageFault2,
            "churn" => Kind::Churn,
            "remove" => Kind::Remove,
            "build" => Kind::Build,
            _ => return Err(USAGE.into()),
        },
        tasks: 1,
        rounds: 1,
        bytes: FAULT_BYTES,
        over: Duration::ZERO,
    };
    for pair in options.chunks(2) {
        let [option, value] = pair else {
            return Err(USAGE.into());
        };
        let value = size::parse(value)?;
        match *option {
            "--tasks" => plan.tasks = value,
            "--rounds" => plan.rounds = value,
            "--over-ms" => plan.over = Duration::from_millis(value),
            "--bytes" => plan.bytes = usize::try_from(value).map_err(|_| "too large")?,
            _ => return Err(USAGE.into()),
        }
    }
    if plan.tasks == 0 || plan.bytes < PAGE_BYTES {
        return Err(USAGE.into());
    }
    Ok(plan)
}

/// Runs the rounds of one task and returns their durations.
fn course(plan: Plan, task: u64) -> Result<Vec<Duration>, String> {
    let with_context = |error: io::Error| format!("task {task}: {error}");
    match plan.kind {
        Kind::PageFault1 => timed(plan.rounds, || {
            touch(Mapping::new(plan.bytes, HugePages::Never).map_err(with_context)?);
            Ok(())
        }),
        Kind::PageFault2 => {
            let path = std::env::temp_dir().join(format!("page_fault2.{task}"));
            let file = File::create_new(&path).map_err(with_context)?;
            // The file disappears with the descriptor, however this ends.
            fs::remove_file(&path).map_err(with_context)?;
            file.set_len(plan.bytes as u64).map_err(with_context)?;
            timed(plan.rounds, || {
                touch(Mapping::of_file(&file, plan.bytes).map_err(with_context)?);
                Ok(())
            })
        }
        Kind::Churn => {
            let allocation = Allocation {
                bytes: plan.bytes as u64,
                seed: None,
                huge: HugePages::Default,
            };
            timed(plan.rounds, || Region::new(allocation).map(drop))
        }
        Kind::Remove => timed(plan.rounds, || remove(plan, task).map_err(with_context)),
        Kind::Build => {
            let folder = std::env::temp_dir().join(format!("build.{task}"));
            fs::create_dir_all(&folder).map_err(with_context)?;
            let times = timed(plan.rounds, || build(&folder, plan.bytes));
            fs::remove_dir_all(&folder).map_err(with_context)?;
            times
        }
    }
}

/// Files of a few blocks, so that removing one frees whole blocks.
fn remove(plan: Plan, task: u64) -> io::Result<()> {
    let count = plan.bytes.div_ceil(FILE_BYTES);
    let path = |file| std::env::temp_dir().join(format!("remove.{task}.{file}"));
    let contents = vec![1; FILE_BYTES];
    for file in 0..count {
        fs::write(path(file), &contents)?;
    }
    let pause = plan.over / u32::try_from(count).unwrap_or(u32::MAX);
    for file in 0..count {
        fs::remove_file(path(file))?;
        thread::sleep(pause);
    }
    Ok(())
}

/// Runs one process after another, like one job of `make`, and the link.
fn build(folder: &Path, bytes: usize) -> Result<(), String> {
    let with_context = |error: io::Error| format!("{}: {error}", folder.display());
    let objects: Vec<_> = (0..BUILD_PROCESSES)
        .map(|number| folder.join(format!("{number}.o")))
        .collect();
    for object in &objects {
        let status = Command::new("/proc/self/exe")
            .arg("build-step")
            .arg(object)
            .arg(bytes.to_string())
            .status()
            .map_err(with_context)?;
        if !status.success() {
            return Err(format!("{}: {status}", object.display()));
        }
    }
    let linked = folder.join("linked");
    let mut output = File::create(&linked).map_err(with_context)?;
    for object in &objects {
        io::copy(&mut File::open(object).map_err(with_context)?, &mut output)
            .map_err(with_context)?;
        fs::remove_file(object).map_err(with_context)?;
    }
    fs::remove_file(&linked).map_err(with_context)
}

/// The work of each process of a build.
pub(crate) fn build_step(object: &str, bytes: u64) -> Result<(), String> {
    let with_context = |error: io::Error| format!("{object}: {error}");
    let bytes = usize::try_from(bytes).map_err(|_| "too large")?;
    touch(Mapping::new(bytes, HugePages::Default).map_err(with_context)?);
    fs::write(object, vec![1; OBJECT_BYTES]).map_err(with_context)
}

fn timed(
    rounds: u64,
    mut round: impl FnMut() -> Result<(), String>,
) -> Result<Vec<Duration>, String> {
    (0..rounds)
        .map(|_| {
            let begin = Instant::now();
            round()?;
            Ok(begin.elapsed())
        })
        .collect()
}

/// Writes once to each page; the mapping is dropped here.
fn touch(mut mapping: Mapping) {
    for word in mapping
        .words_mut()
        .iter_mut()
        .step_by(PAGE_BYTES / WORD_BYTES)
    {
        *word = 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workload_of_each_kind_runs() {
        for kind in ["page_fault1", "page_fault2", "churn", "remove"] {
            let size = ["--rounds", "2", "--bytes", "1M", "--over-ms", "2"];
            run(&[&[kind, "--tasks", "2"], &size[..]].concat()).unwrap();
        }
    }

    #[test]
    fn build_step_leaves_an_object() {
        let path = std::env::temp_dir().join(format!("build-step-{}", std::process::id()));
        build_step(path.to_str().unwrap(), 1 << 20).unwrap();
        let bytes = fs::metadata(&path).unwrap().len();
        fs::remove_file(&path).unwrap();
        assert_eq!(bytes, OBJECT_BYTES as u64);
    }

    #[test]
    fn workload_with_wrong_arguments_tells_usage() {
        for line in [
            "",
            "sleep",
            "churn --tasks",
            "churn --tasks 0",
            "churn --bytes 1",
        ] {
            let words: Vec<&str> = line.split_ascii_whitespace().collect();
            assert!(run(&words).is_err(), "{line}");
        }
    }
}
