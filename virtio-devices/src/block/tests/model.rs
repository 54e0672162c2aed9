//! Tests that any sequence of requests has the same effect on the file as on an array.

use proptest::prelude::*;

use super::container::Images;
use super::*;

const SECTORS: u64 = 96;

#[derive(Debug, Clone)]
enum Action {
    Write {
        sector: u64,
        sectors: u64,
        fill: u8,
    },
    Read {
        sector: u64,
        sectors: u64,
    },
    Discard {
        sector: u64,
        sectors: u64,
    },
    WriteZeroes {
        sector: u64,
        sectors: u64,
        unmap: bool,
    },
    Flush,
}

fn action() -> impl Strategy<Value = Action> {
    // Some ranges intentionally reach past the end.
    let span = (0..SECTORS + 4, 1..20u64);
    prop_oneof![
        (span.clone(), any::<u8>()).prop_map(|((sector, sectors), fill)| Action::Write {
            sector,
            sectors,
            fill
        }),
        span.clone()
            .prop_map(|(sector, sectors)| Action::Read { sector, sectors }),
        span.clone()
            .prop_map(|(sector, sectors)| Action::Discard { sector, sectors }),
        (span, any::<bool>()).prop_map(|((sector, sectors), unmap)| Action::WriteZeroes {
            sector,
            sectors,
            unmap
        }),
        Just(Action::Flush),
    ]
}

/// Bytes of a span, or nothing if it does not fit the disk.
fn bytes_of(sector: u64, sectors: u64) -> Option<std::ops::Range<usize>> {
    (sector + sectors <= SECTORS).then(|| {
        let (start, end) = (sector * 512, (sector + sectors) * 512);
        start as usize..end as usize
    })
}

fn play(actions: &[Action], engine: EngineChoice, direct: bool) {
    let file = image(SECTORS);
    let mut model: Vec<u8> = std::fs::read(file.path()).unwrap();
    match Block::new(BlockParams {
        engine,
        direct,
        ..params(&file)
    }) {
        Ok(block) => play_on(actions, block, &mut model, 512),
        Err(BlockError::NoDirectIo { .. }) => {
            test_skip::skip("the temporary directory has no direct I/O");
            return;
        }
        Err(error) => panic!("{error}"),
    }
    assert!(std::fs::read(file.path()).unwrap() == model, "file differs");
}

/// The same on a qcow2 image over the raw one.
fn play_on_qcow2(actions: &[Action], direct: bool, cluster_bytes: usize) {
    let Some(images) = Images::new(SECTORS) else {
        return;
    };
    let mut model = std::fs::read(images.path("base.raw")).unwrap();
    images.qemu_img(&format!(
        "create -q -f qcow2 -F raw -b base.raw -o cluster_size={cluster_bytes} disk.qcow2"
    ));
    let params = BlockParams {
        direct,
        ..images.params("disk.qcow2")
    };
    match Block::new(params) {
        Ok(block) => play_on(actions, block, &mut model, cluster_bytes),
        Err(BlockError::NoDirectIo { .. }) => return,
        Err(error) => panic!("{error}"),
    }
    images.qemu_img("check disk.qcow2");
    assert!(images.content("disk.qcow2") == model, "image differs");
}

/// A discard leaves parts of `unit` bytes as they are.
fn play_on(actions: &[Action], block: Block, model: &mut [u8], unit: usize) {
    let features = crate::VirtioDevice::features(&block);
    let mut rig = Rig::with_features(block, features);
    let status_of = |range: &Option<_>| if range.is_some() { S_OK } else { S_IOERR };
    for action in actions {
        match *action {
            Action::Write {
                sector,
                sectors,
                fill,
            } => {
                let data: Vec<u8> = (0..sectors * 512)
                    .map(|at| fill.wrapping_add((at / 512) as u8))
                    .collect();
                let range = bytes_of(sector, sectors);
                assert_eq!(rig.write(sector, &data), status_of(&range));
                if let Some(range) = range {
                    model[range].copy_from_slice(&data);
                }
            }
            Action::Read { sector, sectors } => {
                let range = bytes_of(sector, sectors);
                let (status, data) = rig.read(sector, (sectors * 512) as u32);
                assert_eq!(status, status_of(&range));
                if let Some(range) = range {
                    assert!(data == model[range], "read returned something else");
                }
            }
            Action::Discard { sector, sectors } => {
                let range = bytes_of(sector, sectors);
                let wire = super::range(sector, sectors as u32, 0);
                assert_eq!(rig.on_range(11, wire), status_of(&range));
                if let Some(range) = range {
                    // In files, unlike devices, punched ranges read as zeroes.
                    let start = range.start.next_multiple_of(unit);
                    let end = match range.end == model.len() {
                        true => range.end,
                        false => range.end / unit * unit,
                    };
                    if start < end {
                        model[start..end].fill(0);
                    }
                }
            }
            Action::WriteZeroes {
                sector,
                sectors,
                unmap,
            } => {
                let range = bytes_of(sector, sectors);
                let wire = super::range(sector, sectors as u32, u32::from(unmap));
                assert_eq!(rig.on_range(13, wire), status_of(&range));
                if let Some(range) = range {
                    model[range].fill(0);
                }
            }
            Action::Flush => assert_eq!(rig.flush(), S_OK),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn disk_under_any_sequence_equals_an_array(
        actions in prop::collection::vec(action(), 1..40),
    ) {
        play(&actions, EngineChoice::Sync, false);
        play(&actions, EngineChoice::Auto, false);
        // The mock driver's buffers are misaligned for direct I/O, so the bounce buffer is used.
        play(&actions, EngineChoice::Auto, true);
        play(&actions, EngineChoice::Aio, true);
        // Clusters smaller or larger than the disk.
        match actions.len() % 2 {
            0 => play_on_qcow2(&actions, false, 4096),
            _ => play_on_qcow2(&actions, true, 65536),
        }
    }
}
