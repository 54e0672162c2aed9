//! I/O on an image: by io_uring, by Linux AIO, or by system calls on the worker thread.
//! `docs/decisions/0004-block-io-engine.md` states the default and the reasons.

mod aio;
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
use aio::AioEngine;
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
    let tries_ring = !matches!(choice, EngineChoice::Aio | EngineChoice::Sync);
    let tries_aio = matches!(choice, EngineChoice::Auto | EngineChoice::Aio);
    // The crate that reads containers has plain calls only.
    let is_container = image.container().is_some();
    if tries_ring && !is_container {
        match IoUringEngine::new(Arc::clone(image), depth) {
            Ok(engine) => return Ok(Box::new(engine)),
            Err(error) if choice == EngineChoice::IoUring => return Err(error),
            Err(error) => log::info!("restricted io_uring is not available for disks: {error}"),
        }
    }
    if tries_aio && !is_container && image.dio().is_some() {
        match AioEngine::new(Arc::clone(image), depth) {
            Ok(engine) => return Ok(Box::new(engine)),
            Err(error) => log::info!("Linux AIO is not available for disks: {error}"),
        }
    }
    Ok(Box::new(SyncEngine::new(Arc::clone(image))))
}
