//! The work of a guest that verifies its memory and a disk continuously, for tests that save, restore and move it.

use std::env;
use std::fs::File;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use integration_tests::MIB;
use integration_tests::linux::Guest;
use integration_tests::random::{Random, fresh_seed};
use integration_tests::wait::wait_for;

/// Time for some steps of the guest, or for its balloon to move, on a busy machine.
pub(crate) const PROGRESS_DEADLINE: Duration = Duration::from_secs(300);
/// Most memory of the guest's threads.
const CHURN_BYTES: u64 = 64 * MIB;
const DISK: &str = "/dev/vda 8M 7";

/// The number of cycles: from the environment, or few.
pub(crate) fn cycles(variable: &str, few: u64) -> Result<u64> {
    match env::var(variable) {
        Ok(text) => text.parse().with_context(|| format!("{variable}={text}")),
        Err(_) => Ok(few),
    }
}

/// The choices of a run, which `STRESS_SEED` repeats.
pub(crate) fn seed() -> Result<u64> {
    let seed = match env::var("STRESS_SEED") {
        Ok(seed) => seed.parse().context("STRESS_SEED")?,
        Err(_) => fresh_seed(),
    };
    println!("     STRESS_SEED={seed}");
    Ok(seed)
}

/// The option of the disk that [`Churn`] verifies, with its image in `folder`.
pub(crate) fn disk(folder: &Path) -> Result<String> {
    let path = folder.join("churn.raw");
    File::create(&path)?.set_len(16 * MIB)?;
    Ok(format!("path={},image_type=raw", path.display()))
}

/// The guest's work so far.
#[derive(Debug, Default)]
pub(crate) struct Churn {
    /// Steps of all threads.
    pub(crate) steps: u64,
    /// Bytes found as they were written.
    pub(crate) verified_bytes: u64,
}

impl Churn {
    /// Fills the disk and starts the threads.
    pub(crate) fn start(guest: &mut Guest, seed: u64) -> Result<Self> {
        guest.command(&format!("disk-fill {DISK}"))?;
        guest.command(&format!("churn-start {CHURN_BYTES} seed={seed} threads=2"))?;
        Ok(Self::default())
    }

    /// Waits for a random number of steps.
    pub(crate) fn go_on(&mut self, guest: &mut Guest, random: &mut Random) -> Result<()> {
        self.wait(guest, 1 + random.below(8))
    }

    /// Waits until the threads have made further steps, without a wrong byte.
    pub(crate) fn wait(&mut self, guest: &mut Guest, steps: u64) -> Result<()> {
        let wanted = self.steps + steps;
        wait_for("steps of the guest", PROGRESS_DEADLINE, || {
            self.ask(guest, "churn-status")?;
            Ok((self.steps >= wanted).then_some(()))
        })
    }

    /// Verifies the disk, past the guest's page cache.
    pub(crate) fn verify_disk(&self, guest: &mut Guest) -> Result<()> {
        guest.shell("echo 3 > /proc/sys/vm/drop_caches")?;
        guest.command(&format!("disk-verify {DISK}")).map(drop)
    }

    /// Verifies the rest of the memory, and the disk.
    pub(crate) fn stop(&mut self, guest: &mut Guest) -> Result<()> {
        self.ask(guest, "churn-stop")?;
        ensure!(self.verified_bytes > CHURN_BYTES, "{self:?}");
        self.verify_disk(guest)
    }

    fn ask(&mut self, guest: &mut Guest, command: &str) -> Result<()> {
        let told = guest.command(command)?;
        let figure = |name: &str| -> Result<u64> {
            let mut words = told.split([' ', '\n']);
            let value = words.find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
            let value = value.with_context(|| format!("no {name} in {told:?}"))?;
            Ok(value.trim().parse()?)
        };
        (self.steps, self.verified_bytes) = (figure("steps")?, figure("verified")?);
        Ok(())
    }
}
