//! Log lines on standard error or in a file, in upstream's form.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use log::{LevelFilter, Log, Metadata, Record};

/// The crate that reads virtqueues logs an error for every broken one, as often as a guest cares to
/// break it. Our devices count those and say so once, so its own lines are for debugging.
const GUEST_NOISE: &str = "virtio_queue";

struct Logger {
    start: Instant,
    /// Standard error when absent, which needs no lock of ours.
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

/// Opens a log file without waiting. A FIFO is opened for reading as well: then it takes lines before it has a reader
/// and after that reader has gone, and a line that finds it full is lost instead of stopping a thread.
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
        // One write for a line, so that lines of several threads do not mix. A log that cannot be written has nowhere
        // to complain to.
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
        // Full, and still nobody waits.
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
