//! The cases of a figure, run one after another with one guest, each with a time limit.
//!
//! Another VMM may fail or hang in a case. Such a case is reported as failed, its guest is ended, and the other cases
//! continue with a new guest. The limit uses this machine's clock; if time is counted in instructions, the limit is a
//! number of instructions. If even that clock stops, `cargo xtask bench` ends the machine and repeats the figure
//! without the case.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use integration_tests::linux::Guest;
use serde_json::{Map, Value, json};

use crate::subject::Subject;

/// Time limit of a case; the longest of ours takes a tenth of it. One second of counted instructions takes four seconds
/// on an idle processor, so a hanging case costs two minutes there.
const CASE_MAX: Duration = Duration::from_secs(30);

/// How a case ended.
enum Ended {
    Well(Value),
    Failed(anyhow::Error),
    /// Killed.
    TooLate,
}

/// Runs cases and collects what they measure.
pub(crate) struct Cases<'a> {
    figure: &'static str,
    subject: &'a Subject,
    boot: &'a dyn Fn() -> Result<Guest>,
    /// `None` before the first case, and after a failed one.
    guest: Option<Guest>,
    bound: Duration,
    figures: Map<String, Value>,
}

impl<'a> Cases<'a> {
    /// Prepares cases of `figure`. `boot` starts a guest for the first case and after each failed one.
    pub(crate) fn new(
        figure: &'static str,
        subject: &'a Subject,
        boot: &'a dyn Fn() -> Result<Guest>,
    ) -> Self {
        Self {
            figure,
            subject,
            boot,
            guest: None,
            bound: CASE_MAX,
            figures: Map::new(),
        }
    }

    /// Runs a case unless it is left out; prints its name and result on stderr.
    ///
    /// # Errors
    /// No guest starts.
    pub(crate) fn run(
        &mut self,
        name: &str,
        case: impl FnOnce(&mut Guest) -> Result<Value>,
    ) -> Result<()> {
        let full_name = self.subject.case(self.figure, name);
        eprint!("{full_name} … ");
        if self.subject.leaves_out(&full_name) {
            eprintln!("left out");
            self.figures
                .insert(name.into(), json!({ FAILED: "left out" }));
            return Ok(());
        }
        let begin = Instant::now();
        let mut guest = match self.guest.take() {
            Some(guest) => guest,
            None => (self.boot)().with_context(|| name.to_owned())?,
        };
        let kill = guest.vmm.killer();
        let ended = bounded(self.bound, kill, || case(&mut guest));
        let value = match ended {
            Ended::Well(value) => {
                eprintln!("{:.1} s", begin.elapsed().as_secs_f64());
                self.guest = Some(guest);
                value
            }
            Ended::Failed(error) => {
                eprintln!("failed: {error:#}");
                json!({ FAILED: format!("{error:#}") })
            }
            Ended::TooLate => {
                let seconds = self.bound.as_secs();
                eprintln!("did not end within {seconds} s");
                json!({ TOO_LATE: seconds })
            }
        };
        self.figures.insert(name.into(), value);
        Ok(())
    }

    /// All figures.
    ///
    /// # Errors
    /// No case succeeded.
    pub(crate) fn finish(self) -> Result<Value> {
        if self.figures.values().all(|value| !is_good(value)) {
            bail!("no case ended: {}", Value::Object(self.figures));
        }
        Ok(self.figures.into())
    }
}

const FAILED: &str = "failed";
const TOO_LATE: &str = "did_not_end_within_s";

/// Whether a case has measured something.
fn is_good(value: &Value) -> bool {
    value.get(FAILED).is_none() && value.get(TOO_LATE).is_none()
}

/// Runs `work`; if it takes too long, `kill` must make it fail.
fn bounded(
    bound: Duration,
    kill: impl FnOnce() + Send,
    work: impl FnOnce() -> Result<Value>,
) -> Ended {
    let (ended, ending) = mpsc::channel::<()>();
    thread::scope(|scope| {
        let watching = scope.spawn(move || {
            let in_time = ending.recv_timeout(bound) != Err(RecvTimeoutError::Timeout);
            if !in_time {
                kill();
            }
            in_time
        });
        let result = work();
        drop(ended);
        let in_time = watching.join().expect("the watching thread does not panic");
        match result {
            // The work was completed when the time limit passed.
            Ok(value) => Ended::Well(value),
            Err(_) if !in_time => Ended::TooLate,
            Err(error) => Ended::Failed(error),
        }
    })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::fd::OwnedFd;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;

    use integration_tests::serial::Serial;
    use integration_tests::vmm::{PROCESS_DEADLINE, Vmm};

    use super::*;

    /// A guest that never responds, in a process that ignores everything: its serial port is closed when it is killed.
    fn hanging_guest() -> Result<Guest> {
        let folder = tempfile::tempdir()?;
        let program = folder.path().join("vmm");
        fs::write(
            &program,
            "#!/bin/sh\nread first\necho ready\nwhile read line; do :; done\n",
        )?;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
        let (ours, its) = UnixStream::pair()?;
        let keeps = its.try_clone()?;
        let vmm = Vmm::spawn_program(&program, &[], |command| {
            command
                .stdin(OwnedFd::from(its))
                .stdout(OwnedFd::from(keeps));
        })?;
        ours.set_nonblocking(true)?;
        let serial = Serial::over(OwnedFd::from(ours).into());
        let mut guest = Guest { vmm, serial };
        // The script's folder may be removed only after the script has started.
        guest.serial.send("start")?;
        guest.expect("ready", PROCESS_DEADLINE)?;
        Ok(guest)
    }

    fn ours(left_out: &[&str]) -> Subject {
        Subject {
            name: "ours",
            program: "unused".into(),
            left_out: left_out.iter().map(|&case| case.to_owned()).collect(),
            _folder: None,
        }
    }

    #[test]
    fn case_that_is_left_out_is_reported_and_not_run() {
        let ours = ours(&["figure/hangs/ours", "figure/ends/other"]);
        let mut cases = Cases::new("figure", &ours, &hanging_guest);
        let hang = |guest: &mut Guest| Ok(json!(guest.command("ping")?));
        cases.run("hangs", hang).unwrap();
        let ended = |guest: &mut Guest| Ok(json!(guest.vmm.has_ended()?));
        cases.run("ends", ended).unwrap();
        let figures = cases.finish().unwrap();
        assert_eq!(
            figures,
            json!({ "hangs": { FAILED: "left out" }, "ends": false })
        );
    }

    #[test]
    fn case_that_does_not_end_is_reported_and_the_next_one_has_a_new_guest() {
        let ours = ours(&[]);
        let mut cases = Cases::new("figure", &ours, &hanging_guest);
        cases.bound = Duration::from_millis(50);
        let hang = |guest: &mut Guest| Ok(json!(guest.command("ping")?));
        cases.run("hangs", hang).unwrap();
        cases.run("hangs_too", hang).unwrap();
        cases.bound = Duration::from_secs(600);
        cases
            .run("ends", |guest| Ok(json!(guest.vmm.has_ended()?)))
            .unwrap();
        let figures = cases.finish().unwrap();
        let too_late = json!({ TOO_LATE: 0 });
        assert_eq!(
            figures,
            json!({ "hangs": too_late, "hangs_too": too_late, "ends": false })
        );
    }

    #[test]
    fn figure_without_a_case_that_ends_is_an_error() {
        let ours = ours(&[]);
        let mut cases = Cases::new("figure", &ours, &hanging_guest);
        cases.bound = Duration::from_millis(50);
        cases
            .run("hangs", |guest| Ok(json!(guest.command("ping")?)))
            .unwrap();
        assert!(cases.finish().is_err());
    }

    #[test]
    fn work_that_ends_in_time_gives_its_value() {
        let ended = bounded(Duration::from_secs(600), || (), || Ok(json!(1)));
        assert!(matches!(ended, Ended::Well(value) if value == 1));
        let ended = bounded(Duration::from_secs(600), || (), || bail!("no"));
        assert!(matches!(ended, Ended::Failed(error) if error.to_string() == "no"));
    }

    #[test]
    fn work_that_does_not_end_is_killed_and_known_as_such() {
        let (killed, dead) = mpsc::channel::<()>();
        let kill = move || drop(killed);
        let ended = bounded(Duration::from_millis(10), kill, || {
            // Like a connection to a VMM: it returns when the VMM is killed.
            assert!(dead.recv().is_err());
            bail!("closed")
        });
        assert!(matches!(ended, Ended::TooLate));
        assert!(!is_good(&json!({ TOO_LATE: 60 })));
    }
}
