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
use crate::file_system;
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
    // The crate that reads containers has plain calls only. From a file in memory, the kernel reads nothing without the
    // right to wait: it would pass each request to a thread of its own, for what is a copy.
    let in_memory = choice != EngineChoice::IoUring
        && !image.is_block_device()
        && file_system::is_in_memory(image.file());
    if image.container().is_some() || in_memory {
        return Ok(Box::new(SyncEngine::new(Arc::clone(image))));
    }
    if tries_ring {
        match IoUringEngine::new(Arc::clone(image), depth) {
            Ok(engine) => return Ok(Box::new(engine)),
            Err(error) if choice == EngineChoice::IoUring => return Err(error),
            Err(error) => log::info!("restricted io_uring is not available for disks: {error}"),
        }
    }
    if tries_aio && image.dio().is_some() {
        match AioEngine::new(Arc::clone(image), depth) {
            Ok(engine) => return Ok(Box::new(engine)),
            Err(error) => log::info!("Linux AIO is not available for disks: {error}"),
        }
    }
    Ok(Box::new(SyncEngine::new(Arc::clone(image))))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use tempfile::NamedTempFile;

    use super::*;
    use crate::block::tests::params;

    #[test]
    fn image_in_memory_is_read_by_calls_unless_the_ring_is_asked_for() {
        let mut file = match NamedTempFile::new_in("/dev/shm") {
            Ok(file) if file_system::is_in_memory(file.as_file()) => file,
            other => {
                test_skip::skip(format!("no files in memory in /dev/shm: {other:?}"));
                return;
            }
        };
        file.write_all(&[0; 4096]).unwrap();
        let image = Arc::new(Image::open(&params(&file)).unwrap());
        let uses_ring = |choice| {
            let engine = new_engine(choice, &image, 8);
            engine.map(|engine| engine.completion_fd().is_some())
        };
        assert!(!uses_ring(EngineChoice::Auto).unwrap());
        match uses_ring(EngineChoice::IoUring) {
            Ok(uses_ring) => assert!(uses_ring),
            Err(error) => test_skip::skip(format!("no io_uring here: {error}")),
        }
    }
}
