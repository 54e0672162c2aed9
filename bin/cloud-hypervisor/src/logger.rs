//! Writes the log to standard error or a file, in upstream's format.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use log::{LevelFilter, Log, Metadata, Record};

/// The crate that reads virtqueues logs an error whenever a guest breaks a queue, and a guest can do so at any rate.
/// Our devices count these errors and log them once, so the crate's own messages are only for debugging.
const GUEST_NOISE: &str = "virtio_queue";

struct Logger {
    start: Instant,
    /// Standard error if absent, which has its own lock.
    file: Option<Mutex<File>>,
}

/// Installs the logger. `verbosity` is the number of `-v`.
///
/// # Errors
/// The file cannot be opened.
pub(crate) fn install(start: Instant, file: Option<&Path>, verbosity: u8) -> io::Result<()> {
    let file = file.map(open).transpose()?.map(Mutex::new);
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
        // One write per line, so that lines of several threads do not mix. If the log cannot be written, there is no
        // other place to report it.
        let _ = match &self.file {
            Some(file) => {
                let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
                file.write_all(line.as_bytes())
            }
            None => io::stderr().write_all(line.as_bytes()),
        };
    }

    fn flush(&self) {}
}

impl Logger {
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

    use log::Level;

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
