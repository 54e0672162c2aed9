//! Structured logs on standard error: `key=value` for humans, JSON for log collectors.

use std::io::Write;
use std::time::SystemTime;

use log::{LevelFilter, Log, Metadata, Record};

use crate::args::LogFormat;

struct Logger {
    format: LogFormat,
    /// False if the journal adds the time.
    with_time: bool,
}

/// Installs the logger.
pub(crate) fn install(format: LogFormat, verbose: u8) -> Result<(), log::SetLoggerError> {
    log::set_max_level(match verbose {
        0 => LevelFilter::Info,
        1 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    });
    log::set_boxed_logger(Box::new(Logger {
        format,
        with_time: std::env::var_os("JOURNAL_STREAM").is_none(),
    }))
}

impl Logger {
    fn line(&self, record: &Record<'_>, unix_ms: u128) -> String {
        let level = record.level().as_str().to_ascii_lowercase();
        let message = record.args().to_string();
        match self.format {
            LogFormat::Json => serde_json::json!({
                "unix_ms": u64::try_from(unix_ms).unwrap_or(u64::MAX),
                "level": level,
                "target": record.target(),
                "message": message,
            })
            .to_string(),
            // Each entry is one line: text from a guest or a file must not split it.
            LogFormat::Text if self.with_time => {
                format!(
                    "unix_ms={unix_ms} level={level} {}",
                    message.replace('\n', " ")
                )
            }
            LogFormat::Text => format!("level={level} {}", message.replace('\n', " ")),
        }
    }
}

impl Log for Logger {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let unix_ms = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(0, |since| since.as_millis());
        // If the log cannot be written, there is no other place to report it.
        let _ = writeln!(std::io::stderr().lock(), "{}", self.line(record, unix_ms));
    }

    fn flush(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(format: LogFormat, with_time: bool) -> String {
        let record = Record::builder()
            .args(format_args!("kind=vm vm=\"a\"\nb"))
            .level(log::Level::Warn)
            .target("ch_fleet")
            .build();
        Logger { format, with_time }.line(&record, 7)
    }

    #[test]
    fn line_is_one_entry_in_either_form() {
        assert_eq!(
            line(LogFormat::Text, true),
            "unix_ms=7 level=warn kind=vm vm=\"a\" b"
        );
        assert_eq!(
            line(LogFormat::Text, false),
            "level=warn kind=vm vm=\"a\" b"
        );
        let json: serde_json::Value =
            serde_json::from_str(&line(LogFormat::Json, true)).unwrap_or_default();
        assert_eq!(json["message"], "kind=vm vm=\"a\"\nb");
        assert_eq!(json["unix_ms"], 7);
    }
}
