//! Writes the log to standard error or a file, in upstream's format.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Mutex;
use std::time::Instant;

use log::{Level, LevelFilter, Log, Metadata, Record};
use vmm::Unpoisoned;

/// The crate that reads virtqueues logs an error whenever a guest breaks a queue, and a guest can do so at any rate.
/// Our devices count these errors and log them once, so the crate's own messages are only for debugging.
const GUEST_NOISE: &str = "virtio_queue";

/// Room for the two lines about a full log.
const LAST_LINES_BYTES: u64 = 512;

struct Logger {
    start: Instant,
    /// Standard error if absent, which has its own lock.
    file: Option<Mutex<LogFile>>,
}

struct LogFile {
    file: File,
    /// The number of bytes that may follow; `None` without a limit.
    left: Option<u64>,
    lines_left_out: u64,
}

/// Installs the logger. The file grows up to `bytes_max`. `verbosity` is the number of `-v`.
///
/// # Errors
/// The file cannot be opened.
pub(crate) fn install(
    start: Instant,
    file: Option<&Path>,
    bytes_max: Option<u64>,
    verbosity: u8,
) -> io::Result<()> {
    let file = file
        .map(|path| LogFile::open(path, bytes_max))
        .transpose()?;
    let file = file.map(Mutex::new);
    log::set_max_level(match verbosity {
        0 => LevelFilter::Warn,
        1 => LevelFilter::Info,
        2 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    });
    log::set_boxed_logger(Box::new(Logger { start, file })).map_err(io::Error::other)
}

/// Opens a log file without blocking. A FIFO is opened for reading as well, so that it accepts lines before it has a
/// reader and after the reader has closed it. If the FIFO is full, a line is dropped instead of blocking a thread.
fn open(path: &Path) -> io::Result<File> {
    let is_fifo = path
        .metadata()
        .is_ok_and(|found| found.file_type().is_fifo());
    let mut options = OpenOptions::new();
    if is_fifo {
        options
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK);
    } else {
        options.create(true).append(true);
    }
    options.open(path)
}

impl LogFile {
    fn open(path: &Path, bytes_max: Option<u64>) -> io::Result<Self> {
        let file = open(path)?;
        let found = file.metadata()?;
        // A FIFO or a device does not grow.
        let bytes_max = bytes_max.filter(|_| found.is_file());
        Ok(Self {
            file,
            left: bytes_max.map(|bytes_max| bytes_max.saturating_sub(found.len())),
            lines_left_out: 0,
        })
    }

    /// Whether a line of that length still fits. The first one that does not is `Fit::First`.
    fn fit(&mut self, bytes: usize) -> Fit {
        let Some(left) = self.left else {
            return Fit::Yes;
        };
        let needed = (bytes as u64).saturating_add(LAST_LINES_BYTES);
        if self.lines_left_out == 0 && needed <= left {
            return Fit::Yes;
        }
        self.lines_left_out += 1;
        match self.lines_left_out {
            1 => Fit::First,
            _ => Fit::No,
        }
    }

    /// Writes a line unless even the reserved room is used up.
    fn write(&mut self, line: &str) {
        if let Some(left) = &mut self.left {
            let Some(rest) = left.checked_sub(line.len() as u64) else {
                return;
            };
            *left = rest;
        }
        // If the log cannot be written, there is no other place to report it.
        let _ = self.file.write_all(line.as_bytes());
    }
}

/// Whether a line fits into the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fit {
    Yes,
    First,
    No,
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let guest_decides = metadata.target().starts_with(GUEST_NOISE);
        metadata.level() <= log::max_level()
            && (!guest_decides || log::max_level() >= LevelFilter::Debug)
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let line = self.line(record);
        // One write per line, so that lines of several threads do not mix.
        let Some(file) = &self.file else {
            let _ = io::stderr().write_all(line.as_bytes());
            return;
        };
        let mut file = file.lock().unpoisoned();
        match file.fit(line.len()) {
            Fit::Yes => file.write(&line),
            Fit::First => file
                .write(&self.own_line("the log has its maximum size: further lines are left out")),
            Fit::No => {}
        }
    }

    /// Called at the end of the program.
    fn flush(&self) {
        let Some(file) = &self.file else { return };
        let mut file = file.lock().unpoisoned();
        let lines = file.lines_left_out;
        if lines > 0 {
            file.write(&self.own_line(&format!("{lines} lines were left out")));
        }
    }
}

impl Logger {
    /// A line about the log itself.
    fn own_line(&self, text: &str) -> String {
        self.line(
            &Record::builder()
                .args(format_args!("{text}"))
                .level(Level::Warn)
                .file(Some(file!()))
                .line(Some(line!()))
                .build(),
        )
    }

    fn line(&self, record: &Record<'_>) -> String {
        let thread = std::thread::current();
        format!(
            "cloud-hypervisor: {:.6}s: <{}> {}:{}:{} -- {}\r\n",
            self.start.elapsed().as_secs_f64(),
            thread.name().unwrap_or("unnamed"),
            record.level(),
            record.file().unwrap_or_else(|| record.target()),
            record.line().unwrap_or(0),
            record.args(),
        )
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn logger_leaves_out_what_a_guest_could_flood_the_log_with() {
        let logger = Logger {
            start: Instant::now(),
            file: None,
        };
        let enabled = |target: &str| {
            let metadata = Metadata::builder()
                .level(Level::Error)
                .target(target)
                .build();
            logger.enabled(&metadata)
        };
        log::set_max_level(LevelFilter::Info);
        assert!(!enabled("virtio_queue::queue"));
        assert!(enabled("virtio_devices::worker"));
        log::set_max_level(LevelFilter::Debug);
        assert!(enabled("virtio_queue::queue"));
    }

    #[test]
    fn log_with_a_limit_stays_below_it_and_counts_the_rest() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        std::fs::write(&path, "of an earlier run\n").unwrap();
        log::set_max_level(LevelFilter::Info);
        let file = LogFile::open(&path, Some(2048)).unwrap();
        let logger = Logger {
            start: Instant::now(),
            file: Some(Mutex::new(file)),
        };
        for number in 0..1000 {
            logger.log(
                &Record::builder()
                    .args(format_args!("line {number}"))
                    .level(Level::Error)
                    .target("test")
                    .build(),
            );
        }
        logger.flush();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.len() <= 2048, "{}", text.len());
        assert!(text.starts_with("of an earlier run"), "{text}");
        let written = text.matches("-- line ").count();
        assert!(written > 10, "{text}");
        assert_eq!(text.matches("has its maximum size").count(), 1, "{text}");
        let left_out = format!("-- {} lines were left out\r\n", 1000 - written);
        assert!(text.ends_with(&left_out), "{text}");
        // A full file of an earlier run stays as it is.
        let before = std::fs::read(&path).unwrap();
        let mut file = LogFile::open(&path, Some(100)).unwrap();
        assert_eq!(file.fit(1), Fit::First);
        file.write("text");
        assert_eq!(std::fs::read(&path).unwrap(), before);
    }

    #[test]
    fn log_that_is_a_fifo_needs_no_reader() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let made = std::process::Command::new("mkfifo").arg(&path).status();
        assert!(made.unwrap().success());
        let mut file = open(&path).unwrap();
        file.write_all(b"kept for a reader to come\n").unwrap();
        // Writing does not block even if the FIFO is full.
        let full = (0..1 << 20)
            .find_map(|_| file.write_all(&[b'x'; 4096]).err())
            .unwrap();
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn logger_line_names_time_thread_level_and_place() {
        let logger = Logger {
            start: Instant::now(),
            file: None,
        };
        let record = Record::builder()
            .args(format_args!("text"))
            .level(Level::Info)
            .file(Some("a.rs"))
            .line(Some(7))
            .build();
        let line = logger.line(&record);
        assert!(line.starts_with("cloud-hypervisor: 0."), "{line}");
        assert!(line.ends_with("INFO:a.rs:7 -- text\r\n"), "{line}");
    }
}
