//! Time limits of a migration.

use std::time::Duration;

/// Limits of a migration. Each holds for one whole message, including the wait for its first byte: a peer that moves a
/// byte now and then is lost, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connecting to the target.
    pub connect: Duration,
    /// The first message of a client.
    pub hello: Duration,
    /// A message before the VM is paused.
    pub running: Duration,
    /// A message while the VM is paused, up to the commit. On the source, everything from the pause to the target's
    /// answer takes at most the permitted downtime plus this, unless the operator has lifted the limit.
    pub paused: Duration,
    /// A message after the commit.
    pub committed: Duration,
    /// A question for the outcome, or the answer to it.
    pub question: Duration,
    /// How long a source without an answer asks.
    pub asks: Duration,
    /// How long a target answers such a source.
    pub answers: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            hello: Duration::from_secs(5),
            // A message has up to 2 MiB, so a connection needs 36 kB/s.
            running: Duration::from_secs(60),
            paused: Duration::from_secs(10),
            committed: Duration::from_secs(5),
            question: Duration::from_secs(2),
            asks: Duration::from_secs(30),
            answers: Duration::from_secs(60),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn target_answers_questions_while_its_source_asks() {
        let it = Limits::default();
        // Nothing reaches the target after it has sent Prepared: it waits for the commit, and can be asked then.
        assert!(it.paused + 4 * it.question <= it.committed + it.asks);
        // The commit reaches it, and nothing else does: it waits for the confirmation of its answer.
        assert!(it.committed + 4 * it.question <= it.committed + it.asks);
        assert!(it.committed + it.asks < it.answers);
    }
}
