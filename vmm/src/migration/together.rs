//! The connections of a migration, each with a thread while a pass over RAM is under way.

use std::sync::Mutex;

use virtio_devices::Unpoisoned;

use super::MigrationError;
use super::peer::Peer;
use crate::threads::MIGRATION_THREAD;

/// Calls `first` here and `other` for each of `others` in a thread, and returns when all have returned. If one fails, the
/// others end early, and its error is returned.
pub(super) fn together<T: Send>(
    peer: Option<&Peer>,
    others: &mut [T],
    first: impl FnOnce() -> Result<(), MigrationError>,
    other: impl Fn(&mut T) -> Result<(), MigrationError> + Sync,
) -> Result<(), MigrationError> {
    let Some(peer) = peer.filter(|_| !others.is_empty()) else {
        first()?;
        return others.iter_mut().try_for_each(other);
    };
    let error = Mutex::new(None);
    let ended = |result: Result<(), MigrationError>| {
        if let Err(cause) = result {
            // The other ones fail because of this.
            error.lock().unpoisoned().get_or_insert(cause);
            peer.break_others();
        }
    };
    let other = &other;
    let ended = &ended;
    std::thread::scope(|scope| {
        for it in others {
            let thread = std::thread::Builder::new()
                .name(MIGRATION_THREAD.to_owned())
                .spawn_scoped(scope, move || ended(other(it)));
            if let Err(cause) = thread {
                ended(Err(MigrationError::Thread(cause)));
                return;
            }
        }
        ended(first());
    });
    match error.into_inner().unpoisoned() {
        Some(error) => Err(error),
        None => Ok(()),
    }
}
