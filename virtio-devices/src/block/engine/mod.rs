//! I/O on an image: by io_uring, or by system calls on the worker thread. `docs/decisions/0004-block-io-engine.md`
//! states the default and the reasons.

mod bounce;
mod calls;
mod io_uring;
mod operation;
mod sync;
mod zeroes;

use std::io;
use std::sync::Arc;

use super::EngineChoice;
use super::image::Image;
use io_uring::IoUringEngine;
use sync::SyncEngine;

pub(super) use operation::{Completion, IoEngine, IoOperation};
pub(super) use zeroes::{ZERO_BUFFER_BYTES, zeroes};

/// Creates the engine for one queue of `depth` requests.
///
/// # Errors
/// io_uring was configured and is not available.
pub(super) fn new_engine(
    choice: EngineChoice,
    image: &Arc<Image>,
    depth: u16,
) -> io::Result<Box<dyn IoEngine>> {
    // The crate that reads containers has plain calls only.
    if choice == EngineChoice::Sync || image.container().is_some() {
        return Ok(Box::new(SyncEngine::new(Arc::clone(image))));
    }
    match IoUringEngine::new(Arc::clone(image), depth) {
        Ok(engine) => Ok(Box::new(engine)),
        Err(error) if choice == EngineChoice::Auto => {
            log::info!(
                "restricted io_uring is not available ({error}); disk I/O uses system calls"
            );
            Ok(Box::new(SyncEngine::new(Arc::clone(image))))
        }
        Err(error) => Err(error),
    }
}
