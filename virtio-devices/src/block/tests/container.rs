//! Tests of images in other formats than raw, created and checked by `qemu-img`.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::VirtioDevice;
use crate::block::image::Image;
use crate::block::{DiskResizeError, backing_files};

pub(super) const SECTORS: u64 = 1000;

/// A folder with the raw image `base.raw` of numbered sectors. `None`, which skips the test, without `qemu-img`.
pub(super) struct Images {
    folder: TempDir,
}

impl Images {
    pub(super) fn new(sectors: u64) -> Option<Self> {
        if let Err(error) = Command::new("qemu-img").arg("--version").output() {
            test_skip::skip(format!("no qemu-img: {error}"));
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let images = Self { folder };
        std::fs::copy(image(sectors).path(), images.path("base.raw")).unwrap();
        Some(images)
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs `qemu-img` in the folder.
    fn run(&self, arguments: &str) -> Output {
        let mut command = Command::new("qemu-img");
        command.args(arguments.split(' '));
        command.current_dir(self.folder.path()).output().unwrap()
    }

    pub(super) fn qemu_img(&self, arguments: &str) {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments}: {output:?}");
    }

    /// The disk's content as QEMU sees it.
    pub(super) fn content(&self, name: &str) -> Vec<u8> {
        self.qemu_img(&format!("convert -O raw {name} content.raw"));
        std::fs::read(self.path("content.raw")).unwrap()
    }

    pub(super) fn params(&self, name: &str) -> BlockParams {
        BlockParams {
            path: self.path(name),
            format: None,
            backing_files: true,
            ..params(&NamedTempFile::new().unwrap())
        }
    }

    fn rig(&self, name: &str) -> Rig {
        Rig::new(self.params(name))
    }

    /// Changes bytes of an image.
    fn patch(&self, name: &str, offset: u64, bytes: &[u8]) {
        use std::os::unix::fs::FileExt;
        let file = std::fs::File::options()
            .write(true)
            .open(self.path(name))
            .unwrap();
        file.write_all_at(bytes, offset).unwrap();
    }

    /// Whether the whole disk, only read, has the content of `base.raw`.
    fn reads_as_the_base(&self, name: &str) -> bool {
        let mut rig = Rig::new(BlockParams {
            readonly: true,
            ..self.params(name)
        });
        let (status, data) = rig.read(0, SECTORS as u32 * 512);
        status == S_OK && data == std::fs::read(self.path("base.raw")).unwrap()
    }

    /// Why the image is rejected.
    fn refused(&self, params: BlockParams) -> String {
        let mut error: &dyn std::error::Error = &Block::new(params).expect_err("refused");
        let mut text = error.to_string();
        while let Some(source) = error.source() {
            error = source;
            text.push_str(": ");
            text.push_str(&error.to_string());
        }
        text
    }
}

#[test]
fn qcow2_of_every_kind_is_read_and_written_as_qemu_does() {
    let Some(images) = Images::new(SECTORS) else {
        return;
    };
    for (compressed, options) in [
        ("", "compat=0.10"),
        ("", "compat=1.1"),
        ("", "compat=1.1,preallocation=full"),
        ("", "compat=1.1,preallocation=metadata"),
        ("", "compat=1.1,cluster_size=512"),
        ("", "compat=1.1,cluster_size=2M,refcount_bits=1"),
        ("", "compat=1.1,lazy_refcounts=on,refcount_bits=64"),
        ("-c ", "compat=0.10"),
        ("-c ", "compat=1.1"),
    ] {
        for direct in [false, true] {
            images.qemu_img(&format!(
                "convert {compressed}-O qcow2 -o {options} base.raw disk.qcow2"
            ));
            let block = Block::new(BlockParams {
                direct,
                ..images.params("disk.qcow2")
            });
            let mut rig = match block {
                Err(BlockError::NoDirectIo { .. }) => {
                    test_skip::skip("the temporary directory has no direct I/O");
                    continue;
                }
                block => {
                    let block = block.expect(options);
                    let features = block.features();
                    Rig::with_features(block, features)
                }
            };
            let mut expected = std::fs::read(images.path("base.raw")).unwrap();
            assert_eq!(rig.block.size_bytes(), SECTORS * 512);
            let (status, data) = rig.read(0, SECTORS as u32 * 512);
            assert!(status == S_OK && data == expected, "{options}");
            for (sector, sectors) in [(3, 1), (120, 300), (SECTORS - 1, 1)] {
                let data = vec![0xa0 | sectors as u8; sectors * 512];
                assert_eq!(rig.write(sector, &data), S_OK, "{options}");
                expected[sector as usize * 512..][..data.len()].copy_from_slice(&data);
            }
            assert_eq!(rig.on_range(13, range(500, 200, 0)), S_OK, "{options}");
            expected[500 * 512..700 * 512].fill(0);
            let has_zero_clusters = !options.contains("0.10");
            let discarded = if has_zero_clusters { S_OK } else { S_UNSUPP };
            assert_eq!(rig.on_range(11, range(640, 256, 0)), discarded);
            // No whole cluster of 2 MiB.
            if has_zero_clusters && !options.contains("2M") {
                expected[640 * 512..896 * 512].fill(0);
            }
            assert_eq!(rig.read(SECTORS, 512).0, S_IOERR);
            assert_eq!(rig.flush(), S_OK);
            assert_eq!(rig.counter("io_errors"), 0);
            drop(rig);
            images.qemu_img("check disk.qcow2");
            assert!(images.content("disk.qcow2") == expected, "{options}");
        }
    }
}

#[test]
fn backing_files_show_through_and_stay_as_they_are() {
    let Some(images) = Images::new(SECTORS) else {
        return;
    };
    images.qemu_img("create -q -f qcow2 -F raw -b base.raw mid.qcow2");
    let mut rig = images.rig("mid.qcow2");
    assert_eq!(rig.write(7, &[0x77; 512]), S_OK);
    drop(rig);
    // Larger than the image below it.
    images.qemu_img("create -q -f qcow2 -F qcow2 -b mid.qcow2 top.qcow2 1M");
    let below = ["base.raw", "mid.qcow2"].map(|name| std::fs::read(images.path(name)).unwrap());

    let mut rig = images.rig("top.qcow2");
    assert_eq!(rig.block.size_bytes(), 1 << 20);
    assert_eq!(rig.read(7, 512), (S_OK, vec![0x77; 512]));
    assert_eq!(rig.read(8, 512), (S_OK, vec![8; 512]));
    let end = rig.read(SECTORS - 1, 1024);
    let mut expected = vec![(SECTORS - 1) as u8; 1024];
    expected[512..].fill(0);
    assert_eq!(end, (S_OK, expected));
    assert_eq!(rig.write(9, &[0x99; 512]), S_OK);
    // The rest of the cluster is still what is below.
    assert_eq!(rig.read(10, 512), (S_OK, vec![10; 512]));
    // Zeroes hide what is below.
    assert_eq!(rig.on_range(13, range(200, 1, 0)), S_OK);
    assert_eq!(rig.on_range(11, range(256, 128, 0)), S_OK);
    assert_eq!(rig.read(200, 512), (S_OK, vec![0; 512]));
    assert_eq!(rig.read(300, 512), (S_OK, vec![0; 512]));
    drop(rig);
    images.qemu_img("check top.qcow2");
    let content = images.content("top.qcow2");
    for (sector, byte) in [(7, 0x77), (8, 8), (9, 0x99), (10, 10), (200, 0), (300, 0)] {
        assert!(
            content[sector * 512..][..512]
                .iter()
                .all(|found| *found == byte)
        );
    }
    for (name, before) in ["base.raw", "mid.qcow2"].iter().zip(below) {
        assert!(std::fs::read(images.path(name)).unwrap() == before);
    }
    assert_eq!(
        backing_files(&images.path("top.qcow2"), Some(ImageFormat::Qcow2)),
        [images.path("mid.qcow2"), images.path("base.raw")]
    );
}

#[test]
fn backing_files_are_opened_only_if_allowed_and_named() {
    let Some(images) = Images::new(SECTORS) else {
        return;
    };
    images.qemu_img("create -q -f qcow2 -F raw -b base.raw top.qcow2");
    let denied = images.refused(BlockParams {
        backing_files: false,
        ..images.params("top.qcow2")
    });
    assert!(denied.contains("base.raw; to allow that, set backing_files=on"));

    let reference = |name: &str, backing: &str| {
        images.qemu_img(&format!("create -q -f qcow2 -u {backing} {name} 1M"));
        images.refused(images.params(name))
    };
    let missing = reference("a.qcow2", "-F raw -b missing.raw");
    assert!(missing.contains("cannot open disk image") && missing.contains("missing.raw"));
    let no_folder = reference("a.qcow2", "-F raw -b .");
    assert!(no_folder.contains("neither a regular file"), "{no_folder}");
    let other = reference("b.qcow2", "-F vmdk -b base.raw");
    assert!(
        other.contains("base.raw has the format \"vmdk\""),
        "{other}"
    );
    let guessed = reference("c.qcow2", "-F qcow2 -b base.raw");
    assert!(
        guessed.contains("base.raw: the file is not a qcow2"),
        "{guessed}"
    );
    images.qemu_img("create -q -f qcow2 -u -F qcow2 -b e.qcow2 d.qcow2 1M");
    let circle = reference("e.qcow2", "-F qcow2 -b d.qcow2");
    assert!(circle.contains("more than 16 images"), "{circle}");
    // QEMU no longer makes images without a format: the extension of the header gets another type.
    images.patch("top.qcow2", 112, &[1; 4]);
    let unknown = images.refused(images.params("top.qcow2"));
    assert!(unknown.contains("does not state the format"), "{unknown}");
}

#[test]
fn image_and_its_backing_files_are_locked() {
    let Some(images) = Images::new(SECTORS) else {
        return;
    };
    for name in ["one.qcow2", "two.qcow2"] {
        images.qemu_img(&format!("create -q -f qcow2 -F raw -b base.raw {name}"));
    }
    let one = Block::new(images.params("one.qcow2")).unwrap();
    let two = Block::new(images.params("two.qcow2")).expect("readers of the base share it");
    let again = images.refused(images.params("one.qcow2"));
    assert!(again.contains("one.qcow2 for writing"), "{again}");
    let writer = images.refused(images.params("base.raw"));
    assert!(writer.contains("base.raw for writing"), "{writer}");
    // Another process takes the image over, changes it, and hands it back.
    let handle = one.handle();
    handle.sync().unwrap();
    handle.hold(false).unwrap();
    let mut other = images.rig("one.qcow2");
    assert_eq!(other.write(5, &[0x55; 512]), S_OK);
    assert!(handle.hold(true).is_err());
    drop(other);
    handle.hold(true).unwrap();
    let features = one.features();
    let mut rig = Rig::with_features(one, features);
    assert_eq!(rig.read(5, 512), (S_OK, vec![0x55; 512]));
    assert_eq!(rig.write(600, &[0x66; 512]), S_OK);
    drop((rig, handle));
    drop(two);
    images.qemu_img("check one.qcow2");
}

#[test]
fn images_that_cannot_be_used_are_named_with_the_reason() {
    let Some(images) = Images::new(SECTORS) else {
        return;
    };
    let convert = |format: &str, name: &str| {
        images.qemu_img(&format!("convert -O {format} base.raw {name}"));
        images.refused(images.params(name))
    };
    for (format, reason) in [
        ("vhdx", "vhdx images are not supported"),
        ("vmdk", "only flat VMDKs are supported"),
        (
            "vmdk -o subformat=twoGbMaxExtentSparse",
            "only flat VMDKs are supported",
        ),
        ("vpc", "only fixed VHDs are supported"),
        (
            "qcow2 -o compression_type=zstd",
            "zstd and can only be read",
        ),
        ("qcow2 -o extended_l2=on", "extended L2 entries"),
        ("qcow2 -o data_file=data.raw", "external data file"),
    ] {
        let error = convert(format, "disk");
        assert!(error.contains(reason), "{error}");
        assert!(error.contains(&images.path("disk").display().to_string()));
    }
    images.qemu_img("convert -O qcow2 base.raw disk");
    for (bit, reason) in [(1, "dirty bit"), (2, "marked as corrupt")] {
        images.patch("disk", 79, &[bit]);
        let error = images.refused(images.params("disk"));
        assert!(error.contains(reason), "{error}");
        assert!(images.reads_as_the_base("disk"));
    }
    for (format, name) in [
        (ImageFormat::Qcow2, "base.raw"),
        (ImageFormat::Vhd, "base.raw"),
        (ImageFormat::Vhd, "disk"),
    ] {
        let error = images.refused(BlockParams {
            format: Some(format),
            ..images.params(name)
        });
        assert!(error.contains("the file is not a"), "{error}");
    }
}

/// Extents of 2 GiB and of the rest, so that a read crosses their border.
const EXTENT_SECTORS: u64 = (2 << 30) / 512;

#[test]
fn flat_vmdks_are_read_as_qemu_does() {
    let Some(images) = Images::new(SECTORS) else {
        return;
    };
    images.qemu_img("convert -O vmdk -o subformat=monolithicFlat base.raw one.vmdk");
    // QEMU's split images have a multiple of these sectors, and numbered ones are around the border.
    let sparse = std::fs::File::create(images.path("large.raw")).unwrap();
    sparse
        .set_len((EXTENT_SECTORS + SECTORS / 2) * 512)
        .unwrap();
    let base = std::fs::read(images.path("base.raw")).unwrap();
    let around = EXTENT_SECTORS - SECTORS / 2;
    images.patch("large.raw", around * 512, &base);
    images.qemu_img("convert -O vmdk -o subformat=twoGbMaxExtentFlat large.raw two.vmdk");
    for (name, first, extents) in [
        ("one.vmdk", 0, &["one-flat.vmdk"][..]),
        ("two.vmdk", around, &["two-f001.vmdk", "two-f002.vmdk"]),
    ] {
        for direct in [false, true] {
            for format in [None, Some(ImageFormat::Vmdk)] {
                let block = Block::new(BlockParams {
                    readonly: true,
                    direct,
                    format,
                    ..images.params(name)
                });
                if let Err(BlockError::NoDirectIo { .. }) = block {
                    test_skip::skip("the temporary directory has no direct I/O");
                    continue;
                }
                let block = block.expect(name);
                let features = block.features();
                let mut rig = Rig::with_features(block, features);
                assert_eq!(rig.block.size_bytes(), (first + SECTORS) * 512);
                let (status, data) = rig.read(first, SECTORS as u32 * 512);
                assert!(status == S_OK && data == base, "{name}");
                assert_eq!(rig.read(first + SECTORS, 512).0, S_IOERR);
                assert_eq!(rig.write(first, &[1; 512]), S_IOERR);
                assert_eq!(rig.flush(), S_OK);
                assert_eq!(rig.counter("io_errors"), 0);
            }
        }
        let paths: Vec<_> = extents.iter().map(|name| images.path(name)).collect();
        assert_eq!(backing_files(&images.path(name), None), paths);
    }
}

#[test]
fn vmdks_that_cannot_be_used_are_named_with_the_reason() {
    let Some(images) = Images::new(SECTORS) else {
        return;
    };
    images.qemu_img("convert -O vmdk -o subformat=monolithicFlat base.raw a.vmdk");
    let params = || BlockParams {
        readonly: true,
        ..images.params("a.vmdk")
    };
    let denied = images.refused(BlockParams {
        backing_files: false,
        ..params()
    });
    assert!(
        denied.contains("a-flat.vmdk; to allow that, set backing_files=on"),
        "{denied}"
    );
    let written = images.refused(images.params("a.vmdk"));
    assert!(
        written.contains("a.vmdk: VMDKs can only be read; set readonly=on"),
        "{written}"
    );
    // Another disk uses the extent.
    let writer = Block::new(images.params("a-flat.vmdk")).unwrap();
    let locked = images.refused(params());
    assert!(locked.contains("a-flat.vmdk for reading"), "{locked}");
    drop(writer);
    let reader = Block::new(params()).unwrap();
    let locked = images.refused(images.params("a-flat.vmdk"));
    assert!(locked.contains("a-flat.vmdk for writing"), "{locked}");
    drop(reader);

    let short = std::fs::File::options()
        .write(true)
        .open(images.path("a-flat.vmdk"))
        .unwrap();
    short.set_len((SECTORS - 1) * 512).unwrap();
    let error = images.refused(params());
    let wanted = format!(
        "a-flat.vmdk: the file is too short for a VMDK extent: it has {} bytes, and its descriptor needs {}",
        (SECTORS - 1) * 512,
        SECTORS * 512
    );
    assert!(error.contains(&wanted), "{error}");

    let descriptor = std::fs::read_to_string(images.path("a.vmdk")).unwrap();
    let named = |name: &str| {
        let text = descriptor.replace("a-flat.vmdk", name);
        std::fs::write(images.path("a.vmdk"), text).unwrap();
        images.refused(params())
    };
    let outside = images.path("base.raw").display().to_string();
    for name in [outside.as_str(), "../base.raw"] {
        let error = named(name);
        assert!(error.contains("must be in the folder"), "{error}");
    }
    let missing = named("missing.vmdk");
    assert!(
        missing.contains("cannot open disk image") && missing.contains("missing.vmdk"),
        "{missing}"
    );
    std::fs::create_dir(images.path("folder")).unwrap();
    let folder = named("folder");
    assert!(folder.contains("neither a regular file"), "{folder}");
    images.patch("a.vmdk", 30, b"\xff");
    let error = images.refused(params());
    assert!(error.contains("not UTF-8"), "{error}");
    let raw = images.refused(BlockParams {
        format: Some(ImageFormat::Vmdk),
        ..images.params("base.raw")
    });
    assert!(raw.contains("the file is not a vmdk image"), "{raw}");
}

#[test]
fn extent_that_was_truncated_is_read_with_errors() {
    let Some(images) = Images::new(SECTORS) else {
        return;
    };
    images.qemu_img("convert -O vmdk -o subformat=monolithicFlat base.raw a.vmdk");
    let block = Block::new(BlockParams {
        readonly: true,
        ..images.params("a.vmdk")
    });
    let block = block.unwrap();
    let features = block.features();
    let mut rig = Rig::with_features(block, features);
    let extent = std::fs::OpenOptions::new()
        .write(true)
        .open(images.path("a-flat.vmdk"))
        .unwrap();
    extent.set_len(8 * 512).unwrap();
    assert_eq!(rig.read(0, 8 * 512).0, S_OK);
    for first in [7, 8] {
        assert_eq!(rig.read(first, 2 * 512).0, S_IOERR);
    }
    assert_eq!(rig.counter("io_errors"), 2);
}

#[test]
fn clusters_compressed_with_zstd_are_read() {
    let Some(images) = Images::new(SECTORS) else {
        return;
    };
    for cluster in ["512", "64k", "2M"] {
        let options = format!("compression_type=zstd,cluster_size={cluster}");
        images.qemu_img(&format!(
            "convert -c -O qcow2 -o {options} base.raw zstd.qcow2"
        ));
        assert!(images.reads_as_the_base("zstd.qcow2"), "{cluster}");
        // Below an image that is written, also in parts of clusters.
        images.qemu_img("create -q -f qcow2 -F qcow2 -b zstd.qcow2 top.qcow2");
        let mut rig = images.rig("top.qcow2");
        assert_eq!(rig.write(9, &[0x99; 512]), S_OK);
        let mut expected = std::fs::read(images.path("base.raw")).unwrap();
        expected[9 * 512..10 * 512].fill(0x99);
        assert!(rig.read(0, SECTORS as u32 * 512) == (S_OK, expected.clone()));
        drop(rig);
        images.qemu_img("check top.qcow2");
        assert!(images.content("top.qcow2") == expected);
    }
}

/// Bytes of compressed clusters are chosen by whoever made the image.
#[test]
fn damaged_zstd_cluster_fails_its_reads_and_is_counted() {
    let Some(images) = Images::new(SECTORS) else {
        return;
    };
    images.qemu_img("convert -c -O qcow2 -o compression_type=zstd base.raw disk.qcow2");
    let sound = std::fs::read(images.path("disk.qcow2")).unwrap();
    let magic = 0xfd2f_b528_u32.to_le_bytes();
    let frame = sound.windows(4).position(|it| *it == magic).unwrap() as u64;
    // No frame; and one that wants a window of almost 4 TiB.
    for (at, bytes) in [(0, &[0; 4][..]), (4, &[0, 0xff])] {
        std::fs::write(images.path("disk.qcow2"), &sound).unwrap();
        images.patch("disk.qcow2", frame + at, bytes);
        let mut rig = Rig::new(BlockParams {
            readonly: true,
            ..images.params("disk.qcow2")
        });
        assert_eq!(rig.read(0, 512).0, S_IOERR);
        assert_eq!(rig.counter("image_errors"), 1);
        // Another cluster.
        assert_eq!(rig.read(300, 512), (S_OK, vec![300_u64 as u8; 512]));
    }
}

#[test]
fn image_whose_counts_would_be_searched_for_ever_is_rejected() {
    let Some(images) = Images::new(SECTORS) else {
        return;
    };
    images.qemu_img("create -q -f qcow2 -o cluster_size=64k disk.qcow2 1G");
    let bytes = std::fs::read(images.path("disk.qcow2")).unwrap();
    let at = |field: usize| u64::from_be_bytes(bytes[field..field + 8].try_into().unwrap());
    let table = at(48);
    let block = at(table as usize);
    images.patch("disk.qcow2", block, &[0xff; 64 << 10]);
    images.patch("disk.qcow2", table, &block.to_be_bytes().repeat(8192));
    let error = images.refused(images.params("disk.qcow2"));
    assert!(
        error.contains("disk.qcow2") && error.contains("qemu-img check"),
        "{error}"
    );
    // Nothing searches the counts of an image that is only read.
    let mut rig = Rig::new(BlockParams {
        readonly: true,
        ..images.params("disk.qcow2")
    });
    assert_eq!(rig.read(9, 512), (S_OK, vec![0; 512]));
}

#[test]
fn image_with_internal_snapshots_is_only_read() {
    let Some(images) = Images::new(SECTORS) else {
        return;
    };
    images.qemu_img("convert -O qcow2 base.raw disk.qcow2");
    images.qemu_img("snapshot -c before disk.qcow2");
    let error = images.refused(images.params("disk.qcow2"));
    assert!(error.contains("internal snapshots (1)"), "{error}");
    let mut rig = Rig::new(BlockParams {
        readonly: true,
        ..images.params("disk.qcow2")
    });
    assert_eq!(rig.read(9, 512), (S_OK, vec![9; 512]));
    drop(rig);
    images.qemu_img("snapshot -d before disk.qcow2");
    assert_eq!(images.rig("disk.qcow2").write(9, &[1; 512]), S_OK);
    images.qemu_img("check disk.qcow2");
}

#[test]
fn qcow2_that_is_read_only_is_not_changed() {
    let Some(images) = Images::new(SECTORS) else {
        return;
    };
    images.qemu_img("convert -c -O qcow2 base.raw disk.qcow2");
    let before = std::fs::read(images.path("disk.qcow2")).unwrap();
    let mut rig = Rig::new(BlockParams {
        readonly: true,
        ..images.params("disk.qcow2")
    });
    assert_eq!(rig.read(9, 512), (S_OK, vec![9; 512]));
    assert_eq!(rig.write(9, &[1; 512]), S_IOERR);
    assert_eq!(rig.on_range(11, range(0, 8, 0)), S_IOERR);
    assert_eq!(rig.flush(), S_OK);
    drop(rig);
    assert!(std::fs::read(images.path("disk.qcow2")).unwrap() == before);
}

#[test]
fn image_whose_vmm_is_killed_is_sound() {
    let Some(images) = Images::new(SECTORS) else {
        return;
    };
    images.qemu_img("create -q -f qcow2 -o cluster_size=512 disk.qcow2 64M");
    let mut rig = images.rig("disk.qcow2");
    // Enough for tables of references and of counts that have to be allocated as well.
    for at in 0..400_u64 {
        let data = vec![at as u8 | 1; 32 << 10];
        assert_eq!(rig.write(at * 311, &data), S_OK);
        if at == 200 {
            assert_eq!(rig.flush(), S_OK);
        }
        if at % 50 == 49 {
            std::fs::copy(images.path("disk.qcow2"), images.path("left.qcow2")).unwrap();
            // 3: clusters that nothing uses, which is harmless. 2 would be an error.
            let checked = images.run("check left.qcow2");
            let code = checked.status.code();
            assert!(
                matches!(code, Some(0 | 3)),
                "after {at} writes: {checked:?}"
            );
        }
    }
    let content = images.content("left.qcow2");
    for at in 0..=200 {
        assert_eq!(
            content[at * 311 * 512],
            at as u8 | 1,
            "flushed data is there"
        );
    }
}

#[test]
fn killed_vmm_leaves_the_compressed_data_that_it_was_replacing() {
    let Some(images) = Images::new(8) else {
        return;
    };
    // One compressed cluster, the last one that the first L2 table describes. The second one does not exist yet.
    const SECOND: u64 = 4096;
    let data = std::fs::read(images.path("base.raw")).unwrap();
    let mut raw = vec![0; 8 << 20];
    raw[(SECOND as usize - 8) * 512..][..data.len()].copy_from_slice(&data);
    std::fs::write(images.path("base.raw"), raw).unwrap();
    let changes: [fn(&mut Rig) -> u8; 4] = [
        |rig| rig.write(SECOND - 1, &[0xaa; 1024]),
        |rig| rig.write(SECOND - 1, &[0xaa; 512]) | rig.write(SECOND, &[0xaa; 512]),
        |rig| rig.write(SECOND - 1, &[0xaa; 512]) | rig.on_range(13, range(SECOND, 8, 0)),
        |rig| rig.write(SECOND - 1, &[0xaa; 512]) | rig.on_range(13, range(SECOND, 9, 1)),
    ];
    for (number, change) in changes.into_iter().enumerate() {
        images.qemu_img("convert -c -O qcow2 -o cluster_size=4096 base.raw disk.qcow2");
        let mut rig = images.rig("disk.qcow2");
        assert_eq!(change(&mut rig), S_OK);
        std::fs::copy(images.path("disk.qcow2"), images.path("left.qcow2")).unwrap();
        let content = images.content("left.qcow2");
        let kept = &content[(SECOND as usize - 8) * 512..][..7 * 512];
        assert!(kept == &data[..7 * 512], "change {number}");
        drop(rig);
        images.qemu_img("check disk.qcow2");
    }
}

#[test]
fn several_queues_use_one_image() {
    let Some(images) = Images::new(SECTORS) else {
        return;
    };
    images.qemu_img("create -q -f qcow2 -F raw -b base.raw -o cluster_size=4k disk.qcow2 8M");
    let mut block = Block::new(BlockParams {
        num_queues: 4,
        ..images.params("disk.qcow2")
    })
    .unwrap();
    let features = block.features();
    let workers: Vec<_> = block
        .take_handlers()
        .into_iter()
        .zip(0_u64..)
        .map(|(handler, queue)| {
            std::thread::spawn(move || {
                let mut harness = HandlerHarness::new(handler, features);
                harness.add_queue(0, 64);
                harness.activate().unwrap();
                // The queues share clusters, but not sectors.
                for round in 0..300_u64 {
                    let sector = (round * 37 % 4000) * 4 + queue;
                    let fill = [queue as u8 ^ round as u8; 512];
                    let (kind, data) = match round % 10 {
                        9 => (11, range(16_000 + queue * 64, 64, 0).to_vec()),
                        _ => (1, fill.to_vec()),
                    };
                    let head = header(kind, if kind == 1 { sector } else { 0 });
                    let chain = harness.queue(0).push(&[
                        Segment::Readable(&head),
                        Segment::Readable(&data),
                        Segment::Writable(1),
                    ]);
                    harness.kick(0).unwrap();
                    let used = harness.queue(0).pop_used().expect("served at once");
                    assert_eq!(used.head, u32::from(chain.head));
                    let status = harness.queue(0).read_buffer(chain.buffers[2]);
                    assert_eq!(status, [S_OK]);
                }
                harness
            })
        })
        .collect();
    for worker in workers {
        worker.join().unwrap();
    }
    drop(block);
    images.qemu_img("check disk.qcow2");
    let content = images.content("disk.qcow2");
    for queue in 0..4 {
        for round in (0..300_u64).filter(|round| round % 10 != 9) {
            let sector = (round * 37 % 4000) * 4 + queue;
            assert_eq!(content[sector as usize * 512], queue as u8 ^ round as u8);
        }
    }
}

#[test]
fn fixed_vhd_is_the_file_without_its_footer() {
    let Some(images) = Images::new(SECTORS) else {
        return;
    };
    for engine in ENGINES {
        images.qemu_img("convert -O vpc -o subformat=fixed,force_size=on base.raw disk.vhd");
        let before = std::fs::read(images.path("disk.vhd")).unwrap();
        let params = BlockParams {
            format: Some(ImageFormat::Vhd),
            engine,
            ..images.params("disk.vhd")
        };
        let mut rig = Rig::new(params.clone());
        assert_eq!(rig.block.size_bytes(), SECTORS * 512);
        let last = SECTORS - 1;
        assert_eq!(rig.read(last, 512), (S_OK, vec![last as u8; 512]));
        assert_eq!(rig.write(last, &[0xbb; 512]), S_OK);
        assert_eq!(rig.write(SECTORS, &[0xbb; 512]), S_IOERR);
        // The guest may write anything, also to its first sector, and the next start is not misled.
        let mut signature = [0; 512];
        signature[..4].copy_from_slice(b"QFI\xfb");
        assert_eq!(rig.write(0, &signature), S_OK);
        let resized = rig.block.handle().resize(1 << 20).unwrap_err();
        assert!(matches!(resized, DiskResizeError::Format { .. }));
        drop(rig);
        let after = std::fs::read(images.path("disk.vhd")).unwrap();
        assert_eq!(after.len(), before.len());
        assert_eq!(after[after.len() - 512..], before[before.len() - 512..]);
        assert_eq!(after[last as usize * 512], 0xbb);
        assert_eq!(Rig::new(params).block.size_bytes(), SECTORS * 512);
    }
}

#[test]
fn discards_leave_parts_of_clusters_alone() {
    let Some(images) = Images::new(SECTORS) else {
        return;
    };
    images.qemu_img("create -q -f qcow2 -F raw -b base.raw disk.qcow2");
    let mut rig = images.rig("disk.qcow2");
    let mut alignment = [0; 4];
    rig.block.read_config(44, &mut alignment);
    assert_eq!(u32::from_le_bytes(alignment), 128, "sectors of a cluster");
    let before = std::fs::metadata(images.path("disk.qcow2")).unwrap().len();
    // Part of a cluster, and parts of two.
    assert_eq!(rig.on_range(11, range(3, 8, 0)), S_OK);
    assert_eq!(rig.on_range(11, range(100, 100, 0)), S_OK);
    assert_eq!(rig.read(3, 512), (S_OK, vec![3; 512]));
    assert_eq!(rig.flush(), S_OK);
    let after = std::fs::metadata(images.path("disk.qcow2")).unwrap().len();
    assert_eq!(before, after, "nothing was allocated");
    // One whole cluster, and parts of its neighbours.
    assert_eq!(rig.on_range(11, range(120, 144, 0)), S_OK);
    for (sector, byte) in [(127, 127), (128, 0), (255, 0), (256, 0)] {
        assert_eq!(rig.read(sector, 512), (S_OK, vec![byte; 512]), "{sector}");
    }
    assert_eq!(rig.read(257, 512), (S_OK, vec![1; 512]));
    // Zeroes are a promise, with the flag that allows to unmap, too.
    assert_eq!(rig.on_range(13, range(3, 8, 1)), S_OK);
    assert_eq!(rig.read(3, 512), (S_OK, vec![0; 512]));
    drop(rig);
    images.qemu_img("check disk.qcow2");
}

#[test]
fn qcow2_keeps_its_size() {
    let Some(images) = Images::new(SECTORS) else {
        return;
    };
    images.qemu_img("convert -O qcow2 base.raw disk.qcow2");
    let block = Block::new(images.params("disk.qcow2")).unwrap();
    let error = block.handle().resize(1 << 20).unwrap_err();
    assert!(error.is_of_request());
    assert!(error.to_string().contains("qemu-img resize"), "{error}");
}

/// Opens an image with these changes, reads all of it and changes parts of it. This ends for every image.
fn use_damaged(images: &Images, name: &str, changes: &[(usize, u8)]) {
    let mut bytes = std::fs::read(images.path(name)).unwrap();
    for (at, byte) in changes {
        let at = at % bytes.len();
        bytes[at] = *byte;
    }
    std::fs::write(images.path("damaged"), bytes).unwrap();
    let block = Block::new(BlockParams {
        readonly: name == "zstd",
        ..images.params("damaged")
    });
    let Ok(block) = block else {
        return;
    };
    let features = block.features();
    let bytes = block.size_bytes().min(SECTORS * 512);
    let mut rig = Rig::with_features(block, features);
    if bytes >= 64 * 512 {
        rig.read(0, bytes as u32);
        rig.write(5, &[5; 512]);
        rig.write(bytes / 1024, &[6; 8 * 512]);
        rig.on_range(13, range(20, 30, 0));
        rig.on_range(11, range(8, 48, 0));
        rig.flush();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn damaged_qcow2_neither_panics_nor_hangs(
        // Headers, tables and compressed data are in the first clusters.
        changes in prop::collection::vec(
            (prop_oneof![0..112_usize, 0..8192_usize, 0..1_000_000_usize], any::<u8>()),
            1..12,
        ),
        name in prop::sample::select(vec!["plain", "compressed", "zstd"]),
    ) {
        thread_local! {
            static IMAGES: Option<Arc<Images>> = Images::new(SECTORS).map(|images| {
                images.qemu_img("convert -O qcow2 -o cluster_size=1024 base.raw plain");
                images.qemu_img("convert -c -O qcow2 -o cluster_size=4096 base.raw compressed");
                let zstd = "cluster_size=4096,compression_type=zstd";
                images.qemu_img(&format!("convert -c -O qcow2 -o {zstd} base.raw zstd"));
                Arc::new(images)
            });
        }
        if let Some(images) = IMAGES.with(Clone::clone) {
            use_damaged(&images, name, &changes);
        }
    }
}

#[test]
fn image_with_large_clusters_costs_bounded_memory() {
    let Some(images) = Images::new(SECTORS) else {
        return;
    };
    images.qemu_img("create -q -f qcow2 -o cluster_size=2M a.qcow2 1G");
    images.qemu_img("create -q -f qcow2 -o cluster_size=2M -F qcow2 -b a.qcow2 b.qcow2");
    Image::open(&images.params("a.qcow2")).expect("one such image is accepted");
    let error = images.refused(images.params("b.qcow2"));
    assert!(error.contains("need more than 512 MiB"), "{error}");
    let path = Path::new("/nonexistent");
    assert!(backing_files(path, None).is_empty());
}
